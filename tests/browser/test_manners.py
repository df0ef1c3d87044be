"""What visitors and site owners are used to from other chats: unread answers, scrolling, languages, pages of every kind."""

from typing import Any

import pytest
from playwright.async_api import Page, Route, expect

from tests.browser.looks import check
from tests.browser.sites import TEXT, Sites, document, tag
from tests.browser.visits import PHONE, Chat, Visitors, session_of
from tests.conftest import PutAgent
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, SpokenPod


async def test_answers_that_come_while_it_is_closed_are_counted(
    visitors: Visitors, sites: Sites, shop: str, gateway: str, spoken: Spoken
) -> None:
    next_page = sites.put(document(TEXT + tag(gateway)), path="/next")
    visit = await visitors.go(shop)
    chat = visit.chat
    await chat.open()
    await chat.say("Hello")
    await spoken.has_started("Hello")
    await chat.close_button.click()
    spoken.say("Hello", "Good morning", None)
    await expect(visit.page.get_by_role("button", name="New messages: 1")).to_be_visible()
    # On to the next page: the count is kept there until the answer is read, and then it is gone.
    await visit.page.goto(next_page)
    await visit.page.get_by_role("button", name="New messages: 1").click()
    await expect(chat.saying("Good morning")).to_be_visible()
    await expect(visit.page.get_by_role("button", name="New messages")).to_have_count(0)
    # The page is left while the answer is made.
    await chat.say("And you?")
    await spoken.has_started("And you?")
    await chat.box.press("Escape")
    await visit.page.goto(shop)
    await expect(chat.launcher).to_be_visible()
    spoken.say("And you?", "Very well", None)
    await visit.page.get_by_role("button", name="New messages: 1").click()
    await expect(chat.saying("Very well")).to_have_count(1)
    assert spoken.started == ["Hello", "And you?"]


async def test_the_log_follows_only_who_is_at_its_end(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    chat = visit.chat
    top = "(log) => Math.round(log.scrollTop)"
    left = "(log) => Math.round(log.scrollHeight - log.scrollTop - log.clientHeight)"
    await chat.open()
    await chat.say("Hello")
    await spoken.has_started("Hello")
    for number in range(40):
        spoken.say("Hello", f"Line {number}\n\n")
    await expect(chat.saying("Line 38")).to_be_visible()
    assert await chat.log.evaluate(left) <= 1
    await chat.log.evaluate("(log) => log.scrollTo(0, 100)")
    latest = visit.page.get_by_role("button", name="Newest messages")
    await expect(latest).to_be_visible()
    await visit.shoot("newest")
    await check(visit)
    before = await chat.log.evaluate(top)
    spoken.say("Hello", "One more\n\nThe end", None)
    await expect(chat.saying("The end")).to_have_count(1)
    assert await chat.log.evaluate(top) == before, "what is being read stays where it is"
    await latest.click()
    await expect(latest).to_be_hidden()
    assert await chat.log.evaluate(left) <= 1
    await expect(chat.box).to_be_focused()


async def test_words_that_are_being_composed_are_not_sent(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """With an input method, Enter takes the word that is proposed; Safari says so by the code 229 alone."""
    visit = await visitors.go(shop)
    await visit.chat.open()
    await visit.chat.box.fill("にほん")
    for how in ({"isComposing": True}, {"keyCode": 229}):
        await visit.chat.box.dispatch_event("keydown", {"key": "Enter", "bubbles": True, "composed": True, **how})
    await expect(visit.chat.box).to_have_value("にほん")
    spoken.say("にほん", "Yes", None)
    await visit.chat.box.press("Enter")
    await expect(visit.chat.saying("Yes")).to_be_visible()
    assert spoken.started == ["にほん"]


async def test_wide_things_scroll_by_themselves(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    cells = "| " + " | ".join(["column"] * 12) + " |\n|" + "---|" * 12 + "\n| " + " | ".join(["x"] * 12) + " |\n"
    spoken.say("Hello", f"{'w' * 300}\n\n```\n{'x = 1; ' * 60}\n```\n\n{cells}\nThe end", None)
    await visit.chat.say("Hello")
    await expect(visit.chat.saying("The end")).to_be_visible()
    wide = visit.chat.log.locator(".wide")
    await expect(wide).to_have_count(2)
    assert await wide.evaluate_all("(all) => all.every((one) => one.scrollWidth > one.clientWidth)")
    assert await visit.chat.log.evaluate("(log) => log.scrollWidth <= log.clientWidth")
    await visit.shoot("wide-things")
    await check(visit)


async def test_earlier_messages_are_shown_when_asked_for(
    visitors: Visitors, shop: str, spoken: Spoken, chat_pod: SpokenPod
) -> None:
    """A transcript of 70 turns, restored: the newest 50 messages, then the others, in order and each once."""
    session_id = "session_1700000000000_of_a_long_talk"
    for number in range(70):
        spoken.say(f"Question {number}", f"Answer {number}", None)
        asked = await chat_pod.ask(f"Question {number}", session_id, metadata={"website_domain": "shop.test"})
        assert asked.status_code == 200, asked.text
    visitor = await visitors.come()
    await visitor.context.add_init_script(f"localStorage.setItem('gateway_session:shop', '{session_id}')")
    visit = await visitor.go(shop)
    chat = visit.chat
    await chat.open()
    await expect(chat.saying("Answer 69")).to_be_visible()
    await expect(chat.log.locator("time").first).to_be_visible()
    said = "(log) => [...log.querySelectorAll('.text')].map((one) => one.textContent).slice(1)"
    expected = [text for number in range(70) for text in (f"Question {number}", f"Answer {number}")]
    assert await chat.log.evaluate(said) == expected[-50:]
    more = visit.page.get_by_role("button", name="Show earlier messages")
    for shown in (100, 140):
        first = chat.saying(f"Question {70 - (shown - (50 if shown == 100 else 40)) // 2}")
        await more.scroll_into_view_if_needed()
        place = await first.bounding_box()
        await more.click()
        await expect(chat.log.locator(".text")).to_have_count(shown + 1)
        assert await chat.log.evaluate(said) == expected[-shown:]
        now = await first.bounding_box()
        assert place
        assert now
        assert abs(place["y"] - now["y"]) < 60, "what was read stays about where it was"
        if shown == 100:
            await visit.shoot("earlier")
    await expect(more).to_have_count(0)
    await check(visit)


async def test_an_agent_that_mints_its_sessions_is_given_its_token(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken, put_agent: PutAgent, chat_pod: SpokenPod
) -> None:
    await put_agent("careful", graph="spoken", require_token=True)
    visit = await visitors.go(sites.put(document(TEXT + tag(gateway, agent="careful"))))
    chat = visit.chat
    await chat.open()
    for message, answer in (("Hello", "Good morning"), ("And you?", "Very well")):
        spoken.say(message, answer, None)
        await chat.say(message)
        await expect(chat.saying(answer)).to_have_count(1)
    await expect(chat.log.get_by_text("has ended")).to_have_count(0)
    stored = await visit.page.evaluate("({ ...localStorage })")
    session_id = stored["gateway_session:careful"]
    assert session_id.startswith("gs_")
    assert stored["gateway_session:careful:token"].startswith(f"{session_id} ")
    # Without the token it is nobody's.
    assert (await chat_pod.client.get(f"/api/sessions/{session_id}/messages")).status_code == 401
    # A reload in mid-stream.
    await chat.say("Still there?")
    await spoken.has_started("Still there?")
    spoken.say("Still there?", "Of ")
    await expect(chat.log).to_contain_text("Of")
    await visit.page.reload()
    await chat.reappear()
    await expect(chat.saying("Good morning")).to_have_count(1)
    spoken.say("Still there?", "course", None)
    await expect(chat.saying("Of course")).to_have_count(1)
    assert spoken.started == ["Hello", "And you?", "Still there?"]
    # A token that is not good any more is no dead end.
    await visit.page.evaluate("(id) => localStorage.setItem('gateway_session:careful:token', `${id} x.y.z`)", session_id)
    spoken.say("Again", "Welcome back", None)
    await chat.say("Again")
    await expect(chat.saying("Welcome back")).to_have_count(1)
    await expect(chat.log.get_by_text("has ended")).to_have_count(1)
    await chat.begin_anew()
    spoken.say("New", "And new", None)
    await chat.say("New")
    await expect(chat.saying("And new")).to_have_count(1)


async def test_another_device_sees_the_question_while_it_is_answered(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    one = await visitors.go(shop)
    spoken.say("Hello", "Good morning", None)
    await one.chat.open()
    await one.chat.say("Hello")
    await expect(one.chat.saying("Good morning")).to_be_visible()
    other = await visitors.come()
    session_id = await session_of(one.page)
    await other.context.add_init_script(f"localStorage.setItem('gateway_session:shop', '{session_id}')")
    phone = await other.go(shop)
    await phone.chat.open()
    await expect(phone.chat.saying("Good morning")).to_be_visible()
    await one.chat.say("And you?")
    await spoken.has_started("And you?")
    await expect(phone.chat.saying("And you?")).to_have_count(1)
    spoken.say("And you?", "Very ")
    await expect(phone.chat.saying("Very")).to_have_count(1)
    spoken.say("And you?", "well", None)
    for visit in (one, phone):
        await expect(visit.chat.saying("Very well")).to_have_count(1)
        await expect(visit.chat.saying("And you?")).to_have_count(1)


async def test_a_page_in_the_background_holds_no_connection(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """A feed per hidden tab would add up; what happened meanwhile is there when the visitor is back."""
    visit = await visitors.go(shop)
    chat = visit.chat
    spoken.say("Hello", "Good morning", None)
    await chat.open()
    async with visit.page.expect_request("**/events"):
        await chat.say("Hello")
    await expect(chat.saying("Good morning")).to_be_visible()
    show = """(hidden) => {
      Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });
      document.dispatchEvent(new Event('visibilitychange'));
    }"""
    async with visit.page.expect_event("requestfailed", lambda request: request.url.endswith("/events")):
        await visit.page.evaluate(show, True)
    async with visit.page.expect_request("**/events"):
        await visit.page.evaluate(show, False)
    await chat.say("And you?")
    spoken.say("And you?", "Very well", None)
    await expect(chat.saying("Very well")).to_have_count(1)


@pytest.mark.parametrize("language", ["de", "fr-CA", "es", "ar"])
async def test_the_chat_speaks_the_language_of_the_page(
    visitors: Visitors, sites: Sites, gateway: str, language: str
) -> None:
    names = {
        "de": ("Chat öffnen", "Hallo! Wie können wir helfen?", "ltr"),
        "fr-CA": ("Ouvrir le chat", "Bonjour ! Comment pouvons-nous vous aider ?", "ltr"),
        "es": ("Abrir el chat", "¡Hola! ¿En qué podemos ayudarle?", "ltr"),
        "ar": ("فتح المحادثة", "مرحبًا! كيف يمكننا مساعدتك؟", "rtl"),
    }
    launcher, greeting, direction = names[language]
    # As the page says, and as the line says on an English page.
    line = tag(gateway) if language != "ar" else tag(gateway, lang=language)
    page = document(TEXT + line, language=f'lang="{language if language != "ar" else "en"}"')
    visit = await visitors.go(sites.put(page))
    await visit.page.get_by_role("button", name=launcher).click()
    await expect(visit.page.get_by_text(greeting)).to_be_visible()
    log = visit.page.get_by_role("log")
    assert await log.evaluate("(log) => [log.closest('[lang]').lang, getComputedStyle(log).direction]") == [
        language,
        direction,
    ]
    await visit.shoot(f"language-{language}")
    await check(visit)


async def test_a_language_that_cannot_be_loaded_is_english(visitors: Visitors, sites: Sites, gateway: str) -> None:
    visitor = await visitors.come()

    async def refuse(route: Route) -> None:
        await route.abort()

    await visitor.context.route("**/texts/de.js", refuse)
    visit = await visitor.go(sites.put(document(TEXT + tag(gateway), language='lang="de"')))
    await visit.chat.open()
    await expect(visit.chat.saying("Hello! How can we help?")).to_be_visible()


async def test_a_site_chooses_the_theme(visitors: Visitors, sites: Sites, gateway: str) -> None:
    """`auto` is the visitor's; a page that is always light says so."""
    shades = []
    for theme in ("auto", "light", "dark"):
        page = document(TEXT + tag(gateway, theme=theme, open="true"))
        visit = await visitors.go(sites.put(page), scheme="dark")
        await expect(visit.chat.panel).to_be_visible()
        shade = "(one) => Number(getComputedStyle(one).backgroundColor.match(/\\d+/)[0]) > 128 ? 'light' : 'dark'"
        shades.append(await visit.chat.panel.evaluate(shade))
    assert shades == ["dark", "light", "dark"]


async def test_storage_that_is_full_is_no_dead_end(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """What cannot be stored is kept in memory, and what was stored before is not taken for it."""
    visit = await visitors.go(shop)
    chat = visit.chat
    await chat.open()
    spoken.say("Hello", "Good morning", None)
    await chat.say("Hello")
    await expect(chat.saying("Good morning")).to_be_visible()
    await visit.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    await chat.begin_anew()
    for message, answer in (("Again", "Welcome back"), ("And you?", "Very well")):
        spoken.say(message, answer, None)
        await chat.say(message)
        await expect(chat.saying(answer)).to_have_count(1)
    first, second, third = (body["session_id"] for body in visit.posted("/stream"))
    assert first != second == third


async def test_a_wait_of_an_hour_is_told_and_not_waited_for(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    chat = visit.chat
    await chat.open()

    async def refuse(route: Route) -> None:
        if route.request.method != "POST":
            await route.fallback()
            return
        headers = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "Retry-After"}
        body = {"code": "rate_limited", "title": "Too many", "status": 429, "retry_after": 3600}
        await route.fulfill(status=429, json=body, headers={**headers, "Retry-After": "3600"})

    await visit.page.route("**/api/chat/**", refuse)
    await chat.say("Hello")
    await expect(chat.retry_button).to_be_visible()
    await expect(chat.log).to_contain_text("try again later")
    await visit.page.unroute("**/api/chat/**")
    spoken.say("Hello", "Good morning", None)
    await chat.retry_button.click()
    await expect(chat.saying("Good morning")).to_have_count(1)


async def test_a_busy_agent_is_asked_again_until_it_has_time(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken, put_agent: PutAgent
) -> None:
    await put_agent("narrow", graph="spoken", max_running_turns=1)
    page = sites.put(document(TEXT + tag(gateway, agent="narrow")))
    one, other = await visitors.go(page), await visitors.go(page)
    await one.chat.open()
    await one.chat.say("One")
    await spoken.has_started("One")
    await other.chat.open()
    async with other.page.expect_response(lambda answer: answer.status == 429) as refused:
        await other.chat.say("Two")
    assert (await (await refused.value).json())["code"] == "agent_busy"
    spoken.say("Two", "Second", None)
    spoken.say("One", "First", None)
    await expect(other.chat.saying("Second")).to_have_count(1)
    assert len({body["message_id"] for body in other.posted("/stream")}) == 1


@pytest.mark.parametrize(
    ("definition", "code", "told"),
    [
        ({"turns_per_day": 1}, "quota_exhausted", "come back tomorrow"),
        (
            {"require_identity": True, "site_keys": ("the site key of the shop, not of others",)},
            "identity_required",
            "log in",
        ),
    ],
)
async def test_what_no_waiting_helps_is_told_at_once(
    visitors: Visitors,
    sites: Sites,
    gateway: str,
    spoken: Spoken,
    put_agent: PutAgent,
    definition: dict[str, Any],
    code: str,
    told: str,
) -> None:
    agent = await put_agent(code, graph="spoken", **definition)
    visit = await visitors.go(sites.put(document(TEXT + tag(gateway, agent=code))))
    spoken.say("Hello", "Good morning", None)
    await visit.chat.open()
    if code == "quota_exhausted":
        await visit.chat.say("Hello")
        await expect(visit.chat.saying("Good morning")).to_be_visible()
    before = len(visit.posted("/stream"))
    async with visit.page.expect_response(lambda answer: answer.status in (401, 429)) as refused:
        await visit.chat.say("And now?")
    assert (await (await refused.value).json())["code"] == code
    await expect(visit.chat.retry_button).to_be_visible()
    await expect(visit.chat.log).to_contain_text(told)
    assert len(visit.posted("/stream")) == before + 1, "it is not asked again by itself"
    # What was written stays, and goes when the operator has changed that.
    await put_agent(agent.name, graph="spoken")
    spoken.say("And now?", "Now, yes", None)
    answered = visit.chat.saying("Now, yes")

    async def again() -> bool:
        if await visit.chat.retry_button.is_visible():
            await visit.chat.retry_button.click()
        return bool(await answered.count())

    await wait_for(again, "the agent as it is now is known to the pod")


async def mounted(visitors: Visitors, sites: Sites, gateway: str, script: str, body: str = TEXT) -> Page:
    """A page with the module's names and a script of its own."""
    module = f"import {{ mount, SessionManager }} from '{gateway}/widget.js'; window.mount = mount; {script}"
    visit = await visitors.go(sites.put(document(f'{body}<script type="module">{module}</script>')))
    return visit.page


async def test_mounting_it_twice_or_again_is_one_chat(visitors: Visitors, sites: Sites, gateway: str) -> None:
    """As frameworks do that render twice, or leave a page and come back."""
    page = await mounted(visitors, sites, gateway, "window.chat = mount({ agent: 'shop' });")
    chat = Chat(page)
    await expect(chat.launcher).to_have_count(1)
    assert await page.evaluate("mount({ agent: 'shop' }) === chat")
    await expect(chat.launcher).to_have_count(1)
    await chat.open()
    await page.evaluate("chat.remove(); chat.remove();")
    await expect(chat.launcher).to_have_count(0)
    await expect(chat.panel).to_have_count(0)
    await page.evaluate("window.chat = mount({ agent: 'shop' })")
    await expect(chat.launcher).to_have_count(1)
    assert await page.evaluate("[...document.querySelectorAll('*')].filter((one) => one.shadowRoot).length") == 1


async def test_a_page_that_puts_another_body_in_place_keeps_the_chat(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """As Turbo and its like go from page to page: what is written and streamed goes on."""
    visit = await visitors.go(shop)
    chat = visit.chat
    await chat.open()
    await chat.say("Hello")
    await spoken.has_started("Hello")
    spoken.say("Hello", "Good ")
    await expect(chat.log).to_contain_text("Good")
    await visit.page.evaluate("""() => {
      const next = document.createElement('body');
      next.innerHTML = '<main><h1>Another page</h1></main>';
      document.documentElement.replaceChild(next, document.body);
    }""")
    await expect(visit.page.get_by_role("heading", name="Another page")).to_be_visible()
    spoken.say("Hello", "morning", None)
    await expect(chat.saying("Good morning")).to_have_count(1)
    await expect(chat.launcher).to_have_count(1)


async def test_two_agents_on_one_page_are_two_chats(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken, put_agent: PutAgent
) -> None:
    await put_agent("sales", graph="spoken")
    options = {"agent": "sales", "position": "left", "title": "Sales"}
    visit = await visitors.go(sites.put(document(TEXT + tag(gateway, title="Help") + tag(gateway, **options))))
    page = visit.page
    await expect(visit.chat.launcher).to_have_count(2)
    for index, (title, message) in enumerate((("Help", "To the shop"), ("Sales", "To sales"))):
        spoken.say(message, f"Answer {index}", None)
        await visit.chat.launcher.nth(index).click()
        panel = page.get_by_role("dialog", name=title)
        box = panel.get_by_role("textbox")
        await box.fill(message)
        await box.press("Enter")
        await expect(panel.get_by_text(f"Answer {index}", exact=True)).to_be_visible()
    await page.set_viewport_size({"width": 1280, "height": 800})
    await visit.shoot("two-agents")
    stored = await page.evaluate("({ ...localStorage })")
    assert stored["gateway_session:shop"] != stored["gateway_session:sales"]
    for body, agent in zip(visit.posted("/stream"), ("shop", "sales"), strict=True):
        assert body["session_id"] == stored[f"gateway_session:{agent}"]


async def test_it_is_not_printed_and_takes_no_part_in_the_layout(visitors: Visitors, sites: Sites, gateway: str) -> None:
    """A body that is a grid or a flex box would give one more child a gap."""
    head = "<style>body { display: flex; flex-direction: column; gap: 70px; margin: 0 }</style>"
    look = "[document.body.getBoundingClientRect().height, document.documentElement.scrollHeight]"
    plain = await (await visitors.go(sites.put(document(TEXT, head=head)))).page.evaluate(look)
    visit = await visitors.go(sites.put(document(TEXT + tag(gateway), head=head)))
    await visit.chat.open()
    assert await visit.page.evaluate(look) == plain
    shifts = "new Promise((done) => new PerformanceObserver((list) => done(list.getEntries().length)).observe("
    shifts += "{ type: 'layout-shift', buffered: true }) || setTimeout(() => done(0), 100))"
    assert await visit.page.evaluate(shifts) == 0
    await visit.page.emulate_media(media="print")
    await expect(visit.chat.panel).to_be_hidden()
    await expect(visit.chat.launcher).to_be_hidden()


async def test_the_keyboard_of_a_phone_covers_nothing(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """A phone's keyboard makes what is seen smaller, not the page."""
    visitor = await visitors.come(size=PHONE)
    await visitor.context.add_init_script("""
      const screen = new EventTarget();
      Object.assign(screen, { offsetTop: 0, height: 844, scale: 1 });
      Object.defineProperty(window, 'visualViewport', { value: screen });
    """)
    visit = await visitor.go(shop)
    await visit.chat.open()
    await visit.page.evaluate("""() => {
      Object.assign(visualViewport, { offsetTop: 40, height: 450 });
      visualViewport.dispatchEvent(new Event('resize'));
    }""")
    place = "(panel) => JSON.stringify([panel.offsetTop, panel.offsetHeight])"
    assert await visit.chat.panel.evaluate(place) == "[40,450]"
    await visit.shoot("phone-keyboard")


@pytest.mark.parametrize(
    "policy",
    ["script-src 'nonce-abc'", "script-src 'nonce-abc' 'strict-dynamic'"],
    ids=["a nonce", "a nonce that is handed on"],
)
async def test_it_works_with_a_nonce_and_trusted_types(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken, policy: str
) -> None:
    line = tag(gateway, lang="de").replace("<script ", '<script nonce="abc" ')
    page = document(TEXT + line).replace('<link rel="icon" href="data:,">', "")
    rules = f"default-src 'none'; {policy}; connect-src {gateway}; require-trusted-types-for 'script'; trusted-types 'none'"
    visit = await visitors.go(sites.put(page, headers={"Content-Security-Policy": rules}))
    spoken.say("Hello", "**Good** [morning](https://example.com)\n\n```\ncode\n```", None)
    await visit.page.get_by_role("button", name="Chat öffnen").click()
    await visit.page.get_by_role("textbox").fill("Hello")
    await visit.page.get_by_role("textbox").press("Enter")
    await expect(visit.page.get_by_role("link", name="morning")).to_be_visible()
    violations = [line for line in visit.console if "Content Security Policy" in line or "Trusted" in line]
    assert [line for line in violations if "favicon" not in line] == []
    assert visit.errors == []
