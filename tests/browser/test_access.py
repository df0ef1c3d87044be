"""Everybody can use the chat: no violations by axe-core in any state, keyboard only, small screens, any direction."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Route, expect

from tests.browser.sites import TEXT, Sites, document, tag
from tests.browser.visits import DESKTOP, PHONE, Scheme, Visit, Visitors
from tests.support.spoken import Spoken, SpokenPod

ANSWER = (
    "Of course! Your parcel left **yesterday** and should arrive by Friday.\n\n"
    "1. It is with the carrier, number `RX 4471`\n2. You can [follow it](https://example.com/track)\n\n"
    "Is there anything else?"
)
Stage = Callable[[Visit, Spoken, SpokenPod], Awaitable[None]]


async def closed(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await expect(visit.chat.launcher).to_be_visible()


async def opened(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await visit.chat.open()


async def streaming(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await visit.chat.open()
    spoken.say("Where is my parcel?", ANSWER, None)
    await visit.chat.say("Where is my parcel?")
    await expect(visit.chat.log).to_contain_text("Is there anything else?")
    await visit.chat.say("Yes: can I still change the address?")
    await spoken.has_started("Yes: can I still change the address?")
    spoken.say("Yes: can I still change the address?", "Let me look. The carrier says that ")
    await expect(visit.chat.log).to_contain_text("The carrier says that")
    await expect(visit.chat.stop_button).to_be_visible()


async def waiting(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await visit.chat.open()
    await visit.chat.say("Where is my parcel?")
    await spoken.has_started("Where is my parcel?")
    await expect(visit.chat.stop_button).to_be_visible()


async def answered(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await visit.chat.open()
    spoken.say("Where is my parcel?", ANSWER, None)
    await visit.chat.say("Where is my parcel?")
    await expect(visit.chat.log).to_contain_text("Is there anything else?")
    await expect(visit.chat.stop_button).to_be_hidden()


async def failed(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await answered(visit, spoken, pod)
    await visit.chat.say("And the second one?")
    spoken.say("And the second one?", RuntimeError("told to fail"))
    await expect(visit.chat.retry_button).to_be_visible()


async def offline(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await answered(visit, spoken, pod)
    await visit.page.context.set_offline(True)
    await expect(visit.page.get_by_text("offline").first).to_be_visible()


async def ended(visit: Visit, spoken: Spoken, pod: SpokenPod) -> None:
    await answered(visit, spoken, pod)
    session_id = await visit.page.evaluate("JSON.stringify(localStorage).match(/session_\\d+_[0-9a-z]+/)[0]")
    await pod.client.post(f"/api/sessions/{session_id}/end")
    spoken.say("One more thing", "Sure, ask away.", None)
    await visit.chat.say("One more thing")
    await expect(visit.chat.log).to_contain_text("Sure, ask away.")


STAGES: dict[str, Stage] = {
    "closed": closed,
    "open": opened,
    "waiting": waiting,
    "streaming": streaming,
    "answered": answered,
    "error": failed,
    "offline": offline,
    "ended": ended,
}


def complaints(found: dict[str, Any]) -> list[str]:
    """What axe-core found wrong, with the places."""
    return [
        f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
    ]


async def check(visit: Visit) -> None:
    """No violations, best practices included."""
    assert complaints((await Axe().run(visit.page)).response) == []


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_axe_finds_nothing(
    visitors: Visitors, shop: str, spoken: Spoken, chat_pod: SpokenPod, stage: Stage, scheme: Scheme, size: dict[str, int]
) -> None:
    visit = await visitors.go(shop, scheme=scheme, size=size)
    await stage(visit, spoken, chat_pod)
    await visit.shoot(f"{stage.__name__}-{'phone' if size is PHONE else 'desktop'}-{scheme}")
    await check(visit)


async def test_with_the_keyboard_alone(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    chat, keyboard = visit.chat, visit.page.keyboard
    await expect(chat.launcher).to_be_visible()
    await keyboard.press("Tab")
    await keyboard.press("Tab")
    await expect(chat.launcher).to_be_focused()
    await keyboard.press("Enter")
    await expect(chat.box).to_be_focused()
    await keyboard.type("Hello")
    await keyboard.press("Enter")
    await spoken.has_started("Hello")
    await expect(chat.box).to_be_focused()
    spoken.say("Hello", "Good [morning](https://example.com)")
    await expect(chat.log).to_contain_text("morning")
    await expect(chat.box).to_be_focused()
    spoken.end("Hello")
    await expect(chat.stop_button).to_be_hidden()
    await expect(chat.box).to_be_focused()
    # Shift+Enter is a new line, not the end.
    await keyboard.type("One")
    await keyboard.press("Shift+Enter")
    await keyboard.type("two")
    await expect(chat.box).to_have_value("One\ntwo")
    # All is reached by Tab, and Escape closes and gives the focus back.
    names = set()
    for _ in range(12):
        await keyboard.press("Shift+Tab")
        names.add(
            await visit.page.evaluate("""() => {
          const one = document.activeElement.shadowRoot?.activeElement;
          return one && (one.getAttribute('aria-label') || one.textContent.trim() || one.title);
        }""")
        )
    assert {"Conversation", "morning"} <= names
    assert any("Close" in (name or "") for name in names)
    assert any("New conversation" in (name or "") for name in names)
    await chat.box.focus()
    await keyboard.press("Escape")
    await expect(chat.panel).to_be_hidden()
    await expect(chat.launcher).to_be_focused()


async def test_stop_and_retry_keep_the_focus_in_the_chat(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    await visit.chat.say("Hello")
    await spoken.has_started("Hello")
    await visit.chat.stop_button.focus()
    await visit.page.keyboard.press("Enter")
    await expect(visit.chat.stop_button).to_be_hidden()
    await expect(visit.chat.box).to_be_focused()
    await visit.chat.say("Again")
    spoken.say("Again", RuntimeError("told to fail"))
    await expect(visit.chat.retry_button).to_be_visible()
    spoken.say("Again", "Good", None)
    await visit.chat.retry_button.focus()
    await visit.page.keyboard.press("Enter")
    await expect(visit.chat.saying("Good")).to_be_visible()
    await expect(visit.chat.box).to_be_focused()


async def test_a_screen_reader_is_told_an_answer_once(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """A live region that changes with each piece would be read again and again: it is told when the answer is whole."""
    visit = await visitors.go(shop)
    await visit.chat.open()
    await visit.page.evaluate("""() => {
      window.heard = [];
      const root = [...document.querySelectorAll('*')].find((one) => one.shadowRoot).shadowRoot;
      const live = (node) => {
        const element = node.nodeType === 1 ? node : node.parentElement;
        const one = element?.closest('[aria-live], [role=log], [role=status], [role=alert]');
        if (!one || one.closest('[aria-busy=true]')) return null;
        const says = one.getAttribute('aria-live') ?? (one.getAttribute('role') === 'alert' ? 'assertive' : 'polite');
        return says === 'off' ? null : one;
      };
      new MutationObserver((changes) => {
        for (const { target, addedNodes, type } of changes) {
          const nodes = type === 'characterData' ? [target] : [...addedNodes];
          for (const node of nodes) {
            if (node.isConnected && live(node) && node.textContent.trim()) window.heard.push(node.textContent.trim());
          }
        }
      }).observe(root, { subtree: true, childList: true, characterData: true });
    }""")
    await visit.chat.say("Hello")
    await spoken.has_started("Hello")
    for piece in ("Good ", "morning ", "to you "):
        spoken.say("Hello", piece)
        await expect(visit.chat.log).to_contain_text(piece.strip())
    spoken.end("Hello")
    await expect(visit.chat.stop_button).to_be_hidden()
    await visit.page.wait_for_function("heard.some((text) => text.includes('Good morning to you'))")
    heard: list[str] = await visit.page.evaluate("heard")
    assert len([text for text in heard if "Good" in text]) == 1, heard


async def test_from_right_to_left(visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken) -> None:
    line = tag(gateway, title="دردشة", open="true")
    visit = await visitors.go(sites.put(document(TEXT + line, language='lang="ar" dir="rtl"')))
    await expect(visit.chat.box).to_be_visible()
    spoken.say("مرحبا", "أهلا وسهلا", None)
    await visit.chat.say("مرحبا")
    await expect(visit.chat.saying("أهلا وسهلا")).to_be_visible()
    mine, theirs = [await visit.chat.saying(text).bounding_box() for text in ("مرحبا", "أهلا وسهلا")]
    assert mine and theirs
    assert mine["x"] < theirs["x"], "the visitor's own messages are at the end of the line: on the left"
    await visit.shoot("right-to-left")
    await check(visit)


async def test_a_screen_of_320_pixels(visitors: Visitors, shop: str, spoken: Spoken, chat_pod: SpokenPod) -> None:
    visit = await visitors.go(shop, size={"width": 320, "height": 568})
    await failed(visit, spoken, chat_pod)
    await visit.shoot("small-screen")
    chat = visit.chat
    for part in (chat.panel, chat.box, chat.send_button, chat.close_button.first, chat.new_button):
        place = await part.bounding_box()
        assert place is not None
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= 320
    assert await visit.page.evaluate("document.documentElement.scrollWidth") <= 320
    await check(visit)


async def test_reduced_motion(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop, reduced_motion="reduce")
    await visit.chat.open()
    await visit.chat.say("Hello")
    await spoken.has_started("Hello")
    await expect(visit.chat.stop_button).to_be_visible()
    running = await visit.page.evaluate("""() => {
      const root = [...document.querySelectorAll('*')].find((one) => one.shadowRoot).shadowRoot;
      return root.getAnimations().filter((one) => one.playState === 'running').length;
    }""")
    assert running == 0


async def test_the_transcript_that_failed_to_load_can_be_asked_for_again(
    visitors: Visitors, shop: str, spoken: Spoken
) -> None:
    visit = await visitors.go(shop)
    spoken.say("Hello", "Good morning", None)
    await visit.chat.open()
    await visit.chat.say("Hello")
    await expect(visit.chat.saying("Good morning")).to_be_visible()

    async def refuse(route: Route) -> None:
        await route.fulfill(status=503, body="out of order", headers={"Access-Control-Allow-Origin": "*"})

    await visit.page.route("**/api/sessions/**", refuse)
    await visit.page.reload()
    await visit.chat.show()
    await visit.page.unroute("**/api/sessions/**")
    again = visit.page.get_by_role("button", name="again")
    await expect(again.or_(visit.chat.saying("Good morning"))).to_be_visible()
    if await again.is_visible():
        await again.click()
    await expect(visit.chat.saying("Good morning")).to_have_count(1)
