"""Logs: event names with facts as fields; JSON in production, key=value on a terminal.

Never message text, tokens, keys, or session ids, which can be their visitors' secrets.
"""

import logging
import sys
import traceback

import structlog


def configure_logs(log_format: str, level: str) -> None:
    """Sets the process's logging up, once, before anything logs."""
    text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    # Tracebacks without local variables: those hold what visitors wrote.
    terminal = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    exceptions = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
    renderer: structlog.types.Processor = terminal if text else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text),
            *([] if text else [exceptions]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=max(number, logging.WARNING), stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")


def frames(error: BaseException, last: int = 8) -> list[str]:
    """Where an error was raised, as `file:line function`, without its text, which may hold what a visitor wrote."""
    stack = traceback.extract_tb(error.__traceback__)[-last:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack]
