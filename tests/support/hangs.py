"""A test that outlives its time limit by far: its process ends, and pytest-xdist goes on in a new one.

pytest-timeout raises in the main thread. An event loop may catch that in a callback of its own, or the test may catch it:
it would then hang for ever, with all that come after it.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

GRACE_S = 60.0
"""How much longer than its limit a test may take, its fixtures' ends included."""


def limit_s(item: pytest.Item) -> float:
    """The time limit of a test: its mark's or that of all."""
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0] if mark and mark.args else item.config.getini("timeout") or 0)


def children(process_id: int) -> list[int]:
    """The processes that a process has started, on Linux."""
    found = []
    for file in Path(f"/proc/{process_id}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [*children(child), child]
    return found


def end_process() -> None:
    """Shows where each thread is, and ends this process with all that it has started: no fixture will do so."""
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    for child in children(os.getpid()):
        os.kill(child, signal.SIGKILL)
    os._exit(1)


class HangGuard:
    """A timer for each test, from before its set-up to after its tear-down."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        timer = threading.Timer(limit_s(item) + self._grace_s, end_process)
        timer.daemon = True
        timer.start()
        try:
            return (yield)
        finally:
            timer.cancel()
