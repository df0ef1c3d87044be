"""Wake-ups: one subscription per pod."""

import asyncio
from collections.abc import Callable
from typing import Any

import structlog
from redis.asyncio import RedisCluster
from redis.exceptions import RedisError

from persistence.redis.connection import Client
from persistence.redis.keys import Keys

log = structlog.get_logger()

Callback = Callable[[str], None]


class WakeUps:
    """One subscription connection per pod, whatever it serves. `run` keeps it going."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._client = client
        self._control = keys.control
        self._callbacks: dict[str, list[Callback]] = {}
        self._pubsub: Any = None

    async def subscribe(self, channel: str, callback: Callback) -> None:
        """Calls `callback` with what is published, and with '' whenever something may have been missed."""
        callbacks = self._callbacks.setdefault(channel, [])
        callbacks.append(callback)
        if len(callbacks) == 1 and self._pubsub is not None:
            try:
                await self._pubsub.subscribe(channel)
            except (OSError, RedisError) as error:
                # The loop that reads meets the same fault, connects anew and subscribes to everything.
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
        """Reads until cancelled; connects again after every fault."""
        await self.subscribe(self._control, on_control)
        while True:
            try:
                await self._read()
            except Exception as error:
                # Of any kind: redis-py takes apart whatever comes, and what is no message ends in whatever error it may.
                log.warning("wakeups.failed", error=type(error).__name__)
                await asyncio.sleep(0.2)

    async def _read(self) -> None:
        # On Redis Cluster any node will do: what is published on one is heard on all.
        if isinstance(self._client, RedisCluster):
            await self._client.initialize()
        pubsub = self._client.pubsub()
        try:
            channels = set(self._callbacks)
            await pubsub.subscribe(*channels)
            # Known to others only now: two first subscriptions at once would take two connections, one of them unread.
            self._pubsub = pubsub
            if late := self._callbacks.keys() - channels:
                await pubsub.subscribe(*late)
            while True:
                message = await pubsub.get_message(timeout=10)
                if message is None:
                    await pubsub.ping()
                    continue
                if message["type"] in ("subscribe", "message"):
                    # A (re)subscription tells that something may have been missed before it.
                    text = message["data"].decode() if message["type"] == "message" else ""
                    for callback in list(self._callbacks.get(message["channel"].decode(), ())):
                        callback(text)
        finally:
            self._pubsub = None
            await pubsub.aclose()  # type: ignore[no-untyped-call]
