"""What a visitor sees while answers are made: they grow, stop, survive a reload, a lost line and a dead pod."""

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.async_api import Route, expect

from gateway.settings import Settings
from tests.browser.sites import TEXT, Sites, document, tag
from tests.browser.visits import Chat, Visit, Visitors, session_of
from tests.conftest import PutAgent
from tests.support.balancer import balancer_before
from tests.support.pods import gateway_process
from tests.support.spoken import Spoken, SpokenPod

LEASE_S = 2


async def begin(visit: Visit, spoken: Spoken, message: str = "Hello", piece: str = "Good ") -> Chat:
    """Opens the chat, sends a message, and waits until the answer's first piece is there."""
    await visit.chat.open()
    await visit.chat.say(message)
    await spoken.has_started(message)
    spoken.say(message, piece)
    await expect(visit.chat.log).to_contain_text(piece.strip())
    return visit.chat


async def test_a_message_is_there_at_once_and_the_answer_grows(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    await visit.chat.say("Hello")
    await expect(visit.chat.saying("Hello")).to_be_visible()
    await spoken.has_started("Hello")
    spoken.say("Hello", "Good ")
    await expect(visit.chat.saying("Good")).to_be_visible()
    spoken.say("Hello", "morning")
    spoken.end("Hello")
    await expect(visit.chat.saying("Good morning")).to_be_visible()
    await expect(visit.chat.stop_button).to_be_hidden()
    assert visit.errors == []


async def test_the_stop_button_stops_the_answer(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    chat = await begin(visit, spoken)
    await chat.stop_button.click()
    await expect(chat.stop_button).to_be_hidden()
    assert spoken.cancelled == ["Hello"]
    # The next message is answered as usual.
    spoken.say("And now?", "Fine", None)
    await chat.say("And now?")
    await expect(chat.saying("Fine")).to_be_visible()


async def test_a_reload_in_mid_stream_goes_on_and_ends_right(
    visitors: Visitors, shop: str, spoken: Spoken, chat_pod: SpokenPod
) -> None:
    visit = await visitors.go(shop)
    await begin(visit, spoken)
    await visit.page.reload()
    chat = visit.chat
    await chat.reappear()
    await expect(chat.saying("Hello")).to_have_count(1)
    await expect(chat.saying("Good")).to_have_count(1)
    spoken.say("Hello", "morning", None)
    await expect(chat.saying("Good morning")).to_have_count(1)
    await expect(chat.saying("Hello")).to_have_count(1)
    assert await chat_pod.transcript(await session_of(visit.page)) == ["Hello", "Good morning"]
    assert spoken.started == ["Hello"]
    # And once more when all is over.
    await visit.page.reload()
    await chat.reappear()
    await expect(chat.saying("Good morning")).to_have_count(1)
    await expect(chat.saying("Hello")).to_have_count(1)


async def test_two_tabs_show_the_same_chat(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visitor = await visitors.come()
    one, two = await visitor.go(shop), await visitor.go(shop)
    await two.chat.open()
    chat = await begin(one, spoken)
    await expect(two.chat.saying("Hello")).to_have_count(1)
    await expect(two.chat.saying("Good")).to_have_count(1)
    spoken.say("Hello", "morning", None)
    for tab in (chat, two.chat):
        await expect(tab.saying("Good morning")).to_have_count(1)
        await expect(tab.saying("Hello")).to_have_count(1)
    # And the other way round.
    spoken.say("Me too", "Welcome", None)
    await two.chat.say("Me too")
    for tab in (chat, two.chat):
        await expect(tab.saying("Me too")).to_have_count(1)
        await expect(tab.saying("Welcome")).to_have_count(1)


async def test_a_new_conversation_in_one_tab_is_one_in_the_other(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visitor = await visitors.come()
    one, two = await visitor.go(shop), await visitor.go(shop)
    spoken.say("Hello", "Good morning", None)
    for tab in (one, two):
        await tab.chat.open()
    await one.chat.say("Hello")
    await expect(two.chat.saying("Good morning")).to_be_visible()
    await one.chat.begin_anew()
    for tab in (one, two):
        await expect(tab.chat.saying("Good morning")).to_have_count(0)
    spoken.say("Again", "New", None)
    await two.chat.say("Again")
    for tab in (one, two):
        await expect(tab.chat.saying("New")).to_be_visible()


async def test_a_pod_killed_in_mid_stream_is_a_retry_that_succeeds(
    visitors: Visitors, sites: Sites, settings: Settings, chat_pod: SpokenPod, put_agent: PutAgent, tmp_path: Path
) -> None:
    await put_agent("slow", config={"delay_ms": 3_000, "chunks": 8})
    async with (
        gateway_process("serve", settings, tmp_path, GATEWAY_LEASE_S=str(LEASE_S)) as victim,
        balancer_before(victim.port) as balancer,
    ):
        gateway = balancer.url.replace("127.0.0.1", "gateway.test")
        visit = await visitors.go(sites.put(document(TEXT + tag(gateway, agent="slow"))))
        chat = visit.chat
        await chat.open()
        await chat.say("Where is my parcel, please?")
        await expect(chat.log).to_contain_text("You said")
        balancer.send_to(chat_pod.client.base_url.port or 0)
        victim.kill()
        await expect(chat.saying("You said: Where is my parcel, please?").or_(chat.retry_button)).to_be_visible(
            timeout=20_000
        )
        if await chat.retry_button.is_visible():
            await chat.retry_button.click()
        await expect(chat.saying("You said: Where is my parcel, please?")).to_have_count(1, timeout=20_000)
        await expect(chat.saying("Where is my parcel, please?")).to_have_count(1)
        await expect(chat.retry_button).to_have_count(0)
        posted = visit.posted("/stream")
        assert len(posted) > 1
        assert len({body["message_id"] for body in posted}) == 1
        said = await chat_pod.transcript(await session_of(visit.page))
    assert said == ["Where is my parcel, please?", "You said: Where is my parcel, please?"]


@pytest.mark.parametrize("reached", [False, True], ids=["that never arrived", "whose answer was lost"])
async def test_a_message_is_sent_again_under_the_same_id(
    visitors: Visitors, shop: str, spoken: Spoken, reached: bool
) -> None:
    visit = await visitors.go(shop)
    spoken.say("Hello", "Good morning", None)
    cut = 0

    async def cut_the_line(route: Route) -> None:
        nonlocal cut
        if route.request.method != "POST" or cut >= 2:
            await route.fallback()
            return
        cut += 1
        if reached:
            # This request does not go through the browser, which alone knows the names.
            await route.fetch(url=route.request.url.replace("gateway.test", "127.0.0.1"))
        await route.abort("connectionreset")

    await visit.page.route("**/api/chat/**", cut_the_line)
    chat = visit.chat
    await chat.open()
    await chat.say("Hello")
    answered = chat.saying("Good morning")
    await expect(answered.or_(chat.retry_button)).to_be_visible(timeout=30_000)
    await visit.page.unroute("**/api/chat/**")
    if await chat.retry_button.is_visible():
        await chat.retry_button.click()
    await expect(answered).to_have_count(1)
    await expect(chat.saying("Hello")).to_have_count(1)
    posted = visit.posted("/stream")
    assert len(posted) > 1
    assert len({body["message_id"] for body in posted}) == 1
    assert spoken.started == ["Hello"]


async def test_offline_is_said_and_it_goes_on_by_itself(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    await begin(visit, spoken)
    await visit.page.context.set_offline(True)
    await expect(visit.page.get_by_text("offline").or_(visit.page.get_by_text("no connection")).first).to_be_visible()
    spoken.say("Hello", "morning", None)
    await visit.page.context.set_offline(False)
    await expect(visit.chat.saying("Good morning")).to_have_count(1)
    await expect(visit.page.get_by_text("offline")).to_be_hidden()


async def test_a_message_written_offline_is_sent_when_the_line_is_back(
    visitors: Visitors, shop: str, spoken: Spoken
) -> None:
    visit = await visitors.go(shop)
    await visit.chat.open()
    spoken.say("Hello", "Good morning", None)
    await visit.page.context.set_offline(True)
    await visit.chat.say("Hello")
    await expect(visit.chat.saying("Hello")).to_be_visible()
    await visit.page.context.set_offline(False)
    answered = visit.chat.saying("Good morning")
    await expect(answered.or_(visit.chat.retry_button)).to_be_visible()
    if await visit.chat.retry_button.is_visible():
        await visit.chat.retry_button.click()
    await expect(answered).to_have_count(1)
    assert spoken.started == ["Hello"]


async def test_retry_after_is_honoured(
    visitors: Visitors, sites: Sites, gateway: str, spoken: Spoken, put_agent: PutAgent
) -> None:
    await put_agent("patient", graph="spoken", rate_limit={"messages": 1, "per_s": 2})
    visit = await visitors.go(sites.put(document(TEXT + tag(gateway, agent="patient"))))
    spoken.say("One", "First", None)
    spoken.say("Two", "Second", None)
    await visit.chat.open()
    await visit.chat.say("One")
    await expect(visit.chat.saying("First")).to_be_visible()
    refused: list[float] = []
    sent: list[float] = []
    visit.page.on("request", lambda one: sent.append(asyncio.get_running_loop().time()) if one.method == "POST" else None)
    visit.page.on("response", lambda one: refused.append(float(one.headers["retry-after"])) if one.status == 429 else None)
    await visit.chat.say("Two")
    answered = visit.chat.saying("Second")
    await expect(answered.or_(visit.chat.retry_button.locator(":enabled"))).to_be_visible()
    if not await answered.is_visible():
        await visit.chat.retry_button.click()
    await expect(answered).to_have_count(1)
    assert refused
    # Never sooner than the gateway asked for.
    assert all(later - earlier >= refused[0] - 0.1 for earlier, later in pairwise(sent)), (sent, refused)
    assert len({body["message_id"] for body in visit.posted("/stream")}) == 2


@pytest.mark.parametrize("how", ["end", "erase"])
async def test_a_session_that_is_gone_is_no_dead_end(
    visitors: Visitors, shop: str, spoken: Spoken, chat_pod: SpokenPod, how: str
) -> None:
    visit = await visitors.go(shop)
    chat = visit.chat
    spoken.say("Hello", "Good morning", None)
    spoken.say("Still there?", "Of course", None)
    await chat.open()
    await chat.say("Hello")
    await expect(chat.saying("Good morning")).to_be_visible()
    session_id = await session_of(visit.page)
    if how == "end":
        ended = await chat_pod.client.post(f"/api/sessions/{session_id}/end")
    else:
        ended = await chat_pod.client.delete(f"/api/sessions/{session_id}")
    assert ended.status_code in (200, 204), ended.text
    await chat.say("Still there?")
    await expect(chat.saying("Of course")).to_have_count(1)
    assert await session_of(visit.page) != session_id
    assert await chat_pod.transcript(await session_of(visit.page)) == ["Still there?", "Of course"]


async def test_a_new_conversation_begins_anew(visitors: Visitors, shop: str, spoken: Spoken, chat_pod: SpokenPod) -> None:
    visit = await visitors.go(shop)
    chat = visit.chat
    spoken.say("Hello", "Good morning", None)
    await chat.open()
    await chat.say("Hello")
    await expect(chat.saying("Good morning")).to_be_visible()
    session_id = await session_of(visit.page)
    await chat.begin_anew()
    await expect(chat.saying("Good morning")).to_have_count(0)
    await expect(chat.box).to_be_focused()
    spoken.say("Again", "Welcome back", None)
    await chat.say("Again")
    await expect(chat.saying("Welcome back")).to_be_visible()
    assert await session_of(visit.page) != session_id
    assert (await chat_pod.client.get(f"/api/sessions/{session_id}")).json()["status"] == "ended"


async def test_a_turn_that_fails_can_be_tried_again(visitors: Visitors, shop: str, spoken: Spoken) -> None:
    visit = await visitors.go(shop)
    chat = await begin(visit, spoken)
    spoken.say("Hello", RuntimeError("told to fail"))
    await expect(chat.retry_button).to_be_visible()
    spoken.say("Hello", "Good morning", None)
    await chat.retry_button.click()
    await expect(chat.saying("Good morning")).to_have_count(1)
    await expect(chat.saying("Hello")).to_have_count(1)
    await expect(chat.retry_button).to_have_count(0)
