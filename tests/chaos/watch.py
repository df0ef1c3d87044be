"""What holds in Redis at every moment, looked at while the faults are on: in the end an empty outbox would hide it."""

import asyncio
from time import monotonic, time

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.chaos.ledger import DiskStall, Ledger
from tests.chaos.site import Site
from tests.support.rule import all_keys

EVERY_S = 0.5
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
    """Looks until it is cancelled, in one script each time: at the counter of the outbox, and at the one rule of the hot
    store, which is the TTL of each session. Notes too when Redis could not go on for want of its disk: no gateway answers
    sooner than its store."""
    outbox, counter = site.keys.outbox(0), site.keys.outbox_bytes(0)
    while True:
        try:
            sessions = [key for key in await all_keys(site.client, site.keys) if ":session:" in key]
            wrong = await site.client.eval(LOOK, 2 + len(sessions), outbox, counter, *sessions)
            ledger.left_over += [text.decode() for text in wrong]
            ledger.looks += 1
            await note_disk_stalls(site.client, ledger)
        except (RedisError, OSError):
            # It is away by a fault.
            pass
        await asyncio.sleep(EVERY_S)


async def note_disk_stalls(client: Redis, ledger: Ledger) -> None:
    """What Redis itself has noted about writing its append-only file and waiting for that to be on the disk; what scripts
    and commands take is noted under other names, and excuses nobody. Of several in the same second it keeps the longest."""
    for event in ("aof-fsync-always", "aof-write", "aof-write-pending-fsync", "aof-write-alone"):
        for second, took_ms in await client.latency_history(event):
            ledger.disk_stalls[event, second] = DiskStall(second - time() + monotonic(), took_ms / 1000)
