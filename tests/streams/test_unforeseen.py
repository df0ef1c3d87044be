"""Something unforeseen in the tasks of one turn: it is in the log, and leaves neither the turn nor a reader hanging."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.streams.steps import Pods, rest_of
from tests.support.serving import wait_for
from tests.support.spoken import Spoken
from tests.support.sse import kinds, resume, speak


def failing_once(patch: pytest.MonkeyPatch, target: Any, name: str) -> Callable[[], int]:
    """Has a function fail at its first call; returns how often it was called."""
    function, calls = getattr(target, name), [0]

    async def fails(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise KeyError("unforeseen")
        return await function(*arguments, **named)

    patch.setattr(target, name, fails)
    return lambda: calls[0]


async def test_a_turn_whose_log_could_not_be_stored_once_is_stored_whole(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing_once(monkeypatch, pods[0].stores.turn_logs, "append")
    with capture_logs() as lines:
        async with speak(pods[0].client, session_id, "Hello") as stream:
            turn_id = (await stream.take(1))[0].data["turn_id"]
            spoken.say("Hello", "one ")
            # Nothing but the turn's own events: before its end the other pods' readers have them.
            await wait_for(lambda: calls() >= 2, "the log is stored after all")
            async with resume(pods[1].client, session_id, turn_id) as follower:
                assert kinds(await follower.take(2)) == ["turn.started", "text.delta"]
                spoken.end("Hello")
                await rest_of(stream)
                await rest_of(follower)
                assert follower.events == stream.events
    assert "stream.append_failed" in {line["event"] for line in lines}


async def test_the_readers_of_a_turn_that_cannot_be_followed_get_an_end(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        failing_once(monkeypatch, pods[1].pod.streams.follower, "_look")
        with capture_logs() as lines:
            async with resume(pods[1].client, session_id, turn_id) as follower:
                events = await asyncio.wait_for(rest_of(follower), 10)
        assert (events[-1].kind, events[-1].data["retryable"]) == ("turn.failed", True)
        assert "stream.follow_failed" in {line["event"] for line in lines}
        spoken.end("Hello")
        assert kinds(await rest_of(stream))[-1] == "turn.completed"
