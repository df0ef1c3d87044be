"""What holds in Redis at every moment, looked at while the faults are on: in the end an empty outbox would hide it."""

import asyncio
from collections import defaultdict
from time import monotonic, time

from redis.asyncio import Redis

from tests.chaos.ledger import DiskStall, Ledger
from tests.chaos.site import Site
from tests.chaos.store import AWAY
from tests.support.rule import all_keys

EVERY_S = 0.5
EVERY_S_OF_MANY = 2.0
"""Where each partition takes a script of its own."""
LOOK = """
local wrong, carried = {}, 0
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'bytes' then carried = carried + entry[2][i + 1] end
  end
end
local counted = tonumber(redis.call('GET', KEYS[2]) or '0')
if counted ~= carried then
  wrong[1] = KEYS[2] .. ' said ' .. tostring(counted) .. ', the records carried ' .. carried
end
for i = 3, #KEYS do
  local held, ttl = redis.call('HMGET', KEYS[i], 'unflushed', 'turn'), redis.call('PTTL', KEYS[i])
  local unflushed, turn = held[1] or '', held[2] or ''
  if ttl ~= -2 and (unflushed .. turn == '') ~= (ttl ~= -1) then
    wrong[#wrong + 1] = KEYS[i] .. ' had a TTL of ' .. ttl .. ' ms, unflushed: ' .. unflushed .. ', turn: ' .. turn
  end
end
return wrong
"""


async def watch_redis(site: Site, ledger: Ledger) -> None:
    """Looks until it is cancelled, in one script each time for each partition: at the counter of the outbox, and at the one
    rule of the hot store, which is the TTL of each session. Notes too when Redis could not go on for want of its disk: no
    gateway answers sooner than its store."""
    store = site.store
    every_s = EVERY_S if store.keys.partitions == 1 else EVERY_S_OF_MANY
    while True:
        try:
            sessions: defaultdict[int, list[str]] = defaultdict(list)
            for key in await all_keys(store.client, store.keys):
                if ":session:" in key:
                    sessions[store.keys.partition(key.partition(":session:")[2])].append(key)
            commands: list[tuple[str | int, ...]] = []
            for partition in sorted({*await store.partitions(), *sessions}):
                keys = [store.keys.outbox(partition), store.keys.outbox_bytes(partition), *sessions[partition]]
                commands.append(("EVAL", LOOK, len(keys), *keys))
            for wrong in await store.each(commands):
                ledger.left_over += [text.decode() for text in wrong]
            ledger.looks += 1
            for server in await store.masters():
                await note_disk_stalls(store.client_of(server), ledger, store.clock_s)
        except AWAY:
            # It is away by a fault.
            pass
        await asyncio.sleep(every_s)


async def note_disk_stalls(client: Redis, ledger: Ledger, clock_s: float = 0) -> None:
    """What Redis itself has noted about writing its append-only file and waiting for that to be on the disk; what scripts
    and commands take is noted under other names, and excuses nobody. Of several in the same second it keeps the longest.
    `clock_s` is how much its clock is before ours."""
    for event in ("aof-fsync-always", "aof-write", "aof-write-pending-fsync", "aof-write-alone"):
        for second, took_ms in await client.latency_history(event):
            ledger.disk_stalls[event, second] = DiskStall(second - clock_s - time() + monotonic(), took_ms / 1000)
