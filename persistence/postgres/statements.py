"""The SQL statements, by the names of their files. No SQL stands in Python."""

from importlib.resources import files


def load_statements() -> dict[str, str]:
    """Every statement of `sql/` by its file's name without the ending."""
    return {
        file.name.removesuffix(".sql"): file.read_text()
        for file in (files("persistence") / "sql").iterdir()
        if file.name.endswith(".sql")
    }
