"""A visitor's browser, and the chat as a visitor finds it: by roles and accessible names alone."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from playwright.async_api import Browser, BrowserContext, Locator, Page, Request

SCREENSHOTS = Path(__file__).parent / "screenshots"
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
COME_IN_MS = 20_000

Scheme = Literal["light", "dark"]


async def session_of(page: Page) -> str:
    """The session id that the page's site has stored."""
    found: str = await page.evaluate("Object.values(localStorage).join(' ').match(/session_\\d+_[0-9a-z]+/)[0]")
    return found


class Chat:
    """The parts of the chat on a page. `title` is what the site calls it."""

    def __init__(self, page: Page, title: str = "Chat") -> None:
        self.page = page
        self.launcher = page.get_by_role("button", name="Open the chat")
        self.panel = page.get_by_role("dialog", name=title)
        self.log = page.get_by_role("log", name="Conversation")
        self.box = page.get_by_role("textbox", name="Message")
        self.send_button = page.get_by_role("button", name="Send", exact=True)
        self.stop_button = page.get_by_role("button", name="Stop the answer")
        self.retry_button = page.get_by_role("button", name="Try again")
        self.close_button = page.get_by_role("button", name="Close the chat")
        self.new_button = page.get_by_role("button", name="New conversation")

    async def open(self) -> None:
        await self.launcher.click()
        await self.box.wait_for()

    async def reappear(self) -> None:
        """Waits until it has opened by itself, as it was on the page before."""
        await self.box.wait_for()

    async def say(self, text: str) -> None:
        """Writes a message and sends it, as with the keyboard."""
        await self.box.fill(text)
        await self.box.press("Enter")

    async def begin_anew(self) -> None:
        """Ends the conversation."""
        await self.new_button.click()
        await self.page.get_by_role("button", name="Start a new one").click()

    def saying(self, text: str) -> Locator:
        """What in the log says exactly this, by whomever."""
        return self.log.get_by_text(text, exact=True)


class Visit:
    """One page of one visitor, and what it did: console lines, uncaught errors, requests."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.chat = Chat(page)
        self.console: list[str] = []
        self.errors: list[str] = []
        self.requests: list[Request] = []
        page.on("console", lambda line: self.console.append(f"{line.type}: {line.text}"))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._requested)

    def _requested(self, request: Request) -> None:
        self.requests.append(request)

    def posted(self, ending: str) -> list[dict[str, Any]]:
        """The bodies of the POST requests to paths with this ending, in order."""
        posted = [one for one in self.requests if one.method == "POST" and one.url.split("?")[0].endswith(ending)]
        return [one.post_data_json or {} for one in posted]

    async def shoot(self, name: str, *, whole: bool = False) -> None:
        """A screenshot for people to look at, once what comes in has come."""
        await self.come_in()
        await self.page.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled", full_page=whole)

    async def come_in(self) -> None:
        """Waits for the end of all animations that have one, in the shadow roots too.

        Their state is looked at, for the promise `finished` of an animation inside a closed `details` is never settled.
        """
        running = await self.page.evaluate_handle("""() => [...document.querySelectorAll('*')]
          .filter((one) => one.shadowRoot).flatMap((one) => one.shadowRoot.getAnimations()).concat(document.getAnimations())
          .filter((one) => one.effect.getTiming().iterations !== Infinity)""")
        ended = "(running) => running.every((one) => one.playState !== 'running')"
        await self.page.wait_for_function(ended, arg=running, timeout=COME_IN_MS)


class Visitor:
    """A browser profile of its own: storage, cookies, tabs."""

    def __init__(self, context: BrowserContext) -> None:
        self.context = context

    async def go(self, url: str) -> Visit:
        """Opens a page in a new tab."""
        visit = Visit(await self.context.new_page())
        await visit.page.goto(url)
        return visit


class Visitors:
    """Makes visitors: `await visitors.come()`."""

    def __init__(self, browser: Browser, stack: AsyncExitStack) -> None:
        self._browser = browser
        self._stack = stack

    async def come(self, *, size: dict[str, int] = DESKTOP, scheme: Scheme = "light", **options: Any) -> Visitor:
        context = await self._browser.new_context(
            viewport={"width": size["width"], "height": size["height"]}, color_scheme=scheme, **options
        )
        self._stack.push_async_callback(context.close)
        return Visitor(context)

    async def go(self, url: str, **options: Any) -> Visit:
        """A new visitor comes to a page."""
        visitor = await self.come(**options)
        return await visitor.go(url)


@asynccontextmanager
async def visitors_of(browser: Browser) -> AsyncIterator[Visitors]:
    async with AsyncExitStack() as stack:
        yield Visitors(browser, stack)
