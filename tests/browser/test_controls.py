"""The widget without its guards: each scenario holds, and with one guard taken out of the module that is served it fails.

A guard that has changed and is not found any more fails its test.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from playwright.async_api import Route, expect

from tests.browser.sites import TEXT, Sites, document, tag
from tests.browser.test_access import reads_out_once
from tests.browser.test_answers import attacked, harmless
from tests.browser.test_embedding import HOLD_IDLE, STRICT
from tests.browser.visits import Visit, Visitor, Visitors
from tests.conftest import PutAgent
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, SpokenPod

AT_ONCE_S = 1.5


@dataclass
class Stage:
    """A visitor on a site; `patience_s` is for what should come."""

    visitor: Visitor
    sites: Sites
    gateway: str
    spoken: Spoken
    patience_s: float

    async def go(self, line: str = "", *, host: str = "shop.test", headers: dict[str, str] | None = None) -> Visit:
        page = document(TEXT + (line or tag(self.gateway))).replace('<link rel="icon" href="data:,">', "")
        return await self.visitor.go(self.sites.put(page, host=host, headers=headers))

    async def sees(self, visit: Visit, text: str) -> None:
        """It is in the chat, once."""
        await expect(visit.chat.saying(text)).to_have_count(1, timeout=self.patience_s * 1000)


async def a_script_link_leads_nowhere(stage: Stage) -> None:
    visit = await stage.go()
    await visit.chat.open()
    await attacked(visit, stage.spoken, "[click](javascript:window.hurt='link')")
    await harmless(visit)


async def a_tag_stays_text(stage: Stage) -> None:
    visit = await stage.go()
    await visit.chat.open()
    await attacked(visit, stage.spoken, "<img src=x onerror=\"window.hurt = 'img'\">")
    await harmless(visit)


async def an_image_is_a_link(stage: Stage) -> None:
    visit = await stage.go()
    await visit.chat.open()
    await attacked(visit, stage.spoken, "![x](http://thief.test/pixel.png)")
    await harmless(visit)


async def agents_have_sessions_of_their_own(stage: Stage) -> None:
    visit = await stage.go(
        f"<script type=module>import * as all from '{stage.gateway}/widget.js'; window.all = all</script>"
    )
    await visit.page.wait_for_function("window.all")
    ids = await visit.page.evaluate("['one', 'two'].map((agent) => all.SessionManager.getInstance(agent).getSessionId())")
    assert ids[0] != ids[1]


async def a_site_that_is_not_allowed_is_told_so(stage: Stage) -> None:
    visit = await stage.go(tag(stage.gateway, agent="choosy"), host="garden.test")
    await wait_for(lambda: any("allowed_domains" in line for line in visit.console), "the line", stage.patience_s)
    assert await visit.chat.launcher.count() == 0


async def it_works_under_a_strict_policy(stage: Stage) -> None:
    visit = await stage.go(headers={"Content-Security-Policy": STRICT.format(gateway=stage.gateway)})
    await visit.chat.launcher.wait_for()
    assert await visit.chat.launcher.evaluate("(one) => getComputedStyle(one).position") == "fixed"
    assert [line for line in visit.console if "Content Security Policy" in line and "favicon" not in line] == []


async def a_message_outlives_its_page(stage: Stage) -> None:
    """It had not arrived when the page was reloaded."""
    visit = await stage.go()

    hung: list[str] = []

    async def hang(route: Route) -> None:
        if route.request.method == "POST" and not hung:
            hung.append(route.request.url)
        else:
            await route.fallback()

    await visit.chat.open()
    await visit.page.route("**/api/chat/**", hang)
    stage.spoken.say("Hello", "Good morning", None)
    await visit.chat.say("Hello")
    await wait_for(lambda: hung, "it is sent")
    await visit.page.reload()
    await visit.chat.reappear()
    await stage.sees(visit, "Good morning")


async def a_message_that_did_not_arrive_is_sent_again(stage: Stage) -> None:
    visit = await lose_first_answer(stage, reached=False)
    await stage.sees(visit, "Good morning")


async def lose_first_answer(stage: Stage, *, reached: bool = True) -> Visit:
    """The first attempt reaches the gateway, or not even that; its answer is lost."""
    visit = await stage.go()
    lost: list[str] = []

    async def lose(route: Route) -> None:
        if route.request.method != "POST" or lost:
            await route.fallback()
            return
        lost.append(route.request.url)
        if reached:
            await route.fetch(url=route.request.url.replace("gateway.test", "127.0.0.1"))
        await route.abort("connectionreset")

    await visit.page.route("**/api/chat/**", lose)
    await visit.chat.open()
    stage.spoken.say("Hello", "Good morning", None)
    await visit.chat.say("Hello")
    await wait_for(lambda: lost, "the answer is lost")
    return visit


async def a_message_is_answered_once(stage: Stage) -> None:
    visit = await lose_first_answer(stage)
    await stage.sees(visit, "Good morning")
    assert stage.spoken.started == ["Hello"]


async def what_is_said_while_a_conversation_ends_is_for_the_next(stage: Stage) -> None:
    visit = await stage.go()
    await visit.chat.open()
    stage.spoken.say("Hello", "Good morning", None)
    await visit.chat.say("Hello")
    await stage.sees(visit, "Good morning")
    asked, may_end = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        asked.set()
        await may_end.wait()
        await route.continue_()

    await visit.page.route("**/end", hold)
    await visit.chat.begin_anew()
    await asked.wait()
    stage.spoken.say("Again", "Welcome back", None)
    await visit.chat.say("Again")
    await visit.page.evaluate("() => new Promise(requestAnimationFrame)")
    may_end.set()
    await stage.sees(visit, "Welcome back")
    await stage.sees(visit, "Again")
    await expect(visit.chat.saying("Good morning")).to_have_count(0)
    first, second = (body["session_id"] for body in visit.posted("/stream"))
    assert first != second


async def what_the_transcript_has_is_shown_once(stage: Stage) -> None:
    visit = await stage.go()
    await visit.chat.open()
    stage.spoken.say("Hello", "Good morning", None)
    async with visit.page.expect_response("**/messages?*") as read:
        await visit.chat.say("Hello")
    await (await read.value).finished()
    await stage.sees(visit, "Good morning")
    await expect(visit.chat.log.locator("time")).to_have_count(1)
    await stage.sees(visit, "Hello")


async def an_answer_is_read_out_once(stage: Stage) -> None:
    visit = await stage.go()
    await reads_out_once(visit, stage.spoken)


async def words_being_composed_are_not_sent(stage: Stage) -> None:
    visit = await stage.go()
    await visit.chat.open()
    await visit.chat.box.fill("Hello")
    await visit.chat.box.dispatch_event("keydown", {"key": "Enter", "bubbles": True, "isComposing": True})
    assert await visit.chat.box.input_value() == "Hello"


async def nothing_is_done_before_the_page_is_idle(stage: Stage) -> None:
    await stage.visitor.context.add_init_script(HOLD_IDLE)
    visit = await stage.go()
    await visit.page.wait_for_load_state("networkidle")
    assert await visit.page.evaluate("[...document.querySelectorAll('*')].filter((one) => one.shadowRoot).length") == 0


async def a_hidden_page_holds_no_connection(stage: Stage) -> None:
    visit = await stage.go()
    ended: list[str] = []
    visit.page.on("requestfailed", lambda request: ended.append(request.url))
    stage.spoken.say("Hello", "Good morning", None)
    await visit.chat.open()
    async with visit.page.expect_request("**/events"):
        await visit.chat.say("Hello")
    await visit.page.evaluate("""() => {
      Object.defineProperty(document, 'hidden', { configurable: true, get: () => true });
      document.dispatchEvent(new Event('visibilitychange'));
    }""")
    await wait_for(lambda: any(url.endswith("/events") for url in ended), "the feed is closed", stage.patience_s)


Scenario = Callable[[Stage], Awaitable[None]]
CONTROLS: list[tuple[Scenario, str, str, str]] = [
    (
        a_script_link_leads_nowhere,
        "markdown.js",
        "['http:', 'https:', 'mailto:'].includes(url.protocol) ? url.href : null",
        "url.href",
    ),
    (
        a_tag_stays_text,
        "markdown.js",
        "if (node.lastChild instanceof Text) node.lastChild.appendData(this.#pending);\nelse node.append(this.#pending);",
        "node.insertAdjacentHTML('beforeend', this.#pending);",
    ),
    (an_image_is_a_link, "markdown.js", "[md.IMAGE]: 'a'", "[md.IMAGE]: 'img'"),
    (
        agents_have_sessions_of_their_own,
        "session.js",
        "agentId ? `gateway_session:${agentId}` : 'gateway_session'",
        "'gateway_session'",
    ),
    (a_site_that_is_not_allowed_is_told_so, "launcher.js", "'domain_not_allowed', ", ""),
    (
        it_works_under_a_strict_policy,
        "launcher.js",
        "root.adoptedStyleSheets = [sheet(STYLE)];",
        "root.append(el('style', {}, STYLE));",
    ),
    (
        a_message_outlives_its_page,
        "delivery.js",
        "session.keepPending({ sessionId: session.getSessionId(), messageId, text, failed })",
        "{}",
    ),
    (
        a_message_that_did_not_arrive_is_sent_again,
        "service.js",
        "problem.code === 'unreachable' || problem.passes || (turnId",
        "false && (turnId",
    ),
    (a_message_is_answered_once, "service.js", "message_id: messageId,", "message_id: randomHex(16),"),
    (what_is_said_while_a_conversation_ends_is_for_the_next, "panel.js", "if (ending) await ending;", ""),
    (
        what_the_transcript_has_is_shown_once,
        "transcript.js",
        "(one) => one.id === id || (one",
        "(one) => one.id === id && (one",
    ),
    (an_answer_is_read_out_once, "transcript.js", "'aria-live': 'off'", "'aria-live': 'polite'"),
    (words_being_composed_are_not_sent, "composer.js", " || event.isComposing || event.keyCode === 229", ""),
    (
        nothing_is_done_before_the_page_is_idle,
        "widget.js",
        "whenIdle(() => mount(optionsOf(dataset)));",
        "mount(optionsOf(dataset));",
    ),
    (a_hidden_page_holds_no_connection, "panel.js", "document.hidden ? feed.close() : catchUp()", "catchUp()"),
]


async def take_out(visitor: Visitor, pod: SpokenPod, file: str, guard: str, instead: str) -> None:
    """This visitor is served one of the modules without a guard."""
    entry = (await pod.client.get("/widget.js")).text
    path = "/widget.js"
    if file != "widget.js":
        version = re.search(r"\./widget/(\w+)/", entry)
        assert version
        path = f"/widget/{version[1]}/{file}"
    source = (await pod.client.get(path)).text
    assert source.count(guard) == 1, f"{file} has no such guard (any more): {guard}"
    changed = source.replace(guard, instead)

    async def serve(route: Route) -> None:
        headers = {"Access-Control-Allow-Origin": "*"}
        await route.fulfill(body=changed, content_type="text/javascript", headers=headers)

    await visitor.context.route(f"**{path}", serve)


@pytest.mark.parametrize(
    ("scenario", "file", "guard", "instead"), CONTROLS, ids=[scenario.__name__ for scenario, *_ in CONTROLS]
)
async def test_it_holds_and_not_without_its_guard(
    visitors: Visitors,
    sites: Sites,
    gateway: str,
    spoken: Spoken,
    chat_pod: SpokenPod,
    put_agent: PutAgent,
    scenario: Scenario,
    file: str,
    guard: str,
    instead: str,
) -> None:
    await put_agent("choosy", graph="spoken", allowed_domains=["shop.test"])
    await scenario(Stage(await visitors.come(), sites, gateway, spoken, 10))
    await spoken.begin_anew()
    visitor = await visitors.come()
    await take_out(visitor, chat_pod, file, guard, instead)
    with pytest.raises(AssertionError):
        await scenario(Stage(visitor, sites, gateway, spoken, AT_ONCE_S))
