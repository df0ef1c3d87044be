"""A real browser, the system's own, websites that embed the chat, and a pod whose answers the test speaks."""

import os
import shutil
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, async_playwright, expect

from gateway.app import Stores
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from tests.browser.sites import TEXT, Sites, document, serve_sites, tag
from tests.browser.visits import SCREENSHOTS, Visitors, visitors_of
from tests.conftest import PutAgent, checked_stores, empty_stores, put_in, settings_on
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


@pytest.fixture(scope="module")
def settings(redis_server: RedisServer, postgres_server: PostgresServer) -> Settings:
    return settings_on(redis_server, postgres_server)


@pytest.fixture(scope="module")
async def stores(settings: Settings) -> AsyncIterator[Stores]:
    """Empty when the file begins. Each visitor has a session of its own, so that tests may share a pod."""
    await empty_stores(settings)
    async with checked_stores(settings) as stores:
        yield stores


@pytest.fixture(scope="module")
def put_agent(stores: Stores) -> PutAgent:
    """For agents other than `shop`, which belongs to all tests of a file."""
    return put_in(stores)


@pytest.fixture(scope="module")
async def chat_pod(settings: Settings, put_agent: PutAgent) -> AsyncIterator[SpokenPod]:
    """A pod whose agent `shop` says what the test says."""
    await put_agent("shop", graph="spoken")
    async with spoken_pod(settings, Spoken()) as pod:
        yield pod


@pytest.fixture(scope="module")
async def sites() -> AsyncIterator[Sites]:
    async with serve_sites() as sites:
        yield sites


@pytest.fixture(scope="module")
def gateway(chat_pod: SpokenPod) -> str:
    """The address under which websites know that pod."""
    return f"http://gateway.test:{chat_pod.client.base_url.port}"


@pytest.fixture
async def spoken(chat_pod: SpokenPod) -> AsyncIterator[Spoken]:
    """What the pod says; no turn outlives the test."""
    yield chat_pod.spoken
    await chat_pod.spoken.begin_anew()


@pytest.fixture
async def visitors(browser: Browser, spoken: Spoken) -> AsyncIterator[Visitors]:
    """They are gone before their turns are ended."""
    async with visitors_of(browser) as visitors:
        yield visitors


@pytest.fixture
def shop(sites: Sites, gateway: str) -> str:
    """The address of a shop with the chat on its page."""
    return sites.put(document(TEXT + tag(gateway)))
