"""Serves the reference: `/openapi.json` for programs, `/docs` for people."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.docs.page import reference_page
from gateway.api.endpoint import Endpoint

HEADERS = {"Cache-Control": "public, max-age=300", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Reference(NamedTuple):
    """The two forms of the reference, and the page's Content-Security-Policy: its own style and script, nothing else."""

    document: bytes
    page: bytes
    policy: str


class ReferenceApi:
    """Serves the reference. It is made when it is first asked for: most pods never are."""

    def __init__(self, describe: Callable[[], dict[str, Any]]) -> None:
        self._describe = describe

    @cached_property
    def _reference(self) -> Reference:
        document = self._describe()
        folder = files("gateway.api.docs")
        style, script = ((folder / name).read_text("utf-8") for name in ("page.css", "page.js"))
        policy = [
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
        return Reference(msgspec.json.encode(document), reference_page(document, style, script).encode(), "; ".join(policy))

    async def document(self, request: Request) -> Response:
        """GET /openapi.json"""
        return Response(self._reference.document, headers=HEADERS, media_type="application/json")

    async def page(self, request: Request) -> Response:
        """GET /docs"""
        headers = {**HEADERS, "Content-Security-Policy": self._reference.policy}
        return Response(self._reference.page, headers=headers, media_type="text/html")

    def endpoints(self) -> Sequence[Endpoint]:
        """The two calls that describe all."""
        return [
            Endpoint(
                "GET",
                "/openapi.json",
                self.document,
                "This reference, for programs",
                {200: "application/json"},
                description="OpenAPI 3.1, made from the types that the gateway itself reads and writes with.",
            ),
            Endpoint(
                "GET",
                "/docs",
                self.page,
                "This reference, for people",
                {200: "text/html"},
                description="A page that loads nothing from elsewhere.",
            ),
        ]


def _digest(text: str) -> str:
    """A source of a Content-Security-Policy (level 3) that allows exactly this text."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
