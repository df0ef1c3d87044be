"""A client that got no answer sends its message again, under the same message_id. It is answered once."""

import asyncio

import httpx
import pytest

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.visiting import Flush, Rows, post_message, problem, say, transcript

SESSION_ID = "session_1234567890_abc123xyz"


def without_marks(answer: dict[str, object]) -> dict[str, object]:
    """An answer but for the mark that it is given again."""
    metadata = answer["metadata"]
    assert isinstance(metadata, dict)
    return answer | {"metadata": {name: value for name, value in metadata.items() if name != "replayed"}}


@pytest.mark.parametrize("leaving", [False, True])
async def test_the_same_message_id_gets_the_same_answer_and_runs_nothing(
    leaving: bool, client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop")
    first = await say(client, SESSION_ID, "Hello", message_id="m1")
    if leaving:
        await flush()
        await stores.client.delete(stores.keys.session(SESSION_ID))
    again = await say(client, SESSION_ID, "Hello", message_id="m1")
    assert (first["metadata"]["replayed"], again["metadata"]["replayed"]) == (False, True)
    assert without_marks(again) == without_marks(first)
    assert await transcript(client, SESSION_ID) == ["Hello", "You said: Hello"]


async def test_a_retry_while_the_first_one_runs_waits_for_its_answer(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop", config={"delay_ms": 300})
    tries = (say(client, SESSION_ID, "Hello", message_id="m1") for _ in range(2))
    one, other = await asyncio.gather(*tries)
    assert without_marks(one) == without_marks(other)
    assert {one["metadata"]["replayed"], other["metadata"]["replayed"]} == {False, True}
    await flush()
    assert len(await rows("SELECT * FROM agent_messages")) == 2


async def test_a_retry_finds_its_answer_behind_later_messages_too(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush
) -> None:
    await put_agent("shop", history_window=2)
    first = await say(client, SESSION_ID, "Hello", message_id="m1")
    for number in (2, 3):
        await flush()
        await say(client, SESSION_ID, f"Message {number}", message_id=f"m{number}")
    again = await say(client, SESSION_ID, "Hello", message_id="m1")
    assert again["metadata"]["replayed"]
    assert without_marks(again) == without_marks(first)


async def test_an_id_cannot_be_used_for_another_message(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    await say(client, SESSION_ID, "Hello", message_id="m1")
    answer = await post_message(client, SESSION_ID, "Something else", message_id="m1")
    problem(answer, 422, "message_id_reused", "message_id")


async def test_without_an_id_the_same_words_are_another_message(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    await say(client, SESSION_ID, "Hello")
    await say(client, SESSION_ID, "Hello")
    assert len(await transcript(client, SESSION_ID)) == 4
