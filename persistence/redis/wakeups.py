"""Wake-ups: Redis tells a pod over one subscription that a session or turn log has changed.

They carry no data: a lost wake-up costs time, never an event, because readers also look again by themselves.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any

import structlog
from redis.asyncio import RedisCluster
from redis.exceptions import RedisError

from persistence.redis.connection import Client
from persistence.redis.keys import Keys
from persistence.retry import Attempts, Backoff

log = structlog.get_logger()

BACKOFF = Backoff(0.2, 0.2)
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
            except (OSError, RedisError) as error:
                # `run` meets the same fault, connects anew and subscribes to every channel.
                log.warning("wakeups.subscribe_failed", error=str(error))

    async def unsubscribe(self, channel: str, callback: Callback) -> None:
        """Undoes one `subscribe`."""
        callbacks = self._callbacks[channel]
        callbacks.remove(callback)
        if not callbacks:
            del self._callbacks[channel]
            if self._pubsub is not None:
                try:
                    await self._pubsub.unsubscribe(channel)
                except (OSError, RedisError) as error:
                    log.warning("wakeups.unsubscribe_failed", error=str(error))

    async def run(self, on_control: Callback) -> None:
        """Receives until cancelled, reconnecting after every fault. `on_control` gets the control channel's messages."""
        await self.subscribe(self._control, on_control)
        attempts = Attempts(BACKOFF)
        while True:
            try:
                await self._read()
            except Exception as error:
                # Of any type: redis-py parses stray bytes as a message, and fails on them in any way.
                log.warning("wakeups.failed", error=type(error).__name__)
                await attempts.pause(error)

    async def _read(self) -> None:
        # On Redis Cluster any node will do: a message is passed on to all of them.
        if isinstance(self._client, RedisCluster):
            await self._client.initialize()
        pubsub = self._client.pubsub()
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
                if message["type"] in ("subscribe", "message"):
                    # Messages before a (re)subscription may have been missed.
                    text = message["data"].decode() if message["type"] == "message" else ""
                    for callback in list(self._callbacks.get(message["channel"].decode(), ())):
                        callback(text)
        finally:
            self._pubsub = None
            await pubsub.aclose()  # type: ignore[no-untyped-call]
