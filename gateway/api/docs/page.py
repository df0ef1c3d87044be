"""The page at `/docs`: the OpenAPI document as HTML, for people. It says nothing that the document does not say."""

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

from gateway.api.docs.example import pretty
from gateway.api.docs.fields import Field, Fields, prose

GUARDS = {
    "admin": "Admin key",
    "session": "The session's token, if the gateway made the session's id",
    "site": "Or a site key of the agent, for the site's own servers",
}
PROBLEM = "application/problem+json"
Call = tuple[str, str, dict[str, Any]]
"""Method, path, operation."""


def reference_page(document: dict[str, Any], style: str, script: str) -> str:
    """The whole page for a document, with its style and its script inside."""
    return _Page(document).html(style, script)


class _Page:
    """A document on its way to HTML."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document
        self._components: dict[str, Any] = document["components"]
        self._fields = Fields(self._components["schemas"])

    def html(self, style: str, script: str) -> str:
        info = self._document["info"]
        tags = [tag["name"] for tag in self._document["tags"]]
        calls = [
            (method, path, operation)
            for path, operations in self._document["paths"].items()
            for method, operation in operations.items()
        ]
        calls.sort(key=lambda call: tags.index(call[2]["tags"][0]))
        grouped = [(tag, list(members)) for tag, members in groupby(calls, lambda call: call[2]["tags"][0])]
        return "".join(
            [
                '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(info['title'])}: reference</title><style>{style}</style></head><body>",
                '<a class="skip" href="#main">Skip to the calls</a><div class="page">',
                *self._menu(grouped),
                f'<main id="main"><h1>{escape(info["title"])} <span class="soft">{escape(info["version"])}</span></h1>',
                f"<p>{prose(info['description'])}</p>",
                '<p>The same for programs: <a href="openapi.json">openapi.json</a> (OpenAPI 3.1). The tests of the gateway ',
                "send every example to a real one.</p>",
                *self._about_keys(),
                *[part for tag, members in grouped for part in self._section(tag, members)],
                *self._about_events(),
                *self._about_errors(),
                f"</main></div><script>{script}</script></body></html>",
            ]
        )

    def _menu(self, grouped: list[tuple[str, list[Call]]]) -> Iterator[str]:
        yield '<nav aria-label="Calls"><label for="wanted">Find a call</label>'
        yield '<input id="wanted" type="search" autocomplete="off"><div id="found" class="soft" role="status"></div>'
        yield '<ul><li><a href="#keys">Keys and tokens</a></li><li><a href="#events">Events of streams</a></li>'
        yield '<li><a href="#errors">Errors</a></li></ul>'
        for tag, members in grouped:
            yield f"<div data-group><h2>{escape(tag)}</h2><ul>"
            for method, path, operation in members:
                yield f'<li data-call="{_words(method, path, operation)}"><a href="#{operation["operationId"]}">'
                yield f"{_method(method)} <span>{escape(operation['summary'])}</span></a></li>"
            yield "</ul></div>"
        yield "</nav>"

    # ------------------------------------------------------------------------------------------- what holds for all calls

    def _about_keys(self) -> Iterator[str]:
        yield '<section><h2 id="keys">Keys and tokens</h2><p>They go into <code>Authorization: Bearer …</code>. The '
        yield "examples take them from the shell variables <code>ADMIN_KEY</code> and <code>SESSION_TOKEN</code>.</p>"
        yield '<dl class="fields">'
        for scheme, described in self._components["securitySchemes"].items():
            yield f"<dt><code>{escape(scheme)}</code></dt><dd>{prose(described['description'])}.</dd>"
        yield "</dl></section>"

    def _about_events(self) -> Iterator[str]:
        event = self._components["schemas"]["Event"]
        yield f'<section><h2 id="events">Events of streams</h2><p>{prose(event["description"])} '
        yield "Each has an <code>id</code>, its kind as <code>event</code>, and <code>data</code> by its kind; comments in "
        yield "between keep the connection open. Sent back as <code>Last-Event-ID</code>, the id of the last event that was "
        yield "received makes the stream go on behind it, on any pod.</p>"
        for kind in event["oneOf"]:
            (example,) = kind["examples"]
            data = kind["properties"]["data"]["contentSchema"]
            yield f'<article class="event"><div class="told"><h3><code>{escape(kind["title"])}</code></h3>'
            yield f"<p>{prose(kind['description'])}</p>"
            yield from self._fields.list(self._fields.members(data), of_answer=True)
            yield '</div><div class="shown">'
            yield from _code("An event on the wire", "".join(f"{name}: {text}\n" for name, text in example.items()))
            yield "</div></article>"
        yield "</section>"

    def _about_errors(self) -> Iterator[str]:
        """Problems are the same for every call, so they are shown once."""
        problem = {"$ref": "#/components/schemas/ProblemDocument"}
        yield '<section><h2 id="errors">Errors</h2>'
        yield f"<p>Every error is such a document, sent as <code>{PROBLEM}</code>.</p>"
        yield from self._fields.list(self._fields.members(problem), of_answer=True)
        for response in self._components["responses"].values():
            examples = response["content"][PROBLEM]["examples"]
            status = next(iter(examples.values()))["value"]["status"]
            yield f'<article class="event"><div class="told"><h3 id="{status}">{status}</h3>'
            yield f"<p>{prose(response['description'].partition(':')[0])}.</p><dl class=fields>"
            for code, example in examples.items():
                again = ' <span class="soft">retryable</span>' if example["value"].get("retryable") else ""
                yield f"<dt><code>{escape(code)}</code>{again}</dt><dd>{prose(example['summary'])}.</dd>"
            yield '</dl></div><div class="shown">'
            shown = next((one for one in examples.values() if one["value"].get("field")), next(iter(examples.values())))
            yield from _code("Example", _json(shown["value"]))
            yield "</div></article>"
        yield "</section>"

    # ---------------------------------------------------------------------------------------------------------- the calls

    def _section(self, tag: str, calls: list[Call]) -> Iterator[str]:
        (described,) = [one["description"] for one in self._document["tags"] if one["name"] == tag]
        yield f"<section data-group><h2>{escape(tag)}</h2><p>{prose(described)}</p>"
        for call in calls:
            yield from self._call(*call)
        yield "</section>"

    def _call(self, method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
        name = operation["operationId"]
        yield f'<article id="{name}" data-call="{_words(method, path, operation)}"><div class="told">'
        yield f'<h3><a href="#{name}">{escape(operation["summary"])}</a></h3>'
        yield f'<div class="line">{_method(method)} <span class="path">{_path(path)}</span></div>'
        if "description" in operation:
            yield f"<p>{prose(operation['description'])}</p>"
        guards = [GUARDS[scheme] for requirement in operation.get("security", []) for scheme in requirement]
        if guards:
            yield f'<ul class="guards">{"".join(f"<li>{prose(guard)}</li>" for guard in guards)}</ul>'
        yield from self._parameters(operation)
        yield from self._body(operation)
        yield from self._answers(operation)
        yield '</div><div class="shown">'
        yield from self._examples(operation)
        yield "</div></article>"

    def _parameters(self, operation: dict[str, Any]) -> Iterator[str]:
        titles = {"path": "Path", "query": "Query", "header": "Headers"}
        for place, found in groupby(operation.get("parameters", []), lambda parameter: parameter["in"]):
            yield f"<h4>{titles[place]}</h4>"
            fields: list[Field] = [(one["name"], {**one["schema"], **_described(one)}, one["required"]) for one in found]
            yield from self._fields.list(fields)

    def _body(self, operation: dict[str, Any]) -> Iterator[str]:
        if "requestBody" not in operation:
            return
        contents = operation["requestBody"]["content"]
        content = next(iter(contents.values()))
        yield f'<h4>Body <span class="soft">{escape(" or ".join(contents))}</span></h4>'
        yield f"<p>{prose(self._fields.resolved(content['schema']).get('description', ''))}</p>"
        yield from self._fields.list(self._fields.members(content["schema"]))

    def _answers(self, operation: dict[str, Any]) -> Iterator[str]:
        yield "<h4>Answers</h4>"
        problems = []
        for status, response in operation["responses"].items():
            if "$ref" in response:
                problems.append((status, self._components["responses"][response["$ref"].rpartition("/")[2]]))
            else:
                yield from self._answer(status, response)
        yield '<details><summary>Errors</summary><dl class="fields errors">'
        for status, response in problems:
            yield f'<dt><a href="#{status}"><code>{status}</code></a></dt><dd>{prose(response["description"])}</dd>'
        yield "</dl></details>"

    def _answer(self, status: str, response: dict[str, Any]) -> Iterator[str]:
        ((media_type, content),) = response.get("content", {"": {}}).items()
        schema = content.get("schema", {})
        is_stream = schema.get("$ref", "").endswith("/Event")
        members = [] if is_stream else self._fields.members(schema)
        said = f"<code>{status}</code> {prose(response['description'])} <span class=soft>{escape(media_type)}</span>"
        headers: list[Field] = [(name, {**one["schema"], **_described(one)}, True) for name, one in _headers(response)]
        if members or headers:
            yield f'<details class="answer"><summary>{said}</summary>'
            for title, fields in (("Headers", headers), ("Fields", members)):
                yield f"<h5>{title}</h5>" if fields else ""
                yield from self._fields.list(fields, of_answer=True)
            yield "</details>"
        else:
            yield f'<div class="answer">{said}</div>'
        if is_stream:
            yield '<p>The events are described under <a href="#events">Events of streams</a>.</p>'

    def _examples(self, operation: dict[str, Any]) -> Iterator[str]:
        for index, sample in enumerate(operation["x-codeSamples"]):
            good = "good" if sample["x-status"] < 400 else "bad"
            yield f"<details class=example{' open' if index == 0 else ''}><summary>{prose(sample['label'])} "
            yield f'<span class="status {good}">{sample["x-status"]}</span></summary>'
            yield from _code("Request", escape(sample["source"]), copied=True)
            answer = sample.get("x-answer")
            if answer is not None:
                yield from _code("Answer", escape(answer) if isinstance(answer, str) else _json(answer))
            yield "</details>"


def _code(label: str, html: str, *, copied: bool = False) -> Iterator[str]:
    mark = " data-copy" if copied else ""
    yield f'<div class="code"{mark}><div class="label">{label}</div>'
    yield f'<pre tabindex="0" role="group" aria-label="{label}">{html}</pre></div>'


def _json(value: Any) -> str:
    """JSON as HTML, the names of its fields marked."""
    text = escape(pretty(value), quote=False)
    return re.sub(r'^( *)("[^"\n]*")(?=:)', r"\1<b>\2</b>", text, flags=re.MULTILINE)


def _headers(response: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(response.get("headers", {}).items())


def _method(method: str) -> str:
    return f'<span class="method {method}">{method.upper()}</span>'


def _path(path: str) -> str:
    """A path that can break between its parts, its parameters marked."""
    return re.sub(r"({\w+})", r"<i>\1</i>", escape(path).replace("/", "/<wbr>"))


def _words(method: str, path: str, operation: dict[str, Any]) -> str:
    return escape(f"{method} {path} {operation['summary']}".lower(), quote=True)


def _described(parameter: dict[str, Any]) -> dict[str, Any]:
    return {"description": parameter["description"]}
