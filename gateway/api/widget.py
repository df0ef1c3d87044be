"""The browser client's files, as browsers are to keep them.

`/widget.js` has a name that stays, so it is asked for again after five minutes. It names the other modules under a version,
which is the hash of all of them: those are kept for a year. A pod that is asked for another version, as happens while pods
are replaced, sends the browser to its own; modules name each other relative to where they came from, so versions do not mix.
"""

import gzip
import re
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.endpoint import SCRIPT, Endpoint
from gateway.problems import NotFound

ENTRY = "widget.js"
STABLE = "public, max-age=300"
FOREVER = "public, max-age=31536000, immutable"
# Any website may load and run them, also one that isolates itself (COEP).
HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Accept-Encoding",
}


class _File:
    """A module in both encodings, each with its ETag (RFC 9110, section 8.8.3)."""

    def __init__(self, body: bytes, cache: str) -> None:
        self._plain = body
        self._gzip = gzip.compress(body, 9, mtime=0)
        self._tag = sha256(body).hexdigest()[:16]
        self._cache = cache

    def respond(self, request: Request) -> Response:
        zipped = _accepts_gzip(request.headers.get("accept-encoding", ""))
        tag = f'"{self._tag}-gz"' if zipped else f'"{self._tag}"'
        headers = {**HEADERS, "ETag": tag, "Cache-Control": self._cache}
        known = re.findall(r'"[^"]*"|\*', request.headers.get("if-none-match", ""))
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return Response(self._gzip if zipped else self._plain, headers=headers, media_type="text/javascript")


class WidgetApi:
    """Serves the widget; everything is read and compressed once, at the start."""

    def __init__(self) -> None:
        folder = files("gateway") / "widget"
        found = sorted((file.name, file.read_bytes()) for file in folder.iterdir() if file.name.endswith(".js"))
        modules = {name: without_comments(body) for name, body in found}
        self._version = sha256(b"".join(name.encode() + b"\0" + body for name, body in modules.items())).hexdigest()[:16]
        prefix = f"./widget/{self._version}/".encode()
        entry = re.sub(rb"(?<=')\./(?=[\w/-]+\.js')", prefix, modules.pop(ENTRY))
        self._entry = _File(entry, STABLE)
        self._parts = {name: _File(body, FOREVER) for name, body in modules.items()}

    async def entry(self, request: Request) -> Response:
        """GET /widget.js"""
        return self._entry.respond(request)

    async def part(self, request: Request) -> Response:
        """GET /widget/{version}/{file}"""
        version, name = request.path_params["version"], request.path_params["file"]
        part = self._parts.get(name)
        if part is None:
            raise NotFound
        if version == self._version:
            return part.respond(request)
        # Relative, so that it holds behind a proxy that serves the gateway under a path.
        headers = {**HEADERS, "Location": f"../{self._version}/{name}", "Cache-Control": "no-store"}
        return Response(status_code=307, headers=headers)

    def endpoints(self) -> Sequence[Endpoint]:
        """The files that websites load."""
        kept = ("ETag", "Cache-Control")
        return [
            Endpoint(
                "GET",
                "/widget.js",
                self.entry,
                "The chat widget",
                {200: SCRIPT, 304: None},
                headers=("If-None-Match",),
                answer_headers={200: kept, 304: kept},
            ),
            Endpoint(
                "GET",
                "/widget/{version}/{file}",
                self.part,
                "A module of the chat widget, which never changes",
                {200: SCRIPT, 304: None, 307: None},
                (404,),
                headers=("If-None-Match",),
                answer_headers={200: kept, 304: kept, 307: ("Location",)},
            ),
        ]


def without_comments(source: bytes) -> bytes:
    """A module without the comments that stand on lines of their own, which are a third of what would be sent."""
    source = re.sub(rb"^ */\*\*(?:(?!\*/).)*\*/ *\n", b"", source, flags=re.DOTALL | re.MULTILINE)
    return re.sub(rb"^ *// .*\n", b"", source, flags=re.MULTILINE)


def _accepts_gzip(accepted: str) -> bool:
    return re.search(r"(?:^|[,\s])(?:gzip|\*)(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))", accepted.lower()) is not None
