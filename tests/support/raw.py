"""HTTP as bytes on a socket: for what a proper client would never send."""

import asyncio
import json
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit


class RawAnswer:
    """An answer as it came: status, headers in lower case, body."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The code of a problem document."""
        if self.headers.get("content-type") != "application/problem+json":
            return None
        return str(self.json()["code"])


class RawConnection:
    """A connection that says what it is told to."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._address = (parts.hostname, parts.port)
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        self.reader, self._writer = await asyncio.open_connection(*self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    async def send(self, raw: bytes) -> None:
        """Sends bytes; what the other side does not want any more is dropped."""
        assert self._writer is not None
        with suppress(ConnectionError):
            self._writer.write(raw)
            await self._writer.drain()

    async def answer(self, limit_s: float = 30, *, bodyless: bool = False) -> RawAnswer | None:
        """The next answer, or None when the connection ended without one; `bodyless` when it was HEAD that was asked."""
        async with asyncio.timeout(limit_s):
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            lines = head.decode("latin-1").split("\r\n")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
            }
            status = int(lines[0].split(" ")[1])
            if status in (204, 304) or status < 200:
                body = b""
            elif headers.get("transfer-encoding") == "chunked":
                body = await self._chunks()
            else:
                body = await self.reader.readexactly(0 if bodyless else int(headers["content-length"]))
            return RawAnswer(status, headers, body)

    async def _chunks(self) -> bytes:
        body = b""
        while True:
            size = int(await self.reader.readline(), 16)
            body += (await self.reader.readexactly(size + 2))[:-2]
            if size == 0:
                return body

    async def ended(self, limit_s: float = 30) -> bool:
        """Whether the other side ends the connection in this time; what it still says is dropped."""
        try:
            async with asyncio.timeout(limit_s):
                while await self.reader.read(65_536):
                    pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True


def request(path: str, body: bytes | None = b"", *, method: str = "POST", headers: dict[str, str] | None = None) -> bytes:
    """A request as bytes: JSON unless the headers say otherwise, with a Content-Length unless the body is None."""
    fields = {"Host": "gateway.example", "Content-Type": "application/json", **(headers or {})}
    if body is not None:
        fields.setdefault("Content-Length", str(len(body)))
    lines = [f"{method} {path} HTTP/1.1", *[f"{name}: {value}" for name, value in fields.items()], "", ""]
    return "\r\n".join(lines).encode("latin-1") + (body or b"")


async def ask(url: str, raw: bytes) -> RawAnswer | None:
    """Sends bytes on a connection of their own; the answer, or None when there is none."""
    async with RawConnection(url) as connection:
        await connection.send(raw)
        return await connection.answer()
