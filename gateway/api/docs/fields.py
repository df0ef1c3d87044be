"""Fields of JSON Schema as HTML: name, type, sentence, bounds."""

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

Field = tuple[str, dict[str, Any], bool]
"""Name, schema, whether it is required."""
MAX_DEPTH = 4


class Fields:
    """Renders fields whose schemas may refer to `schemas`, the document's components."""

    def __init__(self, schemas: dict[str, Any]) -> None:
        self._schemas = schemas

    def members(self, schema: dict[str, Any]) -> list[Field]:
        """The fields of an object."""
        found = self.resolved(schema)
        required = found.get("required", [])
        return [(name, field, name in required) for name, field in found.get("properties", {}).items()]

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A schema, or the one that it refers to."""
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def list(self, fields: Sequence[Field], *, of_answer: bool = False, depth: int = 0) -> Iterator[str]:
        """A list of fields, those of objects in them included. Answers say which fields may be missing, the rest which must
        not be."""
        if not fields or depth >= MAX_DEPTH:
            return
        yield '<dl class="fields">'
        for name, schema, required in fields:
            need = ("" if required else "may be missing") if of_answer else ("required" if required else "")
            mark = f' <span class="need">{need}</span>' if need else ""
            yield f'<dt><code>{escape(name)}</code> <span class="soft">{self._type(schema)}</span>{mark}</dt>'
            yield f"<dd>{prose(' '.join(self._facts(schema)))}"
            yield from self.list(self.members(self._inner(schema)), of_answer=of_answer, depth=depth + 1)
            yield "</dd>"
        yield "</dl>"

    def _facts(self, schema: dict[str, Any]) -> Iterator[str]:
        """What a schema says beyond its type, as sentences."""
        found = self.resolved(schema)
        if description := schema.get("description") or found.get("description"):
            yield description.rstrip(".") + "."
        one = next((part for part in found.get("anyOf", [found]) if part.get("type") != "null"), found)
        yield from self._lengths(one)
        yield from self._range(one)
        if "maxItems" in one:
            yield f"At most {one['maxItems']:,} of them."
        if "pattern" in one:
            yield f"Matches `{one['pattern']}`."
        if schema.get("default") not in (None, {}, []):
            yield f"Default: `{json.dumps(schema['default'])}`."

    def _lengths(self, schema: dict[str, Any]) -> Iterator[str]:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if least and most:
            yield f"{least:,} to {most:,} characters."
        elif most:
            yield f"At most {most:,} characters."
        elif least:
            yield "Not empty." if least == 1 else f"At least {least:,} characters."

    def _range(self, schema: dict[str, Any]) -> Iterator[str]:
        if "minimum" in schema and "maximum" in schema:
            yield f"{schema['minimum']:,} to {schema['maximum']:,}."
            return
        for word, text in (("minimum", "At least"), ("exclusiveMinimum", "More than"), ("maximum", "At most")):
            if word in schema:
                yield f"{text} {schema[word]:,}."

    def _type(self, schema: dict[str, Any]) -> str:
        found = self.resolved(schema)
        if "anyOf" in found:
            return " or ".join(dict.fromkeys(self._type(part) for part in found["anyOf"]))
        if "enum" in found and len(found["enum"]) < 10:
            return " or ".join(f"<code>{escape(str(value))}</code>" for value in found["enum"])
        if "const" in found:
            return f"<code>{escape(str(found['const']))}</code>"
        kind = found.get("type", "anything")
        if kind == "array":
            items = found.get("items") or (found.get("prefixItems") or [{}])[0]
            return f"list of {self._type(items)}"
        return {"boolean": "true or false", "integer": "whole number"}.get(kind, str(kind))

    def _inner(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The object that a field is, or that its items are."""
        found = self.resolved(schema)
        for part in found.get("anyOf", []):
            if part.get("type") != "null":
                return self._inner(part)
        return self._inner(found["items"]) if isinstance(found.get("items"), dict) else found


def prose(text: str) -> str:
    """Plain text with `code` in it, as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
