"""The SQL statements, by the names of their files. No SQL is written in Python but the lists of columns of a session, which
follow from the list of its fields."""

import re
from importlib.resources import files

from persistence.model.fields import SESSION_FIELDS, Column, SessionFields

_PLACEHOLDER = re.compile(r"\{(\w+)\}|\{(\w+) from \$(\d+)\}")


def load_statements(fields: SessionFields = SESSION_FIELDS) -> dict[str, str]:
    """Every statement of `sql/` by its file's name without the ending, its placeholders filled in."""
    return {
        file.name.removesuffix(".sql"): fill(file.read_text(), fields)
        for file in (files("persistence") / "sql").iterdir()
        if file.name.endswith(".sql")
    }


def fill(statement: str, fields: SessionFields) -> str:
    """The statement with lists of a session's columns in place of `{columns}` (their names), `{arrays from $n}` (their
    parameters, the first numbered n), `{values}` (what the parameters' rows have for them), `{changes}` (their assignments,
    to the newest revision's value unless another is final) and `{finals}` (whether a row has something final to store).

    JSON is sent as text: for the type jsonb[] asyncpg would have to ask the server, on each connection anew.
    """
    columns = [column for column, _ in fields.columns]

    def lists(match: re.Match[str]) -> str:
        first = int(match[3] or 0)
        match match[1] or match[2]:
            case "columns":
                return ", ".join(column.name for column in columns)
            case "arrays":
                types = ["text" if column.type == "jsonb" else column.type for column in columns]
                return ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(types, first))
            case "values":
                return ", ".join(f"{column.name}::jsonb" if column.type == "jsonb" else column.name for column in columns)
            case "changes":
                return ",\n        ".join(f"{column.name} = {_newest(column)}" for column in columns if column.changes)
            case "finals":
                finals = dict.fromkeys(column.final for column in columns if column.final)
                rules = (f"{final.format('excluded')} AND NOT ({final.format('stored')})" for final in finals)
                return "(" + " OR ".join(rules) + ")"
            case other:
                raise ValueError(f"{{{other}}} is no placeholder")

    return _PLACEHOLDER.sub(lists, statement)


def _newest(column: Column) -> str:
    """What a row has in a column after it was written: the newer revision's value, unless the older one is final."""
    newer, older = f"excluded.{column.name}", f"stored.{column.name}"
    if not column.final:
        return f"CASE WHEN excluded.revision > stored.revision THEN {newer} ELSE {older} END"
    return (
        f"CASE WHEN {column.final.format('stored')} THEN {older} "
        f"WHEN excluded.revision > stored.revision OR {column.final.format('excluded')} THEN {newer} ELSE {older} END"
    )
