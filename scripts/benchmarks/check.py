"""Whether a row does the work that it is measured for: the right answer, and two more messages stored."""

import asyncio
import json
from time import monotonic
from typing import Any
from urllib.request import urlopen

import asyncpg
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver

from scripts.benchmarks.graphs.canned import ANSWER
from scripts.benchmarks.load import Plan
from scripts.benchmarks.measure import GATEWAY, STATELESS, Serving, call
from scripts.benchmarks.seed import session_id

STORED = {
    "message": "SELECT message_count FROM agent_sessions WHERE session_id = $1",
    "first": "SELECT jsonb_array_length(conversation_history) FROM first_sessions WHERE session_id = $1",
    "rows": "SELECT count(*) FROM rows_messages WHERE session_id = $1",
}
STORED |= dict.fromkeys(GATEWAY, STORED["message"])
ARRIVES_S = 10


async def check(serving: Serving, plan: Plan, history: int) -> None:
    """Has a row answer a message of the first session; RuntimeError when it is not what the graph says, or not stored."""
    headers = {**plan.headers, **({"Authorization": f"Bearer {plan.tokens[0]}"} if plan.tokens else {})}
    url = serving.url + plan.paths[0]
    answer = (await asyncio.to_thread(call, url, json.loads(plan.bodies[0]), headers)).decode()
    if ANSWER not in answer:
        raise RuntimeError(f"{serving.row} answered {answer[:300]}")
    if serving.row in STATELESS:
        return
    # The gateway's worker brings it to Postgres a moment later; the others have committed before they answer.
    deadline = monotonic() + (ARRIVES_S if serving.row in GATEWAY else 0)
    while (stored := await _stored(serving, url)) != history + 2:
        if monotonic() > deadline:
            raise RuntimeError(f"{serving.row}: {stored} messages are stored, and not {history} + 2")
        await asyncio.sleep(0.1)


async def _stored(serving: Serving, url: str) -> int:
    if serving.row == "langgraph-dev":
        return await asyncio.to_thread(_in_thread, url.removesuffix("/runs/wait") + "/state")
    if serving.row.startswith("saver"):
        async with AsyncPostgresSaver.from_conn_string(serving.servers.postgres.url) as saver:
            kept = await saver.aget_tuple({"configurable": {"thread_id": session_id(0)}})
            return len(kept.checkpoint["channel_values"]["messages"]) if kept else 0
    connection = await asyncpg.connect(serving.servers.postgres.url)
    try:
        return int(await connection.fetchval(STORED[serving.row], session_id(0)) or 0)
    finally:
        await connection.close()


def _in_thread(url: str) -> int:
    with urlopen(url, timeout=60) as response:  # noqa: S310  # an address of this machine
        state: Any = json.loads(response.read())
    return len(state["values"]["messages"])
