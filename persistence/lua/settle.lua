#!lua flags=allow-oom
-- Begins a new epoch of a partition when its server is not the one that it was: started again, or promoted, it may have
-- forgotten its last writes. A session whose epoch is an older one is compared with Postgres at its next use.
--
-- KEYS 1 epoch hash, 2 fence string
-- ARGV session_id ('' : no session), nonce, server (its replication id), after ('' : change nothing, else the last epoch that
--      Postgres knows), redo (1: the epoch is over though the server is the same), fence (the last that Postgres knows),
--      seen (the last fence that the caller has been given), jump (fences left out, for those that nobody here knows of)
-- replies (session_id and nonce follow the word)
--   settled    epoch
--   unsettled  epoch (0: none)
local epoch_key, fence_key = KEYS[1], KEYS[2]

local held = redis.call('HMGET', epoch_key, 'epoch', 'server', 'base', 'seen', 'lost')
local epoch, server = whole(held[1]) or 0, held[2]
local base, seen, lost = whole(held[3]) or 0, whole(held[4]) or 0, whole(held[5]) or 0

-- Fences between the last that has outlived the loss and the last that somebody was given belong to turns that are lost.
local function count_lost()
  local told = tonumber(args.seen)
  if told <= math.max(base, seen) then return end
  lost, seen = lost + told - math.max(base, seen), told
  redis.call('HSET', epoch_key, 'seen', string.format('%d', seen), 'lost', string.format('%d', lost))
end

local over = epoch == 0 or server ~= args.server or args.redo == '1' and epoch <= tonumber(args.after)
if not over then
  local first = whole(redis.call('HGET', epoch_key, 'first')) or 0
  if tonumber(args.seen) < first then count_lost() end
  return reply('settled', epoch)
end
if args.after == '' then return reply('unsettled', epoch) end

local fence = whole(redis.call('GET', fence_key)) or 0
base = math.max(fence, tonumber(args.fence))
seen = base
if epoch > 0 and server ~= args.server then count_lost() end
if base > 0 or tonumber(args.after) > 0 then
  fence = math.max(base, seen) + (server ~= args.server and tonumber(args.jump) or 0)
  redis.call('SET', fence_key, string.format('%d', fence))
end
epoch = math.max(epoch, tonumber(args.after)) + 1
redis.call('HSET', epoch_key, 'epoch', string.format('%d', epoch), 'server', args.server, 'settled_at', iso(now_ms()),
  'base', string.format('%d', base), 'seen', string.format('%d', seen), 'first', string.format('%d', fence + 1))
redis.call('HDEL', epoch_key, 'vouched')
return reply('settled', epoch)
