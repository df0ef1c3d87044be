"""Serves the reference: `/openapi.json` for programs, `/docs` for people."""

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.docs.page import reference_page
from gateway.api.endpoint import Endpoint

HEADERS = {"Cache-Control": "public, max-age=300", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class ReferenceApi:
    """Serves what `publish` was given. The document describes these two calls too, so it is made after them."""

    def __init__(self) -> None:
        self._document = b""
        self._page = b""
        self._policy = ""

    def publish(self, document: dict[str, Any]) -> None:
        """Sets the document, and makes the page of it. The page may use its own style and script and load nothing."""
        folder = files("gateway.api.docs")
        style, script = ((folder / name).read_text("utf-8") for name in ("page.css", "page.js"))
        self._document = msgspec.json.encode(document)
        self._page = reference_page(document, style, script).encode()
        self._policy = "; ".join(
            [
                "default-src 'none'",
                f"style-src '{_digest(style)}'",
                f"script-src '{_digest(script)}'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
            ]
        )

    async def document(self, request: Request) -> Response:
        """GET /openapi.json"""
        return Response(self._document, headers=HEADERS, media_type="application/json")

    async def page(self, request: Request) -> Response:
        """GET /docs"""
        headers = {**HEADERS, "Content-Security-Policy": self._policy}
        return Response(self._page, headers=headers, media_type="text/html")

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
