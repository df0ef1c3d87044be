"""Everybody can use the chat: no violations by axe-core in any state, keyboard only, small screens, any direction."""

from playwright.async_api import Route, expect

from tests.browser.looks import check, check_in_all_looks
from tests.browser.sites import TEXT, Sites, document, tag
from tests.browser.visits import Visit, Visitors, session_of
from tests.support.spoken import Spoken, SpokenPod

ANSWER = (
    "Of course! Your parcel left **yesterday** and should arrive by Friday.\n\n"
    "1. It is with the carrier, number `RX 4471`\n2. You can [follow it](https://example.com/track)\n\n"
    "Is there anything else?"
)


async def test_axe_finds_nothing_in_any_state(visitors: Visitors, shop: str, spoken: Spoken, chat_pod: SpokenPod) -> None:
    """One visit through all states; in each, both sizes and both colour schemes."""
    visit = await visitors.go(shop)
    chat = visit.chat
    await expect(chat.launcher).to_be_visible()
    await check_in_all_looks(visit, "closed")
    await chat.open()
    await check_in_all_looks(visit, "open")
    await chat.say("Where is my parcel?")
    await spoken.has_started("Where is my parcel?")
    await expect(chat.stop_button).to_be_visible()
    await check_in_all_looks(visit, "waiting")
    spoken.say("Where is my parcel?", ANSWER, None)
    await expect(chat.log).to_contain_text("Is there anything else?")
    await expect(chat.stop_button).to_be_hidden()
    await check_in_all_looks(visit, "answered")
    await chat.say("Yes: can I still change the address?")
    spoken.say("Yes: can I still change the address?", "Let me look. The carrier says that ")
    await expect(chat.log).to_contain_text("The carrier says that")
    await check_in_all_looks(visit, "streaming")
    spoken.say("Yes: can I still change the address?", RuntimeError("told to fail"))
    await expect(chat.retry_button).to_be_visible()
    await check_in_all_looks(visit, "error")
    await visit.page.context.set_offline(True)
    await expect(visit.page.get_by_text("offline").first).to_be_visible()
    await check_in_all_looks(visit, "offline")
    await visit.page.context.set_offline(False)
    await chat_pod.client.post(f"/api/sessions/{await session_of(visit.page)}/end")
    spoken.say("One more thing", "Sure, ask away.", None)
    await chat.say("One more thing")
    await expect(chat.saying("Sure, ask away.")).to_be_visible()
    await check_in_all_looks(visit, "ended")
    await chat.new_button.click()
    await check_in_all_looks(visit, "question")
    await visit.page.get_by_role("button", name="Keep this one").click()
    await chat.say("And now?")
    await spoken.has_started("And now?")
    await chat.box.press("Escape")
    spoken.say("And now?", "It is there.", None)
    await expect(chat.launcher).to_contain_text("1")
    await check_in_all_looks(visit, "unread")


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
    await reads_out_once(await visitors.go(shop), spoken)


async def reads_out_once(visit: Visit, spoken: Spoken) -> None:
    await visit.chat.open()
    await visit.page.evaluate("""() => {
      window.heard = [];
      const root = [...document.querySelectorAll('*')].find((one) => one.shadowRoot).shadowRoot;
      const live = (node) => {
        const element = node.nodeType === 1 ? node : node.parentElement;
        const one = element?.closest('[aria-live], [role=log], [role=status], [role=alert]');
        if (!one) return null;
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
    log, box = visit.page.get_by_role("log"), visit.page.get_by_role("textbox")
    await expect(box).to_be_visible()
    for message, answer in (("مرحبا", "أهلا وسهلا"), ("Hello", "Good morning")):
        spoken.say(message, answer, None)
        await box.fill(message)
        await box.press("Enter")
        await expect(log.get_by_text(answer, exact=True)).to_be_visible()
        mine, theirs = [await log.get_by_text(text, exact=True).bounding_box() for text in (message, answer)]
        assert mine
        assert theirs
        assert mine["x"] < theirs["x"], "the visitor's own messages are at the end of the line: on the left"
    assert await box.evaluate("(box) => getComputedStyle(box).direction") == "rtl", "and so is the placeholder"
    # The corner that points to the speaker is at the speaker's side, in whatever language it is said.
    corners = await log.evaluate("""(log) => [...log.querySelectorAll('.text')].map((one) => {
      const { borderBottomLeftRadius: left, borderBottomRightRadius: right } = getComputedStyle(one);
      return [one.parentElement.classList.contains('user'), parseFloat(left) < parseFloat(right)];
    })""")
    assert len(corners) == 5
    assert all(user == left for user, left in corners), corners
    await visit.shoot("right-to-left")
    await check(visit)


async def test_a_screen_of_320_pixels(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop, size={"width": 320, "height": 568})
    chat = visit.chat
    await chat.open()
    await chat.say("Where is my parcel?")
    spoken.say("Where is my parcel?", ANSWER, None)
    await expect(chat.log).to_contain_text("Is there anything else?")
    await chat.say("And the second one?")
    spoken.say("And the second one?", RuntimeError("told to fail"))
    await expect(chat.retry_button).to_be_visible()
    await visit.shoot("small-screen")
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
    await visit.chat.reappear()
    await visit.page.unroute("**/api/sessions/**")
    again = visit.page.get_by_role("button", name="again")
    await expect(again.or_(visit.chat.saying("Good morning"))).to_be_visible()
    if await again.is_visible():
        await again.click()
    await expect(visit.chat.saying("Good morning")).to_have_count(1)
