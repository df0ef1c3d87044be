"""The servers that the gateway is measured beside, one application each: `python -m scripts.benchmarks.rows <row> <port>`.

All run under uvicorn with the gateway's own options, with the same graph, and the same history window where they have one.
"""

import argparse
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import msgspec
import psycopg
import uvicorn
from fastapi import Depends, FastAPI
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel
from sqlalchemy import DateTime, String, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uuid_utils.compat import uuid7

from gateway.server.serve import tune_collector
from scripts.benchmarks.graphs.canned import builder, graph
from scripts.benchmarks.pauses import watch_collector

WINDOW = 50
CONNECTIONS = 8
Lifespan = Callable[[Any], Any]


class Body(msgspec.Struct):
    """One message."""

    message: str
    session_id: str
    metadata: dict[str, Any] = {}


class Answer(msgspec.Struct):
    """Its answer."""

    response: str
    metadata: dict[str, Any]


_decoder = msgspec.json.Decoder(Body)
_encoder = msgspec.json.Encoder()


def _respond(text: str, session_id: str) -> Response:
    return Response(_encoder.encode(Answer(text, {"session_id": session_id})), media_type="application/json")


def limit(url: str) -> Starlette:
    """(a) What no gateway can be faster than: the graph behind HTTP, without history or state."""

    async def message(request: Request) -> Response:
        body = _decoder.decode(await request.body())
        state = await graph.ainvoke({"messages": [HumanMessage(body.message)]})
        return _respond(state["messages"][-1].content, body.session_id)

    return Starlette(routes=[Route("/message", message, methods=["POST"])])


class Base(DeclarativeBase):
    """Tables of the first design."""


class Chat(Base):
    """A session with all it has said in one column."""

    __tablename__ = "first_sessions"
    session_id: Mapped[str] = mapped_column(String(255), primary_key=True)
    conversation_history: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    last_activity_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class FirstBody(BaseModel):
    """One message, as FastAPI reads it."""

    message: str
    session_id: str
    metadata: dict[str, Any] = {}


class FirstAnswer(BaseModel):
    """Its answer, as FastAPI writes it."""

    response: str
    metadata: dict[str, Any]


def first(url: str) -> FastAPI:
    """(d) The product's first design: the history is one JSONB column, written anew with each turn. It knows no window: the
    graph is given all of it."""
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=CONNECTIONS)
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def database() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            yield session

    app = FastAPI()

    @app.post("/message")
    async def message(body: FirstBody, db: Annotated[AsyncSession, Depends(database)]) -> FirstAnswer:
        chat = (await db.execute(select(Chat).where(Chat.session_id == body.session_id))).scalar_one()
        history = chat.conversation_history
        past: list[AnyMessage] = [_langchain(one["role"], one["content"]) for one in history]
        state = await graph.ainvoke({"messages": [*past, HumanMessage(body.message)]})
        text = state["messages"][-1].content
        now = datetime.now(UTC)
        said = [
            {"id": str(uuid7()), "role": role, "content": content, "created_at": now.isoformat()}
            for role, content in (("user", body.message), ("assistant", text))
        ]
        chat.conversation_history = [*history, *said]
        chat.last_activity_at = now
        await db.commit()
        return FirstAnswer(response=text, metadata={"session_id": body.session_id})

    return app


def _langchain(role: str, content: str) -> AnyMessage:
    return HumanMessage(content) if role == "user" else AIMessage(content)


def rows(url: str) -> Starlette:
    """(e) A row per message, no Redis: the newest are read, two are written, in one commit."""
    pool: asyncpg.Pool[asyncpg.Record]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        nonlocal pool
        async with asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:
            yield

    async def message(request: Request) -> Response:
        body = _decoder.decode(await request.body())
        async with pool.acquire() as connection:
            found = await connection.fetch(
                "SELECT role, content FROM rows_messages WHERE session_id = $1 ORDER BY seq DESC LIMIT $2",
                body.session_id,
                WINDOW,
            )
        past: list[AnyMessage] = [_langchain(one["role"], one["content"]) for one in reversed(found)]
        state = await graph.ainvoke({"messages": [*past, HumanMessage(body.message)]})
        text = state["messages"][-1].content
        now = datetime.now(UTC)
        async with pool.acquire() as connection, connection.transaction():
            await connection.executemany(
                "INSERT INTO rows_messages (id, session_id, role, content, created_at) VALUES ($1, $2, $3, $4, $5)",
                [
                    (UUID(str(uuid7())), body.session_id, "user", body.message, now),
                    (UUID(str(uuid7())), body.session_id, "assistant", text, now),
                ],
            )
            await connection.execute(
                "UPDATE rows_sessions SET last_activity_at = $2, message_count = message_count + 2 WHERE session_id = $1",
                body.session_id,
                now,
            )
        return _respond(text, body.session_id)

    return Starlette(routes=[Route("/message", message, methods=["POST"])], lifespan=lifespan)


def saver(url: str, durability: Any) -> Starlette:
    """(f) LangGraph's own checkpoints in Postgres; it has no window, the state is the whole history."""
    compiled: Any = None

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        nonlocal compiled
        options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
        pool: AsyncConnectionPool[psycopg.AsyncConnection[dict[str, Any]]]
        async with AsyncConnectionPool(url, min_size=CONNECTIONS, max_size=CONNECTIONS, kwargs=options) as pool:
            compiled = builder.compile(checkpointer=AsyncPostgresSaver(pool))
            yield

    async def message(request: Request) -> Response:
        body = _decoder.decode(await request.body())
        config: RunnableConfig = {"configurable": {"thread_id": body.session_id}}
        state = await compiled.ainvoke({"messages": [HumanMessage(body.message)]}, config, durability=durability)
        return _respond(state["messages"][-1].content, body.session_id)

    return Starlette(routes=[Route("/message", message, methods=["POST"])], lifespan=lifespan)


ROWS: dict[str, Callable[[str], Any]] = {
    "limit": limit,
    "limit-tuned": limit,
    "first": first,
    "rows": rows,
    "saver-exit": lambda url: saver(url, "exit"),
    "saver-async": lambda url: saver(url, "async"),
}


def main() -> None:
    """Serves a row until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    app = ROWS[options.row](os.environ["DATABASE_URL"])
    config = uvicorn.Config(
        app,
        port=options.port,
        http="httptools",
        loop="uvloop",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
    )
    watch_collector()
    if options.row == "limit-tuned":
        tune_collector()
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
