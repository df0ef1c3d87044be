"""What is logged of errors: their types and places, in whichever way they come to the log."""

import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from gateway.logs import LibraryLogs, configure_logs, contain_errors, frames, kinds

SECRET = "the words of a visitor"
Said = Callable[[], str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Said]:
    """What a process of its own would have written; this one's logging and hooks are as before afterwards."""
    known, root, handlers = structlog.get_config(), logging.getLogger(), logging.getLogger().handlers[:]
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook"), (warnings, "showwarning")):
        monkeypatch.setattr(module, name, getattr(module, name))
    yield lambda: capsys.readouterr().err
    root.handlers = handlers
    structlog.configure(**known)


def configure(log_format: str) -> None:
    """As a process of its own does at its start; but no logger is kept, for others come after this test."""
    logging.getLogger().handlers = []
    configure_logs(log_format, "info")
    structlog.configure(cache_logger_on_first_use=False)
    contain_errors()


def an_error() -> BaseException:
    """One with all that an error can carry."""
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            error.add_note(SECRET)
            raise ExceptionGroup(SECRET, [ValueError(SECRET), OSError(SECRET)]) from error
    except ExceptionGroup as group:
        return group


def by_structlog(error: BaseException) -> None:
    structlog.get_logger().error("event", exc_info=error)


def in_a_handler(error: BaseException) -> None:
    try:
        raise error
    except BaseException:
        structlog.get_logger().exception("event")


def by_a_library(error: BaseException) -> None:
    logging.getLogger("library").error("could not %s", SECRET, exc_info=error)


def by_a_library_with_plain_words(error: BaseException) -> None:
    logging.getLogger("uvicorn.error").error(f"Something happened ({SECRET})\n{SECRET}", exc_info=error)


def by_nobody(error: BaseException) -> None:
    sys.excepthook(type(error), error, error.__traceback__)


def while_collecting_garbage(error: BaseException) -> None:
    lost: Any = SimpleNamespace(exc_value=error, exc_type=type(error), exc_traceback=None, err_msg=SECRET, object=SECRET)
    sys.unraisablehook(lost)


def in_a_thread(error: BaseException) -> None:
    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail, name=SECRET)
    thread.start()
    thread.join()


WAYS = (
    by_structlog,
    in_a_handler,
    by_a_library,
    by_a_library_with_plain_words,
    by_nobody,
    while_collecting_garbage,
    in_a_thread,
)


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_error_is_told_without_its_text(said: Said, way: Callable[[BaseException], None], log_format: str) -> None:
    configure(log_format)
    way(an_error())
    written = said()
    assert SECRET not in written
    assert written.count("\n") == 1, "one event, one line"
    assert "ExceptionGroup(ValueError, OSError) from KeyError" in written
    assert "an_error" in written, "where it was raised"


def test_a_warning_is_told_by_its_kind_and_place(said: Said) -> None:
    configure("json")
    warnings.showwarning(UserWarning(SECRET), UserWarning, "graph.py", 7)
    told = json.loads(said())
    assert (told["event"], told["category"], told["where"]) == ("python.warning", "UserWarning", "graph.py:7")


def test_of_a_library_only_the_name_is_told_and_of_some_the_words_that_are_their_own(said: Said) -> None:
    configure("json")
    for name, message in (
        ("library", SECRET),
        ("uvicorn.error", "Invalid HTTP request received."),
        ("asyncio", f"<{SECRET}>"),
    ):
        LibraryLogs().emit(logging.LogRecord(name, logging.WARNING, "file.py", 3, message, (), None))
    told = [json.loads(line) for line in said().splitlines()]
    assert [(line["logger"], line.get("message")) for line in told] == [
        ("library", None),
        ("uvicorn.error", "Invalid HTTP request received"),
        ("asyncio", ""),
    ]


def test_causes_that_go_round_in_a_circle_end() -> None:
    one, other = ValueError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    assert kinds(one) == "ValueError from KeyError"
    assert frames(one) == []
