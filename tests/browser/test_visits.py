"""The means of these tests: what they wait for comes."""

from playwright.async_api import expect

from tests.browser.sites import Sites, document
from tests.browser.visits import Visitors

FADES = "<style>@keyframes fade { from { opacity: 0 } } .new { animation: fade .3s }</style>"
READ_STYLE = "(one) => getComputedStyle(one).opacity"


async def test_an_animation_that_is_seen_is_waited_for(visitors: Visitors, sites: Sites) -> None:
    visit = await visitors.go(sites.put(document(FADES + "<p class=new>Seen</p>")))
    await visit.come_in()
    assert await visit.page.locator(".new").evaluate(READ_STYLE) == "1"


async def test_an_animation_that_cannot_be_seen_holds_nobody_up(visitors: Visitors, sites: Sites) -> None:
    """Inside a closed `details` it starts as soon as a script reads the style, as axe does."""
    visit = await visitors.go(
        sites.put(document(f"{FADES}<details><summary>More</summary><p class=new>Hidden</p></details>"))
    )
    hidden = visit.page.locator(".new")
    await hidden.evaluate(READ_STYLE)
    settled = """() => Promise.race([
      ...document.getAnimations().map((one) => one.finished), new Promise((go) => setTimeout(go, 1000, 'never')),
    ])"""
    assert await visit.page.evaluate(settled) == "never", "a promise is not to be waited for"
    await hidden.evaluate("(one) => one.replaceWith(one.cloneNode(true))")
    await hidden.evaluate(READ_STYLE)
    await visit.come_in()
    await expect(hidden).to_be_hidden()
