"""Logs: event names with facts as fields; JSON in production, key=value on a terminal.

Never message text, tokens, keys or session ids, which can be secrets of visitors. Of an error only the type and the place
are logged, since its text may quote a visitor. Libraries and the interpreter print such texts: their output goes through
here too and loses it.
"""

import json
import logging
import re
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any, TextIO

import structlog

log = structlog.get_logger()

PLAIN = frozenset(("asyncio", "uvicorn"))
"""Libraries whose messages begin with fixed words: the letters at a message's beginning are logged."""
_WORDS = re.compile(r"[A-Za-z][A-Za-z ',-]*")


def configure_logs(log_format: str, level: str) -> None:
    """Sets up the process's logging: once, before the first event. `log_format` and `level` are the settings' values."""
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.types.Processor = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if text else _as_json
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text),
            without_error_text,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # One system call per line; print makes two.
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[LibraryLogs()])


_encode = json.JSONEncoder(default=repr).encode


def _as_json(logger: Any, method: str, event: structlog.types.EventDict) -> str:
    """The last processor, with one encoder; structlog's own JSONRenderer makes one per line."""
    return _encode(event)


def contain_errors() -> None:
    """Logs uncaught errors and warnings as events, without the text that the interpreter would print.

    Once per process, and only in the gateway's own: it replaces the interpreter's hooks.
    """
    sys.excepthook = _on_crash
    sys.unraisablehook = lambda lost: _tell("error.ignored", lost.exc_value)
    threading.excepthook = lambda lost: _tell("thread.crashed", lost.exc_value)
    warnings.showwarning = _on_warning


def _on_crash(kind: type[BaseException], error: BaseException, stack: TracebackType | None) -> None:
    _tell("process.crashed", error)


def _tell(event: str, error: BaseException | None) -> None:
    log.error(event, **({"error": kinds(error), "frames": frames(error)} if error else {}))


def _on_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # Without its text: Pydantic, for one, quotes the value that it warns of.
    log.warning("python.warning", category=category.__name__, where=f"{filename}:{lineno}")


class LibraryLogs(logging.Handler):
    """Logs libraries' records as `library.logged`: logger, place, type of the error; no text but PLAIN's fixed words."""

    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] = {"logger": record.name, "where": f"{record.pathname}:{record.lineno}"}
        if record.name.partition(".")[0] in PLAIN:
            words = _WORDS.match(str(record.msg))
            facts["message"] = words[0].strip() if words else ""
        if record.exc_info and record.exc_info[1]:
            facts |= {"error": kinds(record.exc_info[1]), "frames": frames(record.exc_info[1])}
        (log.error if record.levelno >= logging.ERROR else log.warning)("library.logged", **facts)


def without_error_text(logger: Any, method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """A processor: `exc_info` becomes the error's type and the place where it was raised."""
    given = event.pop("exc_info", None)
    error = given if isinstance(given, BaseException) else sys.exc_info()[1] if given else None
    if error is not None:
        event.setdefault("error", kinds(error))
        event["frames"] = frames(error)
    return event


def kinds(error: BaseException) -> str:
    """The type of an error and of its causes, the last one first, as `ValueError from KeyError`; without their text."""
    names: list[str] = []
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen and len(names) < 8:
        seen.add(id(at))
        inner = f"({', '.join(kinds(one) for one in at.exceptions[:8])})" if isinstance(at, BaseExceptionGroup) else ""
        names.append(type(at).__name__ + inner)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return " from ".join(names)


def frames(error: BaseException, last: int = 8) -> list[str]:
    """The innermost `last` frames of an error's traceback, as `file:line function`; without its text."""
    stack = traceback.extract_tb(error.__traceback__)[-last:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack]
