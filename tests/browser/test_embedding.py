"""One line on a website: each site has a chat of its own, the page stays as it was, and little is loaded."""

import json
from typing import Any

from playwright.async_api import Page, expect

from tests.browser.sites import TEXT, Sites, document, tag
from tests.browser.visits import Chat, Visitors
from tests.conftest import PutAgent
from tests.support.spoken import Spoken

MAX_TRANSFER_BYTES = 30 * 1024
STRICT = "default-src 'none'; base-uri 'none'; form-action 'none'; script-src {gateway}; connect-src {gateway}"
RUDE = """<style>
  * { color: rgb(255, 0, 0) !important; font-size: 40px !important; background: rgb(0, 0, 255) !important; }
  div, section, button, textarea { display: none !important; margin: 50px !important; opacity: .5 !important; }
  :root { --accent: red; --paper: red; direction: rtl; }
</style>"""
HOLD_IDLE = """
  const waiting = [];
  window.requestIdleCallback = (work) => waiting.push(work);
  window.becomeIdle = () => waiting.splice(0).forEach((work) => work({didTimeout: false, timeRemaining: () => 50}));
"""
STYLES = """(box) => {
  const found = {};
  const style = getComputedStyle(box);
  for (const name of ['color', 'fontSize', 'fontFamily', 'backgroundColor', 'display', 'opacity', 'marginTop', 'width']) {
    found[name] = style[name];
  }
  return found;
}"""


async def test_two_sites_on_one_gateway_are_apart(visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken) -> None:
    visitor = await visitors.come()
    urls = [sites.put(document(TEXT + tag(gateway)), host=host) for host in ("shop.test", "garden.test")]
    shop, garden = [await visitor.go(url) for url in urls]
    for visit, text in ((shop, "From the shop"), (garden, "From the garden")):
        spoken.say(text, f"Answer {text.lower()}", None)
        await visit.chat.open()
        await visit.chat.say(text)
        await expect(visit.chat.saying(f"Answer {text.lower()}")).to_be_visible()
    stored = [await visit.page.evaluate("JSON.stringify(localStorage)") for visit in (shop, garden)]
    assert json.loads(stored[0]).keys() == json.loads(stored[1]).keys()
    assert stored[0] != stored[1]
    for visit, own, other in ((shop, "shop", "garden"), (garden, "garden", "shop")):
        await visit.page.reload()
        await visit.chat.reappear()
        await expect(visit.chat.saying(f"Answer from the {own}")).to_be_visible()
        await expect(visit.chat.saying(f"Answer from the {other}")).to_have_count(0)


async def test_the_id_of_one_sites_session_opens_nothing_on_another(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken
) -> None:
    visitor = await visitors.come()
    page = document(TEXT + tag(gateway))
    shop = await visitor.go(sites.put(page))
    spoken.say("My secret", "It is safe", None)
    await shop.chat.open()
    await shop.chat.say("My secret")
    await expect(shop.chat.saying("It is safe")).to_be_visible()
    stored = await shop.page.evaluate("({...localStorage})")
    thief = await visitor.go(sites.put(page, host="garden.test"))
    await thief.page.evaluate("(stored) => Object.assign(localStorage, stored)", stored)
    await thief.page.reload()
    await thief.chat.open()
    spoken.say("Mine", "Another one", None)
    await thief.chat.say("Mine")
    await expect(thief.chat.saying("Another one").or_(thief.chat.retry_button)).to_be_visible()
    await expect(thief.page.get_by_text("My secret")).to_have_count(0)
    await expect(thief.page.get_by_text("It is safe")).to_have_count(0)


async def test_a_site_that_is_not_allowed_gets_no_chat_and_a_clear_line(
    visitors: Visitors, sites: Sites, gateway: str, put_agent: PutAgent
) -> None:
    await put_agent("choosy", graph="spoken", allowed_domains=["shop.test"])
    page = document(TEXT + tag(gateway, agent="choosy"))
    welcome = await visitors.go(sites.put(page))
    await expect(welcome.chat.launcher).to_be_visible()
    other = await visitors.come()
    visit = await other.go("about:blank")
    async with visit.page.expect_console_message(lambda line: "garden.test" in line.text) as found:
        await visit.page.goto(sites.put(page, host="garden.test"))
    line = await found.value
    assert line.type in ("error", "warning")
    assert "choosy" in line.text
    assert "allowed_domains" in line.text
    await expect(visit.chat.launcher).to_have_count(0)
    assert visit.errors == []


async def test_an_agent_that_does_not_exist_gets_no_chat_and_a_clear_line(
    visitors: Visitors, sites: Sites, gateway: str
) -> None:
    visit = await (await visitors.come()).go("about:blank")
    async with visit.page.expect_console_message(lambda line: "typo" in line.text and "widget.js" not in line.text):
        await visit.page.goto(sites.put(document(TEXT + tag(gateway, agent="typo"))))
    await expect(visit.chat.launcher).to_have_count(0)


async def test_the_pages_styles_do_not_reach_the_chat(visitors: Visitors, sites: Sites, gateway: str) -> None:
    looks: list[Any] = []
    for head in ("", RUDE):
        # Without transitions, which would be looked at midway.
        page = sites.put(document(TEXT + tag(gateway, open="true"), head=head))
        visit = await visitors.go(page, reduced_motion="reduce")
        await expect(visit.chat.box).to_be_visible()
        looks.append([await part.evaluate(STYLES) for part in (visit.chat.box, visit.chat.log, visit.chat.send_button)])
    assert looks[0] == looks[1]


async def test_the_chat_does_not_reach_the_page(visitors: Visitors, sites: Sites, gateway: str) -> None:
    look = """() => ({
      globals: Object.keys(window).sort(), sheets: document.styleSheets.length,
      adopted: document.adoptedStyleSheets.length, html: document.documentElement.className,
      head: document.head.outerHTML, main: document.querySelector('main').outerHTML,
      heading: getComputedStyle(document.querySelector('h1')).cssText, scroll: document.documentElement.scrollWidth,
      body: getComputedStyle(document.body).cssText, cookie: document.cookie, focus: document.activeElement.tagName,
    })"""
    body = TEXT + "<script>customElements.define('shop-thing', class extends HTMLElement {})</script>"
    plain = await (await visitors.go(sites.put(document(body)))).page.evaluate(look)
    visit = await visitors.go(sites.put(document(body + tag(gateway))))
    await expect(visit.chat.launcher).to_be_visible()
    assert await visit.page.evaluate(look) == plain
    added = await visit.page.evaluate("[...document.body.children].filter((one) => one.shadowRoot).length")
    assert added == 1


async def test_it_works_under_a_strict_content_security_policy(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken
) -> None:
    policy = STRICT.format(gateway=gateway)
    spoken.say("Hello", "**Good** [morning](https://example.com)", None)
    page = document(TEXT + tag(gateway)).replace('<link rel="icon" href="data:,">', "")
    visit = await visitors.go(sites.put(page, headers={"Content-Security-Policy": policy}))
    await visit.chat.open()
    assert await visit.chat.box.evaluate("(box) => getComputedStyle(box).resize") == "none", "the styles apply"
    await visit.chat.say("Hello")
    await expect(visit.chat.log.get_by_role("link", name="morning")).to_be_visible()
    assert [line for line in visit.console if "Content Security Policy" in line and "favicon" not in line] == []


async def test_it_works_on_a_page_that_isolates_itself(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken
) -> None:
    """Under such a policy (COEP) a page may load from elsewhere only by CORS, as browsers load modules."""
    policy = {"Cross-Origin-Embedder-Policy": "require-corp", "Cross-Origin-Opener-Policy": "same-origin"}
    # Only a secure context can be isolated, and of plain addresses only localhost is one.
    visit = await visitors.go(sites.put(document(TEXT + tag(gateway)), host="localhost", headers=policy))
    assert await visit.page.evaluate("crossOriginIsolated")
    spoken.say("Hello", "Good morning", None)
    await visit.chat.open()
    await visit.chat.say("Hello")
    await expect(visit.chat.saying("Good morning")).to_be_visible()


async def test_no_cookies_and_no_third_party_requests(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken
) -> None:
    spoken.say("Hello", "Good ![pixel](http://tracker.test/pixel.png) morning", None)
    visitor = await visitors.come()
    visit = await visitor.go(sites.put(document(TEXT + tag(gateway))))
    await visit.chat.open()
    await visit.chat.say("Hello")
    await expect(visit.chat.log).to_contain_text("morning")
    assert await visitor.context.cookies() == []
    origins = {"/".join(one.url.split("/")[:3]) for one in visit.requests if not one.url.startswith("data:")}
    assert origins <= {gateway, sites.origin("shop.test")}
    for request in visit.requests:
        response = await request.response()
        assert response is None or await response.header_value("set-cookie") is None


async def test_all_that_is_loaded_is_at_most_30_kb(visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken) -> None:
    visit = await (await visitors.come()).go("about:blank")
    network = await visit.page.context.new_cdp_session(visit.page)
    urls: dict[str, str] = {}
    sizes: dict[str, float] = {}
    network.on("Network.requestWillBeSent", lambda event: urls.update({event["requestId"]: event["request"]["url"]}))
    network.on("Network.loadingFinished", lambda event: sizes.update({event["requestId"]: event["encodedDataLength"]}))
    await network.send("Network.enable")
    await visit.page.goto(sites.put(document(TEXT + tag(gateway))))
    spoken.say("Hello", "**Good** `morning`", None)
    await visit.chat.open()
    await visit.chat.say("Hello")
    await expect(visit.chat.saying("Good")).to_be_visible()
    loaded = {url: sizes.get(one, 0) for one, url in urls.items() if url.startswith(gateway) and ".js" in url}
    assert loaded
    assert sum(loaded.values()) <= MAX_TRANSFER_BYTES, loaded


async def test_nothing_is_done_before_the_page_is_idle(visitors: Visitors, sites: Sites, gateway: str) -> None:
    visitor = await visitors.come()
    await visitor.context.add_init_script(HOLD_IDLE)
    visit = await visitor.go(sites.put(document(TEXT + tag(gateway))))
    await visit.page.wait_for_load_state("load")
    await visit.page.wait_for_load_state("networkidle")
    asked = [one.url for one in visit.requests if one.url.startswith(gateway)]
    assert all(".js" in url for url in asked), asked
    assert await visit.page.evaluate("[...document.querySelectorAll('*')].filter((one) => one.shadowRoot).length") == 0
    await visit.page.evaluate("becomeIdle()")
    await expect(visit.chat.launcher).to_be_visible()


async def test_options_of_the_line(visitors: Visitors, sites: Sites, gateway: str) -> None:
    line = tag(gateway, title="Ask the gardener", greeting="What grows?", color="#7a1f5c", position="left", open="true")
    visit = await visitors.go(sites.put(document(TEXT + line)))
    chat = Chat(visit.page, "Ask the gardener")
    await expect(chat.panel).to_be_visible()
    await expect(chat.saying("What grows?")).to_be_visible()
    await expect(visit.page.get_by_role("heading", name="Ask the gardener")).to_be_visible()
    place = await chat.panel.bounding_box()
    assert place is not None
    assert place["x"] < 100
    assert await chat.launcher.evaluate("(one) => getComputedStyle(one).backgroundColor") == "rgb(122, 31, 92)"


async def mounted(visitors: Visitors, sites: Sites, gateway: str, options: str, body: str = TEXT) -> Page:
    """A page that calls mount itself."""
    script = f"import {{ mount }} from '{gateway}/widget.js'; window.chat = mount({options});"
    visit = await visitors.go(sites.put(document(f'{body}<script type="module">{script}</script>')))
    return visit.page


async def test_options_of_mount_and_its_texts(visitors: Visitors, sites: Sites, gateway: str) -> None:
    texts = "{ open: 'Hilfe öffnen', placeholder: 'Nachricht schreiben', stop: 'Halt', message: 'Nachricht' }"
    page = await mounted(visitors, sites, gateway, f"{{ agent: 'shop', title: 'Hilfe', open: true, texts: {texts} }}")
    await expect(page.get_by_role("dialog", name="Hilfe")).to_be_visible()
    await expect(page.get_by_placeholder("Nachricht schreiben")).to_be_visible()
    await expect(page.get_by_role("button", name="Hilfe öffnen")).to_be_visible()
    await page.evaluate("chat.close()")
    await expect(page.get_by_role("dialog", name="Hilfe")).to_be_hidden()
    await page.evaluate("chat.open()")
    await expect(page.get_by_role("dialog", name="Hilfe")).to_be_visible()
    await page.evaluate("chat.remove()")
    await expect(page.get_by_role("button", name="Hilfe öffnen")).to_have_count(0)


async def test_inline_in_an_element_of_the_page(visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken) -> None:
    place = '<div id="place" style="width: 420px; height: 500px"></div>'
    options = "{ agent: 'shop', target: document.querySelector('#place') }"
    page = await mounted(visitors, sites, gateway, options, TEXT + place)
    chat = Chat(page)
    await expect(chat.box).to_be_visible()
    await expect(chat.launcher).to_have_count(0)
    inside = await page.evaluate("""() => {
      const outer = document.querySelector('#place').getBoundingClientRect();
      const inner = document.querySelector('#place > *').shadowRoot.querySelector('section').getBoundingClientRect();
      return inner.left >= outer.left && inner.right <= outer.right && inner.top >= outer.top
        && inner.bottom <= outer.bottom + 1;
    }""")
    assert inside
    spoken.say("Hello", "Good morning", None)
    await chat.say("Hello")
    await expect(chat.saying("Good morning")).to_be_visible()


async def test_the_line_on_a_page_twice_is_one_chat(visitors: Visitors, sites: Sites, gateway: str) -> None:
    visit = await visitors.go(sites.put(document(TEXT + tag(gateway) * 2)))
    await expect(visit.chat.launcher).to_have_count(1)
