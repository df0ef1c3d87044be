"""Serves the files of `gateway/widget`: how browsers cache them.

`/widget.js`, the public entry, keeps its name, so browsers ask for it again after five minutes. All other modules are served
below `/widget/<version>/`, in their folders, and kept for a year; the version is the hash of all of them. Modules name each
other by relative paths, so one version never loads parts of another; the entry alone stands outside that folder, and there
`'./` at the beginning of a path becomes `'./widget/<version>/`. A pod that is asked for another version, as happens while
pods are replaced, redirects to its own.
"""

import gzip
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from gateway.api.endpoint import SCRIPT, Endpoint
from gateway.problems import NotFound

ENTRY = "widget.js"
VENDOR = "vendor/"
STABLE = "public, max-age=300"
FOREVER = "public, max-age=31536000, immutable"
# Any website may load and run them, also one that isolates itself (COEP): browsers fetch modules by CORS alone.
HEADERS = {
    "Access-Control-Allow-Origin": "*",
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
        headers["Content-Type"] = "text/javascript"
        if zipped:
            headers["Content-Encoding"] = "gzip"
        return Response(self._gzip if zipped else self._plain, headers=headers)


class WidgetApi:
    """Everything is read and compressed once, at the start."""

    def __init__(self) -> None:
        found = sorted(_modules(files("gateway") / "widget"))
        modules = {path: body if path.startswith(VENDOR) else stripped(body) for path, body in found}
        self._version = sha256(b"".join(path.encode() + b"\0" + body for path, body in modules.items())).hexdigest()[:16]
        entry = modules.pop(ENTRY).replace(b"'./", f"'./widget/{self._version}/".encode())
        self._entry = _File(entry, STABLE)
        self._parts = {path: _File(body, FOREVER) for path, body in modules.items()}

    async def entry(self, request: Request) -> Response:
        """GET /widget.js"""
        return self._entry.respond(request)

    async def part(self, request: Request) -> Response:
        """GET /widget/{version}/{file} and /widget/{version}/{folder}/{file}"""
        version, folder, name = (request.path_params.get(one, "") for one in ("version", "folder", "file"))
        path = f"{folder}/{name}" if folder else name
        part = self._parts.get(path)
        if part is None:
            raise NotFound
        if version == self._version:
            return part.respond(request)
        # Relative, so that it holds behind a proxy that serves the gateway under a path.
        up = "../../" if folder else "../"
        headers = {**HEADERS, "Location": f"{up}{self._version}/{path}", "Cache-Control": "no-store"}
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
            Endpoint(
                "GET",
                "/widget/{version}/{folder}/{file}",
                self.part,
                "A module of the chat widget in a folder, such as a language; it never changes",
                {200: SCRIPT, 304: None, 307: None},
                (404,),
                headers=("If-None-Match",),
                answer_headers={200: kept, 304: kept, 307: ("Location",)},
            ),
        ]


def _modules(folder: Traversable, path: str = "") -> Iterator[tuple[str, bytes]]:
    """The modules below a folder: path and text."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _modules(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(".js"):
            yield path + entry.name, entry.read_bytes()


def stripped(source: bytes) -> bytes:
    """A module without blank lines, indentation, and comments that have lines of their own.

    Nothing of the language is parsed, so modules keep two rules: a line that begins with `//` or `/**` is a comment, and a
    template literal of several lines is a style sheet.
    """
    lines = list[bytes]()
    inside = False
    for line in map(bytes.strip, source.splitlines()):
        if inside or not line or line.startswith(b"//"):
            inside = inside and not line.endswith(b"*/")
        elif line.startswith(b"/**") and (line.endswith(b"*/") or b"*/" not in line):
            inside = not line.endswith(b"*/")
        else:
            lines.append(line)
    return b"\n".join(lines) + b"\n"


def _accepts_gzip(accepted: str) -> bool:
    return re.search(r"(?:^|[,\s])(?:gzip|\*)(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))", accepted.lower()) is not None
