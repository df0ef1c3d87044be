"""Connection limits, which uvicorn and httptools leave open: size and duration of a request's head, the rest of a request
that was answered early, and the time in which a client has to read its answer. All knowledge of uvicorn's insides is here.

`uvicorn.Config(..., http=http_protocol())` uses it. The limits of bodies are in `api/reading.py`.

What always holds: an idle connection is closed after a time, in whatever state it is; its memory is bounded; trailer fields
are dropped, so that they cannot forge a proxy's headers; a request's body stays its body, whatever protocol it asks to
upgrade to; the application learns of every disconnect; and all that is refused here is refused by a problem document.
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

# uvicorn logs a warning for each unreadable request: any client could fill the log.
_logger = logging.getLogger("uvicorn.error.connection")
_logger.setLevel(logging.ERROR)


class ConnectionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one connection; sizes in bytes, times in seconds."""

    url_bytes: int = 8_192
    head_bytes: int = 16_384
    headers: int = 100
    pipelined: int = 16
    """Requests that may wait for the answers to earlier ones."""
    head_s: float = 10.0
    """From a request's first byte to the end of its head."""
    linger_s: float = 5.0
    """For how long the rest of a request that was answered early is read and dropped."""
    stall_s: float = 30.0
    """Within this time a client has to read `stall_bytes` of a waiting answer."""
    stall_bytes: int = 16_384


def http_protocol(limits: ConnectionLimits | None = None) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits."""
    return type("BoundedHttpProtocol", (HttpProtocol,), {"limits": limits or ConnectionLimits()})


class JoinedWrites:
    """The transport of one answer: joins head and body into one packet when the body follows at once. A head on its own is
    written before the loop next waits."""

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
        # Bytes received since the parser last made progress.
        self._idle_bytes = 0
        self._refusing: Problem | None = None
        # Further bytes are dropped unread.
        self._deaf = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        # The request being answered; uvicorn keeps the newest one.
        self._answered: RequestResponseCycle | None = None
        self._writes: JoinedWrites | None = None
        self._data = b""
        # The request asks for an upgrade: its head is parsed again without that field.
        self._reads_again = False

    # ------------------------------------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn sets the keep-alive timer only between requests, and would wait for the first one for ever.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._end_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()
        self._deaf = True
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            # uvicorn tells only the newest request, which may still wait behind this one.
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        self._writes = JoinedWrites(self.transport, self.loop)
        cycle.transport = self._writes  # type: ignore[assignment]  # has all that a cycle uses
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
        """Whether no request is being answered."""
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
        """Ignores a request's wish for another protocol (RFC 9110, section 7.8).

        httptools takes the bytes behind such a head for the other protocol: the body would be lost, and the rest of it would
        be parsed as the next request. So the head is parsed once more without the field.
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
        """Replaces uvicorn's plain answer to an unreadable request by a problem document."""
        self._refuse(self._refusing or InvalidRequest())

    def _stop_parsing(self, problem: Problem) -> NoReturn:
        self._refusing = problem
        raise problem

    def _on_slow_head(self) -> None:
        self._head_timer = None
        if self.flow.read_paused:
            # This side has paused reading: the client is not slow.
            self._head_timer = self.loop.call_later(self.limits.head_s, self._on_slow_head)
        else:
            self._refuse(HeadTooSlow(f"more than {self.limits.head_s:g} s"))

    def _refuse(self, problem: Problem) -> None:
        """Answers a request that cannot be handed to the application, and hangs up."""
        self._deaf = True
        cycle = self.cycle
        if self.pipeline or not (self._idle or self._in_body):
            # Earlier answers come first; `on_response_complete` hangs up behind them. Later requests are not begun.
            self.pipeline.clear()
            return
        if self._idle and self._in_body:
            # The rest of an answered request.
            self._hang_up()
            return
        if not self._idle:
            # The broken request is the one being answered.
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
        # Through the held writes: an interim `100 Continue` may still be among them.
        (self._writes or self.transport).write("\r\n".join([*lines, "", ""]).encode() + body)
        self._hang_up()

    def _hang_up(self) -> None:
        """Half-closes the connection and drops input for a while: an immediate close would reset a client that is still
        sending, which may then never see the answer."""
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
            # The transport closes once the client has read all of it.
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
        """Checks at intervals, while output is buffered, that the client still reads."""
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
