"""Serves a pod: uvicorn, signals, drain, the garbage collector."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

from gateway.app import Pod
from gateway.server.protocol import http_protocol

KEEP_ALIVE_S = 75
"""Longer than balancers keep idle connections, so that the balancer closes them: the pod could close one under a request."""


class CannotListen(Exception):
    """The address to serve on cannot be listened on; the message names it."""


class QuietServer(uvicorn.Server):
    """uvicorn, with the signals left to the command that runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def tune_collector() -> None:
    """Tells the garbage collector what a pod is like, once all modules and graphs are loaded.

    Modules and graphs stay for good: frozen, they no longer cost each full collection a tenth of a second. A turn leaves few
    cycles, so collections can be rare. `scripts/bench flood` shows both in its p99.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


async def end_leftovers() -> None:
    """Ends tasks and threads that graphs have left behind: a node that swallows its cancellation or blocks a thread must not
    keep the process alive. Everything that ends in order has ended before."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    threads = asyncio.create_task(asyncio.get_running_loop().shutdown_default_executor())
    _, stuck = await asyncio.wait({*left, threads}, timeout=1)
    if stuck:
        sys.stderr.flush()
        os._exit(0)


async def serve_pod(pod: Pod) -> None:
    """Serves a pod until SIGTERM or SIGINT. Raises CannotListen when it cannot listen.

    SIGTERM begins a notice period: the pod is no longer ready and still answers everything, until the balancer has noticed.
    SIGINT, or a second signal, ends it at once. Then the pod stops accepting and drains.
    """
    settings = pod.settings
    config = uvicorn.Config(
        pod.app,
        host=settings.host,
        port=settings.port,
        http=http_protocol(),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        # Proxy headers are judged by api/middleware/client_address.py, which lets nothing through that is no address.
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_s) + 2,
    )
    server = QuietServer(config)
    leaving: list[asyncio.Task[None]] = []
    notice_over = asyncio.Event()

    async def leave() -> None:
        pod.announce_drain()
        # Connections that are kept alive would lead back here, past every balancer.
        config.encoded_headers.append((b"connection", b"close"))
        with suppress(TimeoutError):
            await asyncio.wait_for(notice_over.wait(), settings.drain_notice_s)
        server.should_exit = True
        await pod.drain()

    def on_sigterm() -> None:
        if leaving:
            notice_over.set()
        else:
            leaving.append(asyncio.create_task(leave()))

    def on_sigint() -> None:
        notice_over.set()
        on_sigterm()

    on_signals(on_sigterm, signal.SIGTERM)
    on_signals(on_sigint, signal.SIGINT)
    try:
        await server.serve()
    except SystemExit as error:
        # uvicorn logs why and exits; the usual reason is the port.
        raise CannotListen(f"cannot listen on {settings.host}:{settings.port}") from error


def on_signals(stop: Callable[[], None], *numbers: signal.Signals) -> None:
    """Calls `stop` on these signals; without any named, on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in numbers or (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
