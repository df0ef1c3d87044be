"""The audit trail: every write by an operator, every look at a visitor's messages, every refused admin key.

Log events named `audit.…` and `admin.…`, written at every log level. Each names the operator (which admin key, or the user
of the command line), the address, the request, the action and its outcome; never a key, a whole session id, or a value that
was written.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from typing import Any

import msgspec
import structlog

# Bypasses the configured level: an audit trail with gaps is none.
log = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))


class Operator(msgspec.Struct, frozen=True):
    """Who acts: over HTTP an address, a request and an admin key (`current` or `previous`); on the command line a `user`."""

    address: str = ""
    request_id: str = ""
    key: str = ""
    user: str = ""


def command_line_operator() -> Operator:
    """The operator of a command: the user of the machine."""
    try:
        user = getuser()
    except (OSError, KeyError):
        user = "unknown"
    return Operator(user=user)


@contextmanager
def audited(what: str, operator: Operator | None, **facts: Any) -> Iterator[dict[str, Any]]:
    """Logs `audit.<what>` when the block ends, also by an error; not for a visitor (None).

    The block may add facts. `outcome` is `done`, or the error's code or type.
    """
    if operator is None:
        yield facts
        return
    outcome = "unknown"
    try:
        yield facts
        outcome = "done"
    except BaseException as error:
        outcome = str(getattr(error, "code", "")) or type(error).__name__
        raise
    finally:
        log.info(f"audit.{what}", outcome=outcome, **facts, **_who(operator))


def refused(reason: str, address: str, request_id: str, *, shut_out_s: int = 0) -> None:
    """Logs `admin.refused`: an admin key was refused, and its address for the next `shut_out_s` seconds."""
    log.warning(
        "admin.refused",
        reason=reason,
        address=address,
        request_id=request_id,
        **({"shut_out_s": shut_out_s} if shut_out_s else {}),
    )


def changed(old: msgspec.Struct | None, new: msgspec.Struct) -> list[str]:
    """The names of the fields in which a definition differs from the old one, or from the defaults if it is new."""
    if old is None:
        before = {field.name: _default(field) for field in msgspec.structs.fields(new)}
    else:
        before = msgspec.structs.asdict(old)
    return [name for name, value in msgspec.structs.asdict(new).items() if value != before[name]]


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


def _who(operator: Operator) -> dict[str, str]:
    return {name: value for name, value in msgspec.structs.asdict(operator).items() if value}
