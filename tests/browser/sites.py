"""Websites that embed the chat: pages of any host name under .test, served from one port of the loopback."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from html import escape

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from gateway.dev.servers.ports import HOST, free_port
from gateway.server.serve import QuietServer
from tests.support.serving import wait_for

TEXT = "<main><h1>A shop</h1><p>Things to buy, and a line of text.</p><button>Put it into the basket</button></main>"


def tag(gateway: str, **data: str) -> str:
    """The line with which a site embeds the chat; options in snake case become its `data-` attributes."""
    attributes = {"agent": "shop", **data}
    written = " ".join(f'data-{name.replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return f'<script type="module" src="{gateway}/widget.js" {written}></script>'


def document(body: str, *, head: str = "", language: str = 'lang="en"') -> str:
    """A whole page around a body."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f"<!doctype html><html {language}><head><meta charset=utf-8>{viewport}<title>A shop</title>"
        f'<link rel="icon" href="data:,">{head}</head><body>{body}</body></html>'
    )


class Sites:
    """The pages, and what was asked for: `asked` has (host, path) of each request."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pages: dict[tuple[str, str], tuple[str, Mapping[str, str]]] = {}
        self.asked: list[tuple[str, str]] = []

    def put(self, html: str, *, host: str = "shop.test", path: str = "/", headers: Mapping[str, str] | None = None) -> str:
        """Puts a page on a host; its address."""
        self._pages[host, path] = (html, headers or {})
        return f"{self.origin(host)}{path}"

    def origin(self, host: str) -> str:
        return f"http://{host}:{self._port}"

    async def show(self, request: Request) -> Response:
        where = (request.url.hostname or "", request.url.path)
        self.asked.append(where)
        if where not in self._pages:
            return Response(status_code=404)
        html, headers = self._pages[where]
        return HTMLResponse(html, headers=dict(headers))


@asynccontextmanager
async def serve_sites() -> AsyncIterator[Sites]:
    """The sites, served while the context lasts."""
    port = free_port()
    sites = Sites(port)
    app = Starlette(routes=[Route("/{path:path}", sites.show)])
    server = QuietServer(uvicorn.Config(app, host=HOST, port=port, log_config=None, ws="none"))
    task = asyncio.create_task(server.serve())
    await wait_for(lambda: server.started or task.done(), "the sites are served")
    try:
        yield sites
    finally:
        server.should_exit = True
        await task
