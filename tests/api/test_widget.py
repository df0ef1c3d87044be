"""The widget's files: compressed, kept as long as may be, and whole in themselves."""

import gzip
import re

import httpx

from gateway.api.widget import without_comments
from tests.support.serving import ROOT

BUDGET_BYTES = 30_000
WIDGET = ROOT / "gateway/widget"
NAMED = re.compile(r"(?:from |import\()'([^']+)'")


async def test_the_embed_is_small_and_every_module_is_reached_and_kept(client: httpx.AsyncClient) -> None:
    """As a browser goes: from the tag's address along the imports, compressed."""
    sizes, to_load = dict[str, int](), ["/widget.js"]
    while to_load:
        url = to_load.pop()
        async with client.stream("GET", url, headers={"Accept-Encoding": "gzip"}) as answer:
            body = b"".join([part async for part in answer.aiter_raw()])
        headers = answer.headers
        assert (answer.status_code, headers["content-encoding"]) == (200, "gzip"), url
        assert headers["content-type"].startswith("text/javascript")
        assert headers["access-control-allow-origin"] == "*"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["vary"].startswith("Accept-Encoding")
        cache = "public, max-age=300" if url == "/widget.js" else "public, max-age=31536000, immutable"
        assert headers["cache-control"] == cache
        sizes[url.rpartition("/")[2]] = len(body) + sum(len(name) + len(value) + 4 for name, value in headers.raw)
        found = {str(httpx.URL(url).join(name)) for name in NAMED.findall(gzip.decompress(body).decode())}
        to_load += [one for one in found if one.rpartition("/")[2] not in sizes and one not in to_load]
    assert sizes.keys() == {file.name for file in WIDGET.glob("*.js")}
    # A page has one language, English or another.
    languages = [size for name, size in sizes.items() if name.startswith("texts-")]
    assert sum(sizes.values()) - sum(languages) + max(languages) <= BUDGET_BYTES


async def test_what_a_browser_has_is_not_sent_again(client: httpx.AsyncClient) -> None:
    """An ETag for each encoding: a cache must not give a client what it cannot read."""
    tags = set()
    for encoding in ("gzip", "identity", "gzip;q=0"):
        accept = {"Accept-Encoding": encoding}
        first = await client.get("/widget.js", headers=accept)
        tags.add(first.headers["etag"])
        assert ("content-encoding" in first.headers) is (encoding == "gzip")
        again = await client.get("/widget.js", headers=accept | {"If-None-Match": f'W/"other", {first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
    assert len(tags) == 2


async def test_a_page_that_knows_another_version_is_sent_to_this_one(client: httpx.AsyncClient) -> None:
    """Pods of two versions serve while one replaces the other."""
    answer = await client.get("/widget/0123456789abcdef/panel.js")
    assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-store")
    assert answer.headers["access-control-allow-origin"] == "*"
    moved = await client.get(answer.url.join(answer.headers["location"]))
    assert moved.status_code == 200
    assert moved.headers["cache-control"].endswith("immutable")
    assert (await client.get("/widget/0123456789abcdef/../../app.py")).status_code == 404
    assert (await client.get("/widget/0123456789abcdef/demo.html")).status_code == 404


def test_only_comments_are_left_out() -> None:
    for file in WIDGET.glob("*.js"):
        lines, sent = file.read_bytes().splitlines(), without_comments(file.read_bytes()).splitlines()
        comments = [line for line in lines if line not in sent]
        assert [line for line in lines if line not in comments] == sent, file.name
        assert all(re.match(rb" *(?:// |/\*\*| \*)", line) for line in comments), file.name
    assert b"MIT License" in without_comments((WIDGET / "streaming-markdown.js").read_bytes())
