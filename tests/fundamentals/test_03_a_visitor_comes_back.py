"""A session may leave Redis once Postgres has it. Whoever comes back finds all of it and goes on."""

import httpx
import pytest

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.serving import wait_for
from tests.support.visiting import Flush, say, transcript

SESSION_ID = "session_1234567890_abc123xyz"


@pytest.mark.parametrize("leaving", ["evicted", "expired"])
async def test_a_returning_visitor_goes_on_where_the_session_was(
    leaving: str, client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop", hot_ttl_s=1)
    first = await say(client, SESSION_ID, "My name is Ada")
    await say(client, SESSION_ID, "I like tea")
    said = await transcript(client, SESSION_ID)
    await flush()

    key = stores.keys.session(SESSION_ID)
    if leaving == "evicted":
        await stores.client.delete(key)
    await wait_for(lambda: is_gone(stores, key), "the session leaves Redis")

    assert await transcript(client, SESSION_ID) == said
    again = await say(client, SESSION_ID, "Do you remember me?")
    assert again["metadata"]["history"] == 4
    assert again["metadata"]["message_count"] == 6
    assert again["metadata"]["session_id"] == first["metadata"]["session_id"]


async def test_only_the_newest_messages_come_back_into_redis_and_yet_the_transcript_is_whole(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop", history_window=2)
    for number in range(1, 13):
        await say(client, SESSION_ID, f"Message {number}")
    await flush()
    key = stores.keys.session(SESSION_ID)
    await stores.client.delete(key)

    said = await transcript(client, SESSION_ID)
    assert said == [text for n in range(1, 13) for text in (f"Message {n}", f"You said: Message {n}")]
    # Ten at least, so that retries find their answers.
    hot = {name async for name, _ in stores.client.hscan_iter(key, match="t:*")}
    assert hot == {b"t:%d" % n for n in range(3, 13)}


async def is_gone(stores: Stores, key: str) -> bool:
    return not await stores.client.exists(key)
