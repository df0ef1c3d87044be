"""Server-Sent Events as a strict client sees them: a parser, and streams whose connection the test can cut anywhere."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import httpx

from gateway.streams.events import TERMINAL, TextDelta

WAIT_S = 25.0


class Event(NamedTuple):
    """One event; `epoch` and `n` are the parts of its id."""

    id: str
    kind: str
    data: Any

    @property
    def epoch(self) -> int:
        return int(self.id.partition("-")[0])

    @property
    def n(self) -> int:
        return int(self.id.partition("-")[2])


class SseParser:
    """Bytes in, events out (WHATWG HTML, section 9.2.6). Stricter than a browser: every event has one id, one type and
    one line of JSON, and nothing but comments is between events. What has no empty line behind it is never an event."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[str, str] = {}
        self.comments = 0

    def feed(self, data: bytes) -> list[Event]:
        """The events that are complete with these bytes. Raises ValueError on what the gateway should never send."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for raw in lines:
            line = raw.decode()
            if "\r" in line:
                raise ValueError(f"carriage return in {line!r}")
            if line == "":
                if self._fields:
                    events.append(self._event())
            elif line.startswith(":"):
                if self._fields:
                    raise ValueError("a comment inside of an event")
                self.comments += 1
            else:
                name, separator, value = line.partition(": ")
                if not separator or name not in ("id", "event", "data") or name in self._fields:
                    raise ValueError(f"unexpected line {line!r} after {self._fields}")
                self._fields[name] = value
        return events

    def _event(self) -> Event:
        fields, self._fields = self._fields, {}
        if fields.keys() != {"id", "event", "data"}:
            raise ValueError(f"an event with {sorted(fields)}")
        event = Event(fields["id"], fields["event"], json.loads(fields["data"]))
        if event.epoch < 0 or event.n < 0 or not isinstance(event.data, dict):
            raise ValueError(f"{event} is not one of the gateway's")
        return event


class Stream:
    """An open event stream: `events` so far, `size` bytes so far. It is cut after `cut_after` bytes."""

    def __init__(self, response: httpx.Response, cut_after: int | None) -> None:
        self.response = response
        self.events: list[Event] = []
        self.size = 0
        self._parser = SseParser()
        self._chunks = response.aiter_raw()
        self._unread: list[Event] = []
        self._left = cut_after

    @property
    def comments(self) -> int:
        return self._parser.comments

    @property
    def cursor(self) -> str:
        """The Last-Event-ID that a browser would send."""
        return self.events[-1].id

    async def next(self) -> Event | None:
        """The next event, None at the end or the cut. Raises TimeoutError rather than wait for ever."""
        async with asyncio.timeout(WAIT_S):
            while not self._unread:
                if not await self.read_chunk():
                    return None
        event = self._unread.pop(0)
        self.events.append(event)
        return event

    async def read_chunk(self) -> bool:
        """Reads what comes next, an event or not; False at the end or the cut."""
        if self._left == 0:
            return False
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            return False
        if self._left is not None:
            chunk = chunk[: self._left]
            self._left -= len(chunk)
        self.size += len(chunk)
        self._unread += self._parser.feed(chunk)
        return True

    async def take(self, count: int) -> list[Event]:
        """The next events, that many unless the stream ends before."""
        taken: list[Event] = []
        while len(taken) < count and (event := await self.next()):
            taken.append(event)
        return taken

    async def until(self, kind: str) -> Event:
        """Reads to the next event of a kind; that event."""
        while event := await self.next():
            if event.kind == kind:
                return event
        raise AssertionError(f"the stream ended before {kind}: {self.events}")

    async def rest(self) -> list[Event]:
        """All that comes up to the end or the cut; a connection that breaks is an end."""
        taken: list[Event] = []
        with suppress(httpx.TransportError):
            while event := await self.next():
                taken.append(event)
        return taken


@asynccontextmanager
async def open_stream(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    *,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    cursor: str | None = None,
    cut_after: int | None = None,
    **parameters: str,
) -> AsyncIterator[Stream]:
    """An event stream, closed at the end of the block wherever it is then. The answer must be one."""
    sent = {**(headers or {}), **({} if cursor is None else {"Last-Event-ID": cursor})}
    async with client.stream(method, path, json=body, headers=sent, params=parameters or None) as response:
        if response.status_code != 200:
            await response.aread()
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Stream(response, cut_after)


def speak(client: httpx.AsyncClient, session_id: str, message: str, **options: Any) -> Any:
    """POST …/stream to the agent `shop`; fields of the body are options too."""
    kept = {name: options.pop(name) for name in ("headers", "cut_after") if name in options}
    agent = options.pop("agent", "shop")
    body = {"message": message, "session_id": session_id, **options}
    return open_stream(client, "POST", f"/api/chat/{agent}/stream", body=body, **kept)


def resume(client: httpx.AsyncClient, session_id: str, turn_id: str, cursor: str | None = None, **options: Any) -> Any:
    """GET …/turns/{turn_id}/stream of the agent `shop`."""
    agent = options.pop("agent", "shop")
    path = f"/api/chat/{agent}/turns/{turn_id}/stream"
    return open_stream(client, "GET", path, cursor=cursor, session_id=session_id, **options)


def watch(client: httpx.AsyncClient, session_id: str, cursor: str | None = None, **options: Any) -> Any:
    """GET /api/sessions/{session_id}/events."""
    return open_stream(client, "GET", f"/api/sessions/{session_id}/events", cursor=cursor, **options)


def text_of(events: Sequence[Event]) -> str:
    """The deltas put together."""
    return "".join(event.data["text"] for event in events if event.kind == TextDelta.kind)


def kinds(events: Sequence[Event]) -> list[str]:
    return [event.kind for event in events]


def check_whole(events: Sequence[Event], first: int = 1) -> None:
    """Checks what holds for every stream of a turn: one epoch, numbers without a gap, one terminal event at the end."""
    assert events, "no events"
    assert len({event.epoch for event in events}) == 1, events
    assert [event.n for event in events] == list(range(first, first + len(events))), events
    assert [event.kind for event in events if event.kind in TERMINAL] == [events[-1].kind], events
