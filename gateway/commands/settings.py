"""`gateway settings`: every setting, from the types and docstrings of `gateway.settings.Settings`."""

import argparse
import ast
import inspect
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any, get_args

import msgspec
import msgspec.inspect

from gateway.settings import Settings, load_settings, variable_of

WIDTH = 100
LEGEND = "Environment variables: name, default, values. * is set in the environment, to what stands behind =."


class SettingDescription(msgspec.Struct, frozen=True):
    """A setting for its users. `values` is its type and range in words. `value` is the text that the environment sets; it is
    None where nothing is set, and for secrets."""

    variable: str
    subject: str
    values: str
    default: str | float | bool
    description: str
    secret: bool
    is_set: bool
    value: str | None


async def print_settings(options: argparse.Namespace) -> None:
    """Prints every setting, then checks the environment. Raises SettingsError."""
    described = describe_settings(os.environ)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode({"settings": described})).decode())
    else:
        print("\n".join(table(described)))
    load_settings(os.environ)


def describe_settings(environment: Mapping[str, str]) -> list[SettingDescription]:
    """Every setting in the order of the class, with what the environment sets."""
    documentation = _documentation(inspect.getsource(Settings))
    described = []
    for field in msgspec.structs.fields(Settings):
        variable = variable_of(field.name)
        subject, description = documentation[field.name]
        secret = _is_secret(field.type)
        given = environment.get(variable, "")
        described.append(
            SettingDescription(
                variable=variable,
                subject=subject,
                values=_values(field.type),
                default=field.default,
                description=description,
                secret=secret,
                is_set=given != "",
                value=None if secret or not given else given,
            )
        )
    return described


def table(settings: Sequence[SettingDescription]) -> Iterator[str]:
    """The settings as lines of at most 100 columns, by subject."""
    yield LEGEND
    names = max(len(setting.variable) for setting in settings)
    defaults = max(len(_default(setting)) for setting in settings)
    for subject, members in groupby(settings, attrgetter("subject")):
        yield ""
        yield subject
        for setting in members:
            mark = "*" if setting.is_set else " "
            yield f"{mark} {setting.variable:<{names}}  {_default(setting):<{defaults}}  {setting.values}"
            if setting.is_set:
                yield from _wrapped(f"= {setting.value or '(set, not shown)'}")
            yield from _wrapped(setting.description)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(setting: SettingDescription) -> str:
    default = setting.default
    return msgspec.json.encode(default).decode() if not isinstance(default, str) else default or "-"


def _documentation(source: str) -> dict[str, tuple[str, str]]:
    """Subject and description of each field, from the class's source: at run time Python has neither."""
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    lines, found = source.splitlines(), {}
    for field, docstring in pairwise(definition.body):
        match field, docstring:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(value=str(text))):
                above = (line.strip() for line in reversed(lines[: field.lineno - 1]))
                subject = next(line for line in above if line.startswith("# "))
                found[name] = (subject.removeprefix("# "), " ".join(text.split()))
    return found


def _is_secret(kind: Any) -> bool:
    described = msgspec.inspect.type_info(kind)
    return isinstance(described, msgspec.inspect.Metadata) and bool((described.extra or {}).get("secret"))


def _values(kind: Any) -> str:
    """A type and its range in words."""
    match msgspec.inspect.type_info(kind):
        case msgspec.inspect.Metadata():
            return "text, secret"
        case msgspec.inspect.LiteralType():
            return " | ".join(get_args(kind))
        case msgspec.inspect.BoolType():
            return "true | false"
        case msgspec.inspect.IntType(gt=above, ge=least, le=most):
            return f"integer {_range(above, least, most)}"
        case msgspec.inspect.FloatType(gt=above, ge=least, le=most):
            return f"number {_range(above, least, most)}"
        case _:
            return "text"


def _range(above: float | None, least: float | None, most: float | None) -> str:
    start = f"from {least}" if above is None else f"above {above}"
    return start if most is None else f"{start} to {most}"
