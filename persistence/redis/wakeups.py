"""Wake-ups: Redis tells a pod over one subscription that a session or turn log has changed.

They carry no data: a lost wake-up costs time, never an event, because readers also look again by themselves.
"""

import random
from collections.abc import Callable
from time import monotonic
from typing import Any

import structlog
from redis.asyncio import RedisCluster

from persistence.errors import PersistenceError
from persistence.redis.connection import Client, translated
from persistence.redis.keys import Keys
from persistence.retry import Attempts, Backoff

log = structlog.get_logger()

BACKOFF = Backoff(0.2, 0.2)
UNFORESEEN = 5
"""Faults in a row, other than that Redis is away, after which the task has failed. Stray replies
make a few, one a connection."""
SILENCE_S = 1.0
"""A subscription that was silent for so long is asked with PING whether it is still connected."""
PONG_S = 2.0
"""A node that has not answered by then is taken for hung: the subscription moves to another connection."""

Callback = Callable[[str], None]


class WakeUps:
    """The wake-ups of a pod, all over one connection, which `run` keeps open."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._client = client
        self._control = keys.control
        self._callbacks: dict[str, list[Callback]] = {}
        self._pubsub: Any = None
        self._node = ""
        self._unforeseen = 0

    @property
    def channels(self) -> set[str]:
        """The channels with a subscriber on this pod."""
        return set(self._callbacks)

    @property
    def listening(self) -> bool:
        """Whether the subscription connection is up."""
        return self._pubsub is not None

    async def subscribe(self, channel: str, callback: Callback) -> None:
        """Calls `callback` with each message on the channel, and with '' whenever messages may have been missed."""
        callbacks = self._callbacks.setdefault(channel, [])
        callbacks.append(callback)
        if len(callbacks) == 1 and self._pubsub is not None:
            try:
                await self._pubsub.subscribe(channel)
            except Exception as error:
                # Of any type, as in `run`, which meets the same fault, connects anew and subscribes to every channel.
                log.warning("wakeups.subscribe_failed", error=type(error).__name__)

    async def unsubscribe(self, channel: str, callback: Callback) -> None:
        """Undoes one `subscribe`."""
        callbacks = self._callbacks[channel]
        callbacks.remove(callback)
        if not callbacks:
            del self._callbacks[channel]
            if self._pubsub is not None:
                try:
                    await self._pubsub.unsubscribe(channel)
                except Exception as error:
                    log.warning("wakeups.unsubscribe_failed", error=type(error).__name__)

    async def run(self, on_control: Callback) -> None:
        """Receives until cancelled, reconnecting after every fault. `on_control` gets the control channel's messages.

        Raises what was unforeseen UNFORESEEN times in a row; it may be called again.
        """
        if on_control not in self._callbacks.get(self._control, ()):
            await self.subscribe(self._control, on_control)
        attempts = Attempts(BACKOFF)
        while True:
            try:
                with translated():
                    await self._read()
            except PersistenceError as error:
                log.warning("wakeups.failed", error=str(error))
                await attempts.pause(error)
            except Exception as error:
                # Of any type: redis-py parses stray bytes as a message, and fails on them in any way.
                log.warning("wakeups.failed", error=type(error).__name__)
                self._unforeseen += 1
                if self._unforeseen >= UNFORESEEN:
                    raise
                await attempts.pause(error)

    async def _make_pubsub(self) -> Any:
        if not isinstance(self._client, RedisCluster):
            return self._client.pubsub()
        await self._client.initialize()
        # Any node will do, for a message is passed on to all of them: but not the one that has just failed.
        nodes = self._client.get_nodes()
        node = random.choice([node for node in nodes if node.name != self._node] or nodes)  # noqa: S311
        self._node = node.name
        return self._client.pubsub(node=node)

    async def _read(self) -> None:
        pubsub = await self._make_pubsub()
        try:
            channels = set(self._callbacks)
            await pubsub.subscribe(*channels)
            # `subscribe` sees it only now: two first subscriptions at once would take two connections, one never read.
            self._pubsub = pubsub
            if late := self._callbacks.keys() - channels:
                await pubsub.subscribe(*late)
            asked_at: float | None = None
            while True:
                message = await pubsub.get_message(timeout=SILENCE_S)
                if message is None:
                    if asked_at is None:
                        asked_at = monotonic()
                        await pubsub.ping()
                    elif monotonic() - asked_at >= PONG_S:
                        raise TimeoutError("no pong: the node hangs")
                    continue
                asked_at = None
                if message["type"] in ("message", "pong"):
                    self._unforeseen = 0
                if message["type"] in ("subscribe", "message"):
                    # Messages before a (re)subscription may have been missed.
                    text = message["data"].decode() if message["type"] == "message" else ""
                    for callback in list(self._callbacks.get(message["channel"].decode(), ())):
                        callback(text)
        finally:
            self._pubsub = None
            await pubsub.aclose()
