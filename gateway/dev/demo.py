"""The demo page of the development server: a shop with the chat in it, and what the stores hold of its session."""

from importlib.resources import files
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api.answers import answer
from gateway.app import Stores
from persistence.errors import PostgresUnavailable


def demo_routes(stores: Stores) -> list[Route]:
    """The routes that only the development server has."""
    return [Route("/", _demo_page), Route("/dev/session", Inspector(stores).show)]


async def _demo_page(request: Request) -> Response:
    return Response((files("gateway") / "dev" / "demo.html").read_bytes(), media_type="text/html")


class Inspector:
    """The stored side of one session, for the demo page: its hash, TTL and rows, and the length of the outbox."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    async def show(self, request: Request) -> Response:
        """GET /dev/session"""
        stores, session_id = self._stores, request.query_params.get("session_id", "")
        key = stores.keys.session(session_id)
        began = time()
        found: list[bytes] = await stores.scripts.command("HGETALL", key)
        ttl_s = await stores.scripts.command("TTL", key)
        redis_ms = round((time() - began) * 1000, 2)
        backlog = await stores.outbox.backlog(int(time() * 1000))
        rows: list[dict[str, Any]] | None = []
        try:
            stored = await stores.postgres.find_session(session_id)
            if stored:
                messages = await stores.postgres.load_messages(stored.id, 2**31 - 1, 50)
                rows = [
                    {"role": one.role, "content": one.content, "seq": one.seq, "created_at": one.created_at}
                    for one in messages
                ]
        except PostgresUnavailable:
            rows = None
        pairs = zip(found[::2], found[1::2], strict=True)
        return answer(
            {
                "key": key,
                "ttl_s": ttl_s if ttl_s >= 0 else None,
                "hash": {name.decode(): value.decode(errors="replace") for name, value in sorted(pairs)},
                "outbox": backlog.records,
                "rows": rows,
                "redis_ms": redis_ms,
            }
        )
