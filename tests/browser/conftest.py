"""A real browser, the system's own, websites that embed the chat, and a pod whose answers the test speaks."""

import os
import shutil
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, async_playwright, expect

from gateway.settings import Settings
from tests.browser.sites import TEXT, Sites, document, serve_sites, tag
from tests.browser.visits import SCREENSHOTS, Visitors, visitors_of
from tests.conftest import PutAgent
from tests.support.spoken import Spoken, SpokenPod, spoken_pod

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

expect.set_options(timeout=10_000)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Chromium. Without it these tests are skipped; in CI they fail."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        reason = f"no Chromium on PATH ({', '.join(PROGRAMS)})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=program,
            # Every website is here; nothing of the browser's own reaches out.
            args=["--host-resolver-rules=MAP *.test 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"],
        )
        yield browser
        await browser.close()


@pytest.fixture(scope="session", autouse=True)
def screenshots() -> None:
    """The folder for them."""
    SCREENSHOTS.mkdir(exist_ok=True)


@pytest.fixture
async def visitors(browser: Browser) -> AsyncIterator[Visitors]:
    async with visitors_of(browser) as visitors:
        yield visitors


@pytest.fixture
async def sites() -> AsyncIterator[Sites]:
    async with serve_sites() as sites:
        yield sites


@pytest.fixture
def spoken() -> Spoken:
    return Spoken()


@pytest.fixture
async def chat_pod(settings: Settings, put_agent: PutAgent, spoken: Spoken) -> AsyncIterator[SpokenPod]:
    """A pod whose agent `shop` says what the test says."""
    await put_agent("shop", graph="spoken")
    async with spoken_pod(settings, spoken) as pod:
        yield pod


@pytest.fixture
def gateway(chat_pod: SpokenPod) -> str:
    """The address under which websites know that pod."""
    return f"http://gateway.test:{chat_pod.client.base_url.port}"


@pytest.fixture
def shop(sites: Sites, gateway: str) -> str:
    """The address of a shop with the chat on its page."""
    return sites.put(document(TEXT + tag(gateway)))
