"""The reference at /docs in a browser: it works under its own policy, and everybody can read it."""

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, expect

from tests.support.spoken import SpokenPod


async def test_examples_are_copied_with_the_address_of_this_gateway(browser: Browser, chat_pod: SpokenPod) -> None:
    address = str(chat_pod.client.base_url).rstrip("/")
    context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = await context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    await page.goto(f"{address}/docs")
    call = page.locator("#get_api_agents")
    await call.get_by_role("button", name="Copy").first.click()
    await expect(call.get_by_role("button", name="Copied")).to_be_visible()
    copied = await page.evaluate("navigator.clipboard.readText()")
    assert copied == f'curl {address}/api/agents \\\n  -H "Authorization: Bearer $ADMIN_KEY"'
    assert errors == []
    await context.close()


async def test_the_search_leaves_the_calls_that_have_the_words(browser: Browser, chat_pod: SpokenPod) -> None:
    page = await browser.new_page()
    await page.goto(f"{str(chat_pod.client.base_url).rstrip('/')}/docs")
    await page.get_by_label("Find a call").fill("cancel answer")
    await expect(page.locator("article[data-call]:visible")).to_have_count(1)
    await expect(page.get_by_role("status")).to_have_text("1 call")
    await page.get_by_label("Find a call").fill("")
    await expect(page.locator("#get_healthz")).to_be_visible()
    await page.close()


async def test_the_page_is_accessible_and_fits_a_phone_in_both_themes(browser: Browser, chat_pod: SpokenPod) -> None:
    for scheme in ("light", "dark"):
        context = await browser.new_context(
            viewport={"width": 390, "height": 844}, color_scheme="dark" if scheme == "dark" else "light", bypass_csp=True
        )
        page = await context.new_page()
        await page.goto(f"{str(chat_pod.client.base_url).rstrip('/')}/docs")
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), scheme
        found = await Axe().run(page)
        assert found.response["violations"] == [], (scheme, found.generate_report())
        await context.close()
