"""One page as desktops and phones show it, light and dark: screenshots for people to look at, and what axe-core says."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from axe_playwright_python.async_playwright import Axe

from tests.browser.visits import DESKTOP, PHONE, Scheme, Visit

AXE_S = 30
SCHEMES: tuple[Scheme, ...] = ("light", "dark")


def complaints(found: dict[str, Any]) -> list[str]:
    """What axe-core found wrong, with the places."""
    return [
        f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found["violations"]
        for node in one["nodes"]
    ]


async def check(visit: Visit) -> None:
    """No violations, best practices included."""
    # What is still fading in has not the colours yet that it will have.
    await visit.come_in()
    async with asyncio.timeout(AXE_S):  # it has no limit of its own
        found = complaints((await Axe().run(visit.page)).response)
    assert not found, "\n".join(found)


async def _looks(visit: Visit) -> AsyncIterator[str]:
    """Each size and colour scheme in turn, by name."""
    for name, size in (("phone", PHONE), ("desktop", DESKTOP)):
        await visit.page.set_viewport_size({"width": size["width"], "height": size["height"]})
        for scheme in SCHEMES:
            await visit.page.emulate_media(color_scheme=scheme)
            yield f"{name}-{scheme}"
    await visit.page.emulate_media(color_scheme="light")


async def shoot_in_all_looks(visit: Visit, name: str, *, whole: bool = False) -> None:
    """Screenshots; of a phone, if wanted, the whole page."""
    async for look in _looks(visit):
        await visit.shoot(f"{name}-{look}", whole=whole and look.startswith("phone"))


async def check_in_all_looks(visit: Visit, name: str, *, whole: bool = False) -> None:
    """Screenshots, and no violations in any of them."""
    async for look in _looks(visit):
        await visit.shoot(f"{name}-{look}", whole=whole and look.startswith("phone"))
        try:
            await check(visit)
        except AssertionError as error:
            raise AssertionError(f"{name}-{look}") from error
