"""Links the Lua scripts: puts behind a script's `#!lua` line what it uses of `lua/lib`, and no more, because the whole text
of a script is run at each call: with all of the library a turn takes Redis twice the time.

A library file defines the one local that it is named after, and is used by that name. These names have no file:

* `args`, a script's arguments by name, in the order of the ARGV list in its header. The list is comma-separated names, with
  remarks in parentheses; `...` at its end stands for a variable number of further ones, which the script takes off ARGV.
* the tables that follow from the list of a session's fields: see `field_tables`.
* Lua's own.

Raises LinkError for a name that nothing defines, a library file that no script uses, and an argument that the header and
the text do not both have.
"""

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import NamedTuple

from persistence.model.fields import FORMAT, RECORD_FORMAT, SESSION_FIELDS, SessionFields

_TOKEN = re.compile(
    r"""
    (?:--|\#!)[^\n]*                          # a comment, or the first line
    | '(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*"  # a string
    | [A-Za-z_]\w* | \d[\w.]* | == | \.\.\.? | \S
    """,
    re.VERBOSE,
)

_WORD = re.compile(r"[A-Za-z_]\w*")

_KEYWORDS = _WORD.findall(
    "and break do else elseif end false for function if in local nil not or repeat return then true until while"
)

_BUILTINS = _WORD.findall("ARGV KEYS cjson ipairs math pairs pcall redis string table tonumber tostring type unpack")
"""Lua's own names, as far as the scripts use them."""

_ARGV = re.compile(r"^-- ARGV (.*?)^-- replies", re.MULTILINE | re.DOTALL)

_ARGUMENT_USED = re.compile(r"\bargs\.(\w+)")


class LinkError(Exception):
    """A script does not fit the library."""


class Script(NamedTuple):
    """A linked script, and the names of the arguments that follow session_id and nonce, in their order."""

    text: str
    arguments: tuple[str, ...]


def link_scripts(fields: SessionFields = SESSION_FIELDS) -> dict[str, Script]:
    """Every script of `lua/` by name. Raises LinkError."""
    folder = files("persistence") / "lua"
    scripts = {file.name.removesuffix(".lua"): file.read_text() for file in folder.iterdir() if file.is_file()}
    library = {file.name.removesuffix(".lua"): file.read_text() for file in (folder / "lib").iterdir()}
    return link(scripts, library, field_tables(fields))


def link(scripts: Mapping[str, str], library: Mapping[str, str], tables: Mapping[str, str]) -> dict[str, Script]:
    """Links scripts with the library files and tables that they use. Raises LinkError."""
    for name, text in library.items():
        if not re.search(rf"^local (function )?{name}\b", text, re.MULTILINE):
            raise LinkError(f"lib/{name}.lua does not define {name}")
    parts = {**library, **tables}
    uses = {"args": set[str](), **{name: free_names(text) for name, text in parts.items()}}
    linked, used = {}, set()
    for name, text in scripts.items():
        arguments = _arguments(name, text)
        bound = ", ".join(f"{argument} = ARGV[{number}]" for number, argument in enumerate(arguments, 1))
        needed = _needed(name, free_names(text), uses)
        used.update(needed)
        first, rest = text.split("\n", 1)
        own = {**parts, "args": f"local args = {{{bound}}}\n"}
        linked[name] = Script("\n".join([first, *(own[one] for one in needed), rest]), arguments[2:])
        _check_arguments(name, arguments, linked[name].text)
    if unused := sorted(library.keys() - used):
        raise LinkError(f"no script uses lib/{unused[0]}.lua")
    return linked


def _arguments(name: str, text: str) -> tuple[str, ...]:
    """The names in a script's ARGV list."""
    found = _ARGV.search(text)
    if not found:
        raise LinkError(f"{name}.lua has no ARGV list before its replies")
    listed = re.sub(r"\([^)]*\)", "", found[1].replace("\n--", " "))
    arguments = [one.strip() for one in listed.split(",")]
    if arguments[-1] == "...":
        arguments.pop()
    if arguments[:2] != ["session_id", "nonce"]:
        raise LinkError(f"{name}.lua does not begin with session_id and nonce")
    for argument in arguments:
        if not _WORD.fullmatch(argument):
            raise LinkError(f"{name}.lua: {argument!r} in its ARGV list is no name")
    return tuple(arguments)


def _check_arguments(name: str, arguments: tuple[str, ...], text: str) -> None:
    used = set(_ARGUMENT_USED.findall(re.sub("--.*", "", text)))
    if wrong := sorted(used.symmetric_difference(arguments)):
        raise LinkError(
            f"{name}.lua: {wrong[0]} is {'used and not' if wrong[0] in used else 'not used and'} in its ARGV list"
        )


def _needed(script: str, names: set[str], uses: Mapping[str, set[str]]) -> list[str]:
    """The parts that a script with these free names uses, each behind those that it uses itself."""
    needed: list[str] = []

    def visit(where: str, names: set[str], above: tuple[str, ...]) -> None:
        for name in sorted(names):
            if name not in uses:
                raise LinkError(f"{where}.lua of {script}.lua uses {name}, which nothing defines")
            if name in above:
                raise LinkError(f"lib/{name}.lua uses itself, by way of {' and '.join(above)}")
            if name not in needed:
                visit(name, uses[name], (*above, name))
                needed.append(name)

    visit(script, names, ())
    return needed


def free_names(text: str) -> set[str]:
    """The names that a Lua text uses and neither declares nor has from Lua. Its scopes count as one."""
    tokens = [token for token in _TOKEN.findall(text) if not token.startswith(("--", "#!"))]
    declared, used = {*_KEYWORDS, *_BUILTINS}, set()
    for i, token in enumerate(tokens):
        before, after = tokens[i - 1] if i else "", tokens[i + 1] if i + 1 < len(tokens) else ""
        if token in ("local", "for", "function"):
            declared.update(_declared(tokens, i))
        elif _WORD.fullmatch(token) and before not in (".", ":") and not (after == "=" and before in ("{", ",")):
            used.add(token)
    return used - declared


def _declared(tokens: list[str], i: int) -> Iterator[str]:
    """The names behind `local`, `for` or `function`."""
    if tokens[i] == "local" and tokens[i + 1] == "function":
        return
    if tokens[i] == "function":
        if _WORD.fullmatch(tokens[i + 1]):
            i += 1
            yield tokens[i]
        i += 1
    while True:
        i += 1
        if _WORD.fullmatch(tokens[i]) and tokens[i] not in _KEYWORDS:
            yield tokens[i]
        i += 1
        if tokens[i] != ",":
            return


def field_tables(fields: SessionFields) -> dict[str, str]:
    """What the scripts know of the list of a session's fields, as Lua.

    FIELDS: the names of all fields of the hash. HEADER: of those that replies and records have. DEFAULTS: the texts of
    missing fields. INITIAL: the texts of a new session. KINDS: the kinds of fields that are not any text. FORMAT,
    RECORD_FORMAT: the formats to write.
    """
    header = ["format", *(field.name for field in fields.header)]
    initial = {"format": str(FORMAT)}
    for field in fields:
        text = field.default if field.initial is None else field.initial
        if text is not None:
            initial[field.name] = text
    return {
        "FIELDS": _list("FIELDS", [*header, *(field.name for field in fields.state)]),
        "HEADER": _list("HEADER", header),
        "DEFAULTS": _table("DEFAULTS", {field.name: field.default for field in fields if field.default is not None}),
        "INITIAL": _table("INITIAL", initial),
        "KINDS": _table("KINDS", {field.name: field.kind.name for field in fields if field.kind.name != "text"}),
        "FORMAT": f"local FORMAT = {_quoted(str(FORMAT))}\n",
        "RECORD_FORMAT": f"local RECORD_FORMAT = {_quoted(str(RECORD_FORMAT))}\n",
    }


def _list(name: str, texts: list[str]) -> str:
    return f"local {name} = {{{', '.join(map(_quoted, texts))}}}\n"


def _table(name: str, texts: Mapping[str, str]) -> str:
    return f"local {name} = {{{', '.join(f'{key} = {_quoted(text)}' for key, text in texts.items())}}}\n"


def _quoted(text: str) -> str:
    """Text as a string of Lua."""
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03d}" for byte in text.encode())
    return f"'{''.join(plain)}'"
