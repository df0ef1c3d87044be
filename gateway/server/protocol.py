"""The limits of a connection, which uvicorn and httptools leave open: how large and how slow a request's head may be, what
follows an answer that came before the whole request, and how long a client may leave an answer unread.

Used by whoever serves a pod: `uvicorn.Config(..., http=http_protocol())`. The limits of bodies are in `api/rendering.py`.

What always holds: a connection whose client does nothing is closed after a time, whatever it did before; what it can make
this process keep is bounded; trailer fields are dropped, so that no proxy's word about a client can be forged in them; a
request's body is its body, whatever other protocol it asks for; who is being answered hears that the client has gone; and
whatever comes in that is not answered by the application is answered by a problem document, if by anything at all.
"""

import asyncio
import logging
import sys
from http import HTTPStatus
from typing import Any, NoReturn

import httptools
import msgspec
from uuid_utils import uuid7
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.problems import HeadTooLarge, HeadTooSlow, InvalidRequest, Problem, UriTooLong, encode_problem, problem_headers

# uvicorn warns of each request that it cannot read: anybody could fill the log.
_logger = logging.getLogger("uvicorn.error.connection")
_logger.setLevel(logging.ERROR)


class ConnectionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a connection may cost."""

    url_bytes: int = 8_192
    head_bytes: int = 16_384
    headers: int = 100
    pipelined: int = 16
    """Requests that wait for the answers before theirs."""
    head_s: float = 10.0
    """From a request's first byte to the end of its head."""
    linger_s: float = 5.0
    """How long the rest of a request is awaited, and dropped, that was answered before it was whole."""
    stall_s: float = 30.0
    """In so much time a client takes at least `stall_bytes` of an answer that waits for it."""
    stall_bytes: int = 16_384


def http_protocol(limits: ConnectionLimits | None = None) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits."""
    return type("BoundedHttpProtocol", (HttpProtocol,), {"limits": limits or ConnectionLimits()})


class JoinedWrites:
    """Where an answer is written: what comes first, its head, goes out with what follows at once, its body, in one packet.
    When nothing follows it goes out by itself, before the loop waits for anything."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: bytes | None = None
        self._begun = False

    def write(self, data: bytes) -> None:
        if not self._begun:
            self._begun, self._held = True, data
            self._loop.call_soon(self.flush)
        elif self._held is not None:
            held, self._held = self._held, None
            self._transport.write(held + data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Writes what is held, if anything."""
        if self._held is not None:
            held, self._held = self._held, None
            if not self._transport.is_closing():
                self._transport.write(held)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, bounded."""

    limits = ConnectionLimits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logger = _logger
        self._in_head = False
        self._in_body = False
        # Bytes of a head, or of what stands between the parts of a body, that came without completing anything.
        self._idle_bytes = 0
        self._refusing: Problem | None = None
        # Nothing that comes is looked at any more.
        self._deaf = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        # The request that is being answered; uvicorn keeps the one that came last.
        self._answered: RequestResponseCycle | None = None
        self._writes: JoinedWrites | None = None
        self._data = b""
        # The request asks for another protocol: its head is to be read again, without that.
        self._reads_again = False

    # ------------------------------------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # As between two requests: uvicorn alone would wait for the first one for ever.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._end_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        self._deaf = True
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            # uvicorn tells the request that came last, which may wait behind this one.
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        self._writes = JoinedWrites(self.transport, self.loop)
        cycle.transport = self._writes  # type: ignore[assignment]  # all of one that a cycle uses
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._idle_bytes += len(data)
        self._data = data
        super().data_received(data)
        if self._deaf:
            return
        if self._in_body:
            # Body bytes reset the count; endless trailers or chunk extensions do not.
            if self._idle_bytes > self.limits.head_bytes:
                self._refuse(HeadTooLarge("too much around the body"))
        elif self._in_head or self._idle:
            if self._idle_bytes > self.limits.head_bytes:
                self._refuse(HeadTooLarge(f"at most {self.limits.head_bytes} bytes"))
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(self.limits.head_s, self._on_slow_head)

    @property
    def _idle(self) -> bool:
        """Whether nothing is being answered."""
        return self.cycle is None or self.cycle.response_complete

    # ------------------------------------------------------------------------------------------ the parser's callbacks

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.url_bytes:
            self._stop_parsing(UriTooLong(f"at most {self.limits.url_bytes} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:
            # A trailer field (RFC 9110, section 6.5.1): uvicorn would add it to the headers.
            return
        if len(self.headers) >= self.limits.headers:
            self._stop_parsing(HeadTooLarge(f"at most {self.limits.headers} header fields"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if sum(len(name) + len(value) for name, value in self.headers) > self.limits.head_bytes:
            self._stop_parsing(HeadTooLarge(f"at most {self.limits.head_bytes} bytes"))
        if len(self.pipeline) >= self.limits.pipelined:
            self._stop_parsing(InvalidRequest(f"at most {self.limits.pipelined} requests before their answers"))
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._stop_parsing(InvalidRequest("no proxy"))
            self._reads_again = True
            return
        super().on_headers_complete()
        self._in_head, self._in_body, self._idle_bytes = False, True, 0

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._reads_again:
            return
        self._in_body, self._idle_bytes = False, 0
        if self._end_timer is not None:
            self._end_timer.cancel()
            self._end_timer = None
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Answers a request that asks for another protocol as if it did not (RFC 9110, section 7.8).

        httptools takes what follows the head of such a request for that protocol: a body would be missing, and a part of it
        that comes later would be read as another request. So the head is read once more, without that field.
        """
        error = sys.exc_info()[1]
        assert isinstance(error, httptools.HttpParserUpgrade)
        rest = self._data[error.args[0] :]
        version = self.parser.get_http_version()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version.encode())]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self._reads_again, self._idle_bytes = False, 0
        if any(b"\n" in value for _, value in self.headers):
            self._refuse(InvalidRequest("a header field of two lines"))
            return
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    # ------------------------------------------------------------------------------------------------------- refusals

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what the parser refuses, in the form of all errors."""
        self._refuse(self._refusing or InvalidRequest())

    def _stop_parsing(self, problem: Problem) -> NoReturn:
        self._refusing = problem
        raise problem

    def _on_slow_head(self) -> None:
        self._head_timer = None
        if self.flow.read_paused:
            # It is this side that does not read on.
            self._head_timer = self.loop.call_later(self.limits.head_s, self._on_slow_head)
        else:
            self._refuse(HeadTooSlow(f"more than {self.limits.head_s:g} s"))

    def _refuse(self, problem: Problem) -> None:
        """Answers what cannot be handed to the application, and hangs up."""
        self._deaf = True
        cycle = self.cycle
        if self.pipeline or not (self._idle or self._in_body):
            # The answers before it come first; `on_response_complete` hangs up then. What waits behind is not begun.
            self.pipeline.clear()
            return
        if self._idle and self._in_body:
            # The rest of a request that has its answer.
            self._hang_up()
            return
        if not self._idle:
            # The request that is being answered is itself the broken one.
            started, cycle.disconnected = cycle.response_started, True
            cycle.message_event.set()
            if started:
                self._hang_up()
                return
        body = encode_problem(problem, str(uuid7()))
        headers = {
            **problem_headers(problem),
            "Content-Type": "application/problem+json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        lines = [f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}"]
        lines += [f"{name.lower()}: {value}" for name, value in headers.items()]
        # Behind what may be held: the word that the body may come.
        (self._writes or self.transport).write("\r\n".join([*lines, "", ""]).encode() + body)
        self._hang_up()

    def _hang_up(self) -> None:
        """Says that nothing more comes, and drops what comes in for a while: a close at once would be a reset to a client
        that is still sending, and could take the answer from it."""
        if self._writes is not None:
            self._writes.flush()
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._end_timer = self.loop.call_later(self.limits.linger_s, self.transport.abort)

    # -------------------------------------------------------------------------------------------------------- answers

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            # Closing waits until the client has read all.
            self._watch_reader()
        elif self._deaf:
            self._hang_up()
        elif self._in_body and self._idle and self._end_timer is None:
            self._end_timer = self.loop.call_later(self.limits.linger_s, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        if self.transport.is_closing():
            self._watch_reader()

    def _watch_reader(self) -> None:
        """Looks again and again whether the client reads, as long as something waits for it."""
        if self._stall_timer is None:
            self._unread_bytes = self.transport.get_write_buffer_size()
            self._stall_timer = self.loop.call_later(self.limits.stall_s, self._on_stall)

    def _on_stall(self) -> None:
        self._stall_timer = None
        unread = self.transport.get_write_buffer_size()
        if unread == 0:
            return
        if self._unread_bytes - unread < min(self.limits.stall_bytes, self._unread_bytes):
            self.transport.abort()
        else:
            self._watch_reader()
