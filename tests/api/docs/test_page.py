"""The page at /docs: it says what the OpenAPI document says, and loads nothing."""

import re
from base64 import b64encode
from hashlib import sha256
from html import unescape

import httpx


async def test_the_page_shows_every_call_with_its_fields_and_errors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    page = unescape((await client.get("/docs")).text)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            article = page.partition(f'<article id="{operation["operationId"]}"')[2].partition("</article>")[0]
            assert path in article
            assert operation["summary"] in article
            for parameter in operation.get("parameters", []):
                assert f"<code>{parameter['name']}</code>" in article, (path, parameter["name"])
            for status in operation["responses"]:
                assert f"<code>{status}</code>" in article, (path, status)
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                for field in document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]:
                    assert f"<code>{field}</code>" in article, (path, field)


async def test_the_page_loads_nothing_and_may_not(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r'(?:src|href|action)="(?!#)([^"]*)"', answer.text) == ["openapi.json"]
    assert "@import" not in answer.text
    assert "url(" not in answer.text
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for element in ("style", "script"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert re.findall(r'\s(?:style|on\w+)="', answer.text) == []
