"""The audit trail: every change by an operator, every look at what visitors said, every key that was refused.

Lines of the log named `audit.…` and `admin.…`, written whatever the log level is. They tell who (which admin key, or the
command line), from where, in which request, and what, with how it ended; never a key, a whole session id, or the value of
anything changed.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from typing import Any

import msgspec
import structlog

# Not by the level that is set: what is not written cannot be looked up.
log = structlog.wrap_logger(None, wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG))


class Operator(msgspec.Struct, frozen=True):
    """Who acts: `key` is `current` or `previous`, or empty for the command line; `user` is who runs that."""

    address: str = ""
    request_id: str = ""
    key: str = ""
    user: str = ""


def at_the_command_line() -> Operator:
    """Whoever runs a command on a machine that has the settings."""
    try:
        user = getuser()
    except (OSError, KeyError):
        user = "unknown"
    return Operator(user=user)


@contextmanager
def audited(what: str, operator: Operator | None, **facts: Any) -> Iterator[dict[str, Any]]:
    """Leaves the line `audit.<what>` when the block ends, however it does. A visitor (None) leaves none.

    The block may add facts. `outcome` is `done`, or the code or type of the error.
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
    """Leaves the line `admin.refused`: somebody was kept from using an admin key; for `shut_out_s` from now on."""
    log.warning(
        "admin.refused",
        reason=reason,
        address=address,
        request_id=request_id,
        **({"shut_out_s": shut_out_s} if shut_out_s else {}),
    )


def changed(old: msgspec.Struct | None, new: msgspec.Struct) -> list[str]:
    """The names of the fields in which two definitions differ; of a new one, those that are not the default."""
    before = msgspec.structs.asdict(old) if old is not None else {}
    if old is None:
        defaults = {field.name: field for field in msgspec.structs.fields(new)}
        return [name for name, value in msgspec.structs.asdict(new).items() if value != _default(defaults[name])]
    return [name for name, value in msgspec.structs.asdict(new).items() if value != before.get(name)]


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


def _who(operator: Operator) -> dict[str, str]:
    return {name: value for name, value in msgspec.structs.asdict(operator).items() if value}
