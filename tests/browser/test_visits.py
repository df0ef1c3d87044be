"""The means of these tests: what they wait for comes."""

from playwright.async_api import expect

from tests.browser.sites import Sites, document
from tests.browser.visits import Visitors

FADES = "<style>@keyframes fade { from { opacity: 0 } } .new { animation: fade 2s }</style>"
READ_STYLE = "(one) => getComputedStyle(one).opacity"


async def test_an_animation_that_is_seen_is_waited_for(visitors: Visitors, sites: Sites) -> None:
    visit = await visitors.go(sites.put(document(FADES + "<p class=new>Seen</p>")))
    await visit.come_in()
    assert await visit.page.locator(".new").evaluate(READ_STYLE) == "1"


async def test_an_animation_that_cannot_be_seen_holds_nobody_up(visitors: Visitors, sites: Sites) -> None:
    """Inside a closed `details` it starts as soon as a script reads the style, as axe does, and its promise stays open."""
    page = document(f"{FADES}<details><summary>More</summary><p class=new>Hidden</p></details>")
    visit = await visitors.go(sites.put(page))
    started = await visit.page.evaluate(f"""() => {{
      const old = document.querySelector('.new');
      const one = old.cloneNode(true);
      old.replaceWith(one);
      return [({READ_STYLE})(one), document.getAnimations().length];
    }}""")
    assert started == ["0", 1]
    await visit.come_in()
    await expect(visit.page.locator(".new")).to_be_hidden()
