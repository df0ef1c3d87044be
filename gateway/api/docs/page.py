"""The page at `/docs`: the OpenAPI document as HTML, for people. It loads nothing, from here or elsewhere.

Called once, by `app.py`, with the document that is served; so it cannot say anything else.
"""

import json
import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1d232b; --soft: #59636e; --line: #d5dbe1; --back: #fff; --raised: #f5f7f9;
  --get: #0a6640; --post: #0b57b0; --put: #8a4b00; --delete: #b3261e; --accent: #0b57b0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e9ee; --soft: #a0abb6; --line: #36404a; --back: #14181d;
  --raised: #1c2229; --get: #6fd3a4; --post: #8bbcf7; --put: #f0b46c; --delete: #f59a93; --accent: #8bbcf7; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--back); }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
code, .path, .method { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; overflow-wrap: anywhere; }
.page { display: grid; grid-template-columns: 19rem minmax(0, 1fr); max-width: 82rem; margin: 0 auto; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding: 1.5rem 1rem;
  border-right: 1px solid var(--line); font-size: .875rem; }
nav h2 { margin: 1.1rem 0 .3rem; font-size: .8125rem; color: var(--soft); font-weight: 600; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav a { display: flex; gap: .5rem; padding: .25rem .4rem; border-radius: 4px; color: inherit; text-decoration: none; }
nav a:hover { background: var(--raised); }
nav .method { flex: 0 0 3.6rem; }
nav input { width: 100%; padding: .45rem .6rem; font: inherit; color: inherit; background: var(--raised);
  border: 1px solid var(--soft); border-radius: 6px; }
nav label { font-weight: 600; }
main { padding: 1.5rem 2rem 6rem; min-width: 0; }
h1 { margin: 0; font-size: 1.75rem; }
article { margin-top: 2rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
article > h3 { margin: 0; font-size: 1.0625rem; }
article h4 { margin: 1.2rem 0 .3rem; font-size: .9375rem; }
section > h2 { margin: 3rem 0 0; font-size: 1.3rem; }
.soft { color: var(--soft); }
.method { font-weight: 700; }
.get { color: var(--get); } .post { color: var(--post); } .put { color: var(--put); } .delete { color: var(--delete); }
.guard { display: inline-block; margin: .3rem 0 0; padding: 0 .5rem; border: 1px solid var(--line); border-radius: 1rem;
  font-size: .8125rem; color: var(--soft); }
.table { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; }
th { text-align: left; font-size: .8125rem; color: var(--soft); font-weight: 600; }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { white-space: nowrap; }
.inner td:first-child code { padding-left: 1rem; }
details { margin-top: .6rem; } summary { cursor: pointer; }
pre { padding: .8rem 1rem; background: var(--raised); border-radius: 6px; overflow-x: auto; }
[hidden] { display: none !important; }
@media (max-width: 52rem) { .page { grid-template-columns: minmax(0, 1fr); } main { padding: 1rem 1rem 4rem; }
  nav { position: static; max-height: none; border-right: 0; border-bottom: 1px solid var(--line); padding: 1rem; }
  nav ul, nav h2 { display: none; } td:first-child { white-space: normal; } }
@media print { nav { display: none; } .page { display: block; } }
"""

SCRIPT = """
const wanted = document.getElementById('wanted');
const found = document.getElementById('found');
const calls = [...document.querySelectorAll('[data-call]')];
wanted.addEventListener('input', () => {
  const words = wanted.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const call of calls) call.hidden = !words.every((word) => call.dataset.call.includes(word));
  for (const group of document.querySelectorAll('[data-group]')) {
    group.hidden = !group.querySelector('[data-call]:not([hidden])');
  }
  const count = document.querySelectorAll('article:not([hidden])').length;
  found.textContent = words.length ? `${count} ${count === 1 ? 'call' : 'calls'}` : '';
});
"""

GROUPS = {"chat": "Messages", "sessions": "Sessions", "agents": "Agents", "": "Operation and pages"}
GUARDS = {
    "admin": "Admin key, as a bearer token",
    "session": "The session's token as a bearer token, if the gateway made the session's id",
    "site": "Or one of the agent's site keys, for the site's own servers",
}
Field = tuple[str, dict[str, Any], bool]


def reference_page(document: dict[str, Any]) -> str:
    """The whole page for a document."""
    return _Page(document).html()


class _Page:
    """A document on its way to HTML."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._schemas: dict[str, Any] = document["components"]["schemas"]

    def html(self) -> str:
        info = self._document["info"]
        calls = [
            (method, path, operation)
            for path, operations in self._document["paths"].items()
            for method, operation in operations.items()
        ]
        calls.sort(key=lambda call: list(GROUPS).index(_group(call[1])))
        grouped = [(name, list(members)) for name, members in groupby(calls, lambda call: _group(call[1]))]
        return "".join(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(info['title'])}: all calls</title><style>{STYLE}</style></head><body>",
                '<div class="page"><nav aria-label="Calls"><label for="wanted">Find a call</label>',
                '<input id="wanted" type="search" autocomplete="off"><div id="found" class="soft" role="status"></div>',
                *[part for name, members in grouped for part in _menu(name, members)],
                f"</nav><main><h1>{escape(info['title'])}</h1><p>{escape(info['description'])} ",
                f'Version {escape(info["version"])}. For programs: <a href="openapi.json">openapi.json</a>.</p>',
                *self._about_errors(),
                *[part for name, members in grouped for part in self._section(name, members)],
                f"</main></div><script>{SCRIPT}</script></body></html>",
            ]
        )

    def _about_errors(self) -> Iterator[str]:
        """What is the same for every call, said once."""
        problem = {"$ref": "#/components/schemas/ProblemDocument"}
        yield '<section><h2 id="errors">Errors</h2><p>An error is an <code>application/problem+json</code> document. '
        yield f"{_prose(self._resolved(problem)['description'])}</p>"
        yield from self._fields(self._members(problem))
        yield "</section>"

    def _section(self, name: str, calls: list[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
        yield f"<section data-group><h2>{GROUPS[name]}</h2>"
        for method, path, operation in calls:
            yield from self._call(method, path, operation)
        yield "</section>"

    def _call(self, method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
        yield f'<article id="{operation["operationId"]}" data-call="{_words(method, path, operation)}">'
        yield f'<h3><span class="method {method}">{method.upper()}</span> <span class="path">{escape(path)}</span></h3>'
        yield f"<div>{escape(operation['summary'])}</div>"
        for requirement in operation.get("security", []):
            for scheme in requirement:
                yield f'<div class="guard">{GUARDS[scheme]}</div>'
        parameters: list[Field] = [
            (parameter["name"], _described(parameter), parameter["required"])
            for parameter in operation.get("parameters", [])
        ]
        if parameters:
            yield "<h4>Path, query and headers</h4>"
            yield from self._fields(parameters, [parameter["in"] for parameter in operation["parameters"]])
        if "requestBody" in operation:
            content = next(iter(operation["requestBody"]["content"].values()))
            media_type = " or ".join(operation["requestBody"]["content"])
            schema = self._resolved(content["schema"])
            yield f'<h4>Body <span class="soft">{media_type}</span></h4>'
            yield f"<div>{_prose(schema.get('description', ''))}</div>"
            yield from self._fields(self._members(schema))
        yield "<h4>Answers</h4>"
        errors = []
        for status, response in operation["responses"].items():
            ((media_type, content),) = response.get("content", {"": {}}).items()
            if media_type == "application/problem+json":
                errors.append((status, response["description"]))
            else:
                yield from self._answer(status, response, media_type, content.get("schema", {}))
        yield '<details><summary>Errors</summary><div class="table"><table>'
        for status, description in errors:
            yield f"<tr><td><code>{status}</code></td><td>{_prose(description)}</td></tr>"
        yield "</table></div></details></article>"

    def _answer(self, status: str, response: dict[str, Any], media_type: str, schema: dict[str, Any]) -> Iterator[str]:
        members = self._members(self._resolved(schema))
        yield f"<div><code>{status}</code> {_prose(response['description'])} "
        yield f'<span class="soft">{media_type}</span></div>'
        for name, header in response.get("headers", {}).items():
            yield f'<div class="soft"><code>{name}</code>: {escape(header["description"])}</div>'
        if members:
            yield f"<details><summary>Fields of {status}</summary>"
            yield from self._fields(members)
            yield "</details>"

    def _fields(self, fields: list[Field], places: list[str] | None = None) -> Iterator[str]:
        yield '<div class="table"><table><thead><tr><th scope="col">Name</th><th scope="col">Type</th>'
        yield '<th scope="col">What it is</th></tr></thead><tbody>'
        for index, (name, schema, required) in enumerate(fields):
            place = f'<div class="soft">{places[index]}</div>' if places else ""
            yield from self._row(name, schema, required, place)
            for inner in self._members(self._inner(schema)):
                yield from self._row(*inner, "", inside=f"{name}.")
        yield "</tbody></table></div>"

    def _row(self, name: str, schema: dict[str, Any], required: bool, place: str, inside: str = "") -> Iterator[str]:
        need = "" if required else '<span class="soft">optional</span>'
        yield f"<tr{' class=inner' if inside else ''}><td><code>{escape(inside + name)}</code>{place}</td>"
        yield f"<td>{self._type(schema)} {need}</td><td>{_prose(' '.join(self._facts(schema)))}</td></tr>"

    def _facts(self, schema: dict[str, Any]) -> Iterator[str]:
        """What a schema says beyond its type, as sentences."""
        found = self._resolved(schema)
        if description := schema.get("description") or found.get("description"):
            yield description.rstrip(".") + "."
        one = next((part for part in found.get("anyOf", [found]) if part.get("type") != "null"), found)
        if "minLength" in one or "maxLength" in one:
            least, most = one.get("minLength", 0), one.get("maxLength")
            if most is None:
                yield "Not empty." if least == 1 else f"At least {least} characters."
            else:
                yield f"{least} to {most} characters." if least else f"At most {most} characters."
        for word, text in (("minimum", "At least"), ("exclusiveMinimum", "More than"), ("maximum", "At most")):
            if word in one:
                yield f"{text} {one[word]:,}."
        if "maxItems" in one:
            yield f"At most {one['maxItems']:,} of them."
        if "pattern" in one:
            yield f"Matches `{one['pattern']}`."
        if schema.get("default") is not None:
            yield f"Default: `{json.dumps(schema['default'])}`."

    def _type(self, schema: dict[str, Any]) -> str:
        found = self._resolved(schema)
        if "anyOf" in found:
            return " or ".join(dict.fromkeys(self._type(part) for part in found["anyOf"]))
        if "enum" in found and len(found["enum"]) < 10:
            return " or ".join(f"<code>{escape(str(value))}</code>" for value in found["enum"])
        kind = found.get("type", "anything")
        if kind == "array":
            items = found.get("items") or (found.get("prefixItems") or [{}])[0]
            return f"list of {self._type(items)}"
        return {"boolean": "true or false", "integer": "whole number"}.get(kind, str(kind))

    def _members(self, schema: dict[str, Any]) -> list[Field]:
        found = self._resolved(schema)
        required = found.get("required", [])
        return [(name, field, name in required) for name, field in found.get("properties", {}).items()]

    def _inner(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The object that a field is, or that its items are."""
        found = self._resolved(schema)
        for part in found.get("anyOf", []):
            if part.get("type") != "null":
                return self._inner(part)
        return self._inner(found["items"]) if isinstance(found.get("items"), dict) else found

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema


def _menu(name: str, calls: list[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    yield f"<div data-group><h2>{GROUPS[name]}</h2><ul>"
    for method, path, operation in calls:
        yield f'<li data-call="{_words(method, path, operation)}"><a href="#{operation["operationId"]}">'
        yield f'<span class="method {method}">{method.upper()}</span> <span>{escape(operation["summary"])}</span></a></li>'
    yield "</ul></div>"


def _group(path: str) -> str:
    found = re.match(r"/api/(\w+)", path)
    return found[1] if found and found[1] in GROUPS else ""


def _words(method: str, path: str, operation: dict[str, Any]) -> str:
    return escape(f"{method} {path} {operation['summary']}".lower(), quote=True)


def _described(parameter: dict[str, Any]) -> dict[str, Any]:
    described = {"description": parameter["description"]} if "description" in parameter else {}
    return {**parameter["schema"], **described}


def _prose(text: str) -> str:
    """Plain text with `code` in it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
