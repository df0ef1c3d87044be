"""The development server's page: a shop with the chat, and beside it what happens behind."""

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import expect

from tests.browser.looks import check_in_all_looks, shoot_in_all_looks
from tests.browser.visits import Visit, Visitors
from tests.support.commands import DevServer


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[DevServer]:
    server = DevServer(tmp_path_factory.mktemp("dev") / "data")
    try:
        yield await server.start()
        await server.stop()
    finally:
        server.clear()


@pytest.fixture
def spoken() -> None:
    """These visitors talk to the development server."""


async def talk(visit: Visit, text: str) -> None:
    """Opens the chat, says something, and waits until it is in Postgres."""
    await visit.chat.open()
    await visit.chat.say(text)
    await expect(visit.chat.saying(f"You said: {text}")).to_be_visible(timeout=15_000)
    rows = visit.page.get_by_role("region", name="Messages in Postgres")
    await expect(rows.get_by_text(f"You said: {text}", exact=True)).to_be_visible(timeout=15_000)


async def test_a_newcomer_sees_a_message_go_to_redis_and_postgres(visitors: Visitors, dev: DevServer) -> None:
    visit = await visitors.go(dev.url)
    page = visit.page
    await expect(page.get_by_role("heading", name="What happens behind")).to_be_visible()
    await expect(visit.chat.launcher).to_be_visible()
    await check_in_all_looks(visit, "demo-empty", whole=True)
    await talk(visit, "Which plant likes shade?")
    session = page.get_by_role("region", name="Session hash in Redis")
    await expect(session.get_by_text("user: Which plant likes shade?")).to_be_visible()
    await expect(session.get_by_text("message_count")).to_be_visible()
    await expect(page.get_by_text("TTL 30:00: all of it is in Postgres").or_(page.get_by_text("TTL 29:"))).to_be_visible()
    news = page.get_by_role("region", name="Just now").get_by_role("listitem")
    await expect(news.filter(has_text="one script").or_(news.filter(has_text="The first message")).first).to_be_visible()
    await expect(news.filter(has_text="The worker has brought turn 1 to Postgres")).to_have_count(1)
    await check_in_all_looks(visit, "demo-chat")
    await page.keyboard.press("Escape")
    await expect(visit.chat.launcher).to_be_visible()
    await shoot_in_all_looks(visit, "demo-full", whole=True)
    assert visit.errors == []
