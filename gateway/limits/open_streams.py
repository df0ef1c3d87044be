"""The streams that are open on this pod, by session and by client address, and how many may be."""

from collections import Counter
from collections.abc import Callable
from typing import Self

from gateway.limits.buckets import network
from gateway.limits.refusals import Refusals
from gateway.problems import TooManyStreams


class OpenStreams:
    """The streams that are open on this pod, by session and by client address. A stream lives on one pod."""

    def __init__(self, refusals: Refusals, *, per_session: int, per_address: int) -> None:
        self._refusals = refusals
        self._per_session = per_session
        self._per_address = per_address
        self._open: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """Open streams by `address:<network>` and `session:<session_id>`."""
        return dict(self._open)

    def enter(self, ip_address: str) -> "OpenStream":
        """Counts a stream that is about to be opened. Raises TooManyStreams."""
        stream = OpenStream(self)
        if self._refusals.mode != "off":
            key = f"address:{network(ip_address)}"
            self._require(key, self._per_address, "streams_address", "too many open streams from this address")
            self._add(stream, key)
        return stream

    def check(self, session_id: str) -> None:
        """Refuses a stream of a session that has too many, before anything is done for it. Raises TooManyStreams."""
        if self._refusals.mode != "off":
            detail = "too many open streams of this session"
            self._require(f"session:{session_id}", self._per_session, "streams_session", detail)

    def join(self, stream: "OpenStream", session_id: str) -> None:
        """Counts a stream to its session as well, once it is known that it may read it."""
        if self._refusals.mode != "off":
            self._add(stream, f"session:{session_id}")

    def _require(self, key: str, most: int, name: str, detail: str) -> None:
        if self._open[key] >= most:
            self._refusals.refuse(name, TooManyStreams(detail, retry_after_s=5))

    def _add(self, stream: "OpenStream", key: str) -> None:
        self._open[key] += 1
        stream.keys.append(key)

    def leave(self, stream: "OpenStream") -> None:
        """Counts a stream no more."""
        for key in stream.keys:
            self._open[key] -= 1
            if self._open[key] <= 0:
                del self._open[key]
        stream.keys.clear()


class OpenStream:
    """One stream that is counted: until the end of the with block, unless it has been handed over."""

    def __init__(self, streams: OpenStreams) -> None:
        self.keys: list[str] = []
        self._kept = True
        self._streams = streams

    def check(self, session_id: str) -> None:
        """Raises TooManyStreams."""
        self._streams.check(session_id)

    def join(self, session_id: str) -> None:
        """Counts it to a session that it may read."""
        self._streams.join(self, session_id)

    def leave(self) -> None:
        """Ends it. Repeating it is harmless."""
        self._streams.leave(self)

    def hand_over(self) -> Callable[[], None]:
        """Leaves it to the answer to end it, by what is returned."""
        self._kept = False
        return self.leave

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            self.leave()
