"""Logs: event names with facts as fields; JSON in production, key=value on a terminal.

Never message text, tokens, keys, or session ids, which can be their visitors' secrets. An error is told by its type and by
where it was raised: its text may quote what a visitor wrote, and libraries log it. So whatever libraries and the
interpreter itself would print goes through here too, and loses it.
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
"""Libraries whose messages begin with words of their own: these are shown as far as they can be nothing else."""
_WORDS = re.compile(r"[A-Za-z][A-Za-z ',-]*")


def configure_logs(log_format: str, level: str) -> None:
    """Sets the process's logging up, once, before anything logs."""
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
        # Writes a line at once, where print takes two calls of the system.
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[LibraryLogs()])


_encode = json.JSONEncoder(default=repr).encode


def _as_json(logger: Any, method: str, event: structlog.types.EventDict) -> str:
    """The last processor. structlog's own makes an encoder for each line."""
    return _encode(event)


def contain_errors() -> None:
    """Has the interpreter tell what nobody caught, and warnings, as events: its own way shows their text. For a process
    that is the gateway alone, once."""
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
    # Pydantic, for one, quotes the value that it warns of.
    log.warning("python.warning", category=category.__name__, where=f"{filename}:{lineno}")


class LibraryLogs(logging.Handler):
    """Hands what libraries log on as events: who logged it and where, the type of the error, no text but PLAIN's."""

    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] = {"logger": record.name, "where": f"{record.pathname}:{record.lineno}"}
        if record.name.partition(".")[0] in PLAIN:
            words = _WORDS.match(str(record.msg))
            facts["message"] = words[0].strip() if words else ""
        if record.exc_info and record.exc_info[1]:
            facts |= {"error": kinds(record.exc_info[1]), "frames": frames(record.exc_info[1])}
        (log.error if record.levelno >= logging.ERROR else log.warning)("library.logged", **facts)


def without_error_text(logger: Any, method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """A processor: an `exc_info` becomes the error's type and where it was raised."""
    given = event.pop("exc_info", None)
    error = given if isinstance(given, BaseException) else sys.exc_info()[1] if given else None
    if error is not None:
        event.setdefault("error", kinds(error))
        event["frames"] = frames(error)
    return event


def kinds(error: BaseException) -> str:
    """The type of an error and of those that led to it, the last one first; without their text."""
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
    """Where an error was raised, as `file:line function`, without its text, which may hold what a visitor wrote."""
    stack = traceback.extract_tb(error.__traceback__)[-last:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack]
