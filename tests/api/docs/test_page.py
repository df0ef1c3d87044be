"""The page at /docs: it says what the OpenAPI document says, and loads nothing."""

import re
from base64 import b64encode
from hashlib import sha256
from html import unescape

import httpx

from gateway.api.docs.example import pretty


def article_of(page: str, name: str) -> str:
    """The part of the page about one call."""
    return page.partition(f'<article id="{name}"')[2].partition("</article>")[0]


def text_of(html: str) -> str:
    """What a browser shows of HTML."""
    return unescape(re.sub(r"<[^>]+>", "", html))


async def test_the_page_shows_every_call_with_its_fields_and_errors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    page = (await client.get("/docs")).text
    for path, operations in document["paths"].items():
        for operation in operations.values():
            article = article_of(page, operation["operationId"])
            text = text_of(article)
            for shown in (path, operation["summary"], operation.get("description", "").replace("`", "")):
                assert shown in text, path
            for parameter in operation.get("parameters", []):
                assert f"<code>{parameter['name']}</code>" in article, (path, parameter["name"])
                assert parameter["description"].replace("`", "") in text, (path, parameter["name"])
            for status in operation["responses"]:
                assert f"<code>{status}</code>" in article, (path, status)
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                fields = document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
                for name, field in fields.items():
                    assert f"<code>{name}</code>" in article, (path, name)
                    assert field["description"].replace("`", "") in text, (path, name)


async def test_the_page_shows_every_example(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    page = (await client.get("/docs")).text
    for path, operations in document["paths"].items():
        for operation in operations.values():
            text = text_of(article_of(page, operation["operationId"]))
            for sample in operation["x-codeSamples"]:
                assert f"{sample['label']} {sample['x-status']}" in text, path
                assert sample["source"] in text, path
                answer = sample.get("x-answer", "")
                shown = answer if isinstance(answer, str) else pretty(answer)
                assert shown in text, (path, sample["label"])


async def test_the_page_shows_every_kind_of_event_and_every_code(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    page = (await client.get("/docs")).text
    for event in document["components"]["schemas"]["Event"]["oneOf"]:
        assert f"<h3><code>{event['title']}</code></h3>" in page
        assert event["description"] in text_of(page)
        assert event["examples"][0]["data"] in text_of(page)
    for response in document["components"]["responses"].values():
        for code in response["content"]["application/problem+json"]["examples"]:
            assert f"<dt><code>{code}</code>" in page


async def test_the_page_loads_nothing_and_may_not(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    markup = re.sub(r"<(style|script|pre)\b.*?</\1>", "", answer.text, flags=re.DOTALL)
    assert re.findall(r'(?:src|href|action)="(?!#)([^"]*)"', markup) == ["openapi.json"]
    assert re.findall(r"<(?:img|link|iframe|form)\b", markup) == []
    assert "@import" not in answer.text
    assert "url(" not in answer.text
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for element in ("style", "script"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert re.findall(r'\s(?:style|on\w+)="', answer.text) == []
