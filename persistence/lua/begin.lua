#!lua
-- Begins a turn: checks everything that can refuse it, and takes the session's lease under a new fence. Repeating it with
-- the same turn_id begins nothing twice.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 fence string, 5 running zset, 6 ticket string, 7 epoch hash
-- ARGV session_id, nonce, turn_id, agent_id, website_domain ('' any), authorized (1 | 0), user_id ('' none),
--      trusted (1 | 0), message_id ('' none), digest (of the message), lease_ms, hot_ttl_s,
--      if_busy (queue | reject | interrupt), max_waiting, waiter_ms (a waiter that does not ask again is dropped),
--      rate_messages (per rate_ms, 0: no limit), rate_ms, rate_shadow (1: the limit refuses nothing),
--      max_backlog (records on the outbox), max_backlog_bytes, ticket_ms, channel
-- replies (session_id and nonce follow the word)
--   begun      fence, now_ms, ms that the rate limit is charged beyond now (more than rate_ms if it would have refused the
--              turn). The caller reads the hash behind this script, in the same round trip: through Lua it takes Redis ten
--              times as long. The reader gives the turn up if it finds damage in fields that are not checked here
--   absent     ticket, id of the session as of an older epoch ('' none): hydrate or open under it, then begin again
--   replay     turn number, header, the turn's JSON: message_id was answered before
--   busy       lease_left_ms, 1 if the running turn answers this message_id, id of the running turn
--   queued     position from 1: ask again
--   reused     this message_id is being answered for another message
--   queue_full | ended | erased | foreign | unauthorized | backlog_full
--   limited    retry_after_ms
--   damaged    field
local session_key, outbox_key, bytes_key, fence_key, running_key, ticket_key, epoch_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]

local session = pick(session_key, {'format', 'session_id', 'agent_id', 'website_domain', 'user_id', 'minted', 'status', 'turns',
  'first_hot', 'hot_ttl_s', 'turn', 'turn_fence', 'turn_lease_until', 'turn_message_id', 'waiting', 'rate_tat_ms',
  'epoch', 'id', 'lease_ms'})
if not session.format and redis.call('EXISTS', session_key) == 0 then return absent(epoch_key, fence_key, ticket_key) end
local broken = misplaced(session)
for _, name in ipairs({'agent_id', 'website_domain', 'user_id', 'status', 'turn_message_id', 'waiting'}) do
  broken = broken or not session[name] and name
end
if broken then return reply('damaged', broken) end
if session.epoch ~= current_epoch(epoch_key) then return absent(epoch_key, fence_key, ticket_key, session) end
local refused = refusal(session)
if refused then return reply(refused) end

local now = now_ms()
if args.message_id ~= '' then
  local first_hot = tonumber(session.first_hot)
  local needle = '"message_id":"' .. args.message_id .. '"'
  for i, turn in ipairs(hot_turns(session_key, first_hot, tonumber(session.turns))) do
    -- The search is only a filter: visitors' metadata may contain the same text.
    if turn and string.find(turn, needle, 1, true) then
      local readable, decoded = pcall(cjson.decode, turn)
      if not readable or type(decoded) ~= 'table' then return reply('damaged', 't:' .. first_hot + i - 1) end
      if decoded.message_id == args.message_id then
        return reply('replay', first_hot + i - 1, redis.call('HMGET', session_key, unpack(HEADER)), turn)
      end
    end
  end
end

if session.status == 'ended' then return reply('ended') end

if session.turn == args.turn_id then
  local ahead_ms = math.max((tonumber(session.rate_tat_ms) or 0) - now, 0)
  return reply('begun', session.turn_fence, now, math.ceil(ahead_ms))
end

-- Waiters are `turn_id@dropped_at_ms`, in order of arrival.
local waiting, position = {}, nil
for turn_id, until_ms in string.gmatch(session.waiting, '([^@ ]+)@(%d+)') do
  if turn_id == args.turn_id then
    waiting[#waiting + 1] = turn_id .. '@' .. string.format('%d', now + args.waiter_ms)
    position = #waiting
  elseif tonumber(until_ms) > now then
    waiting[#waiting + 1] = turn_id .. '@' .. string.format('%d', math.min(until_ms, now + args.waiter_ms))
  end
end

local left_ms = lease_left(session_key, running_key, session, now)
local busy = left_ms > 0
local message = args.message_id ~= '' and args.message_id .. ' ' .. args.digest or ''
if busy and message ~= '' and string.match(session.turn_message_id, '^%S*') == args.message_id then
  if session.turn_message_id ~= message then return reply('reused') end
  return reply('busy', left_ms, 1, session.turn)
end
-- A new turn is refused before it interrupts another or waits for it in vain.
if backlog_full(outbox_key, bytes_key) then return reply('backlog_full') end
-- An interrupting turn gets the id of the running one: it cancels that first, which ends its log.
if busy and args.if_busy == 'interrupt' then return reply('busy', left_ms, 0, session.turn) end
if args.if_busy ~= 'interrupt' and (busy or (#waiting > 0 and position ~= 1)) then
  if args.if_busy == 'reject' then return reply('busy', math.max(left_ms, 0), 0, session.turn) end
  if not position then
    if #waiting >= tonumber(args.max_waiting) then return reply('queue_full') end
    waiting[#waiting + 1] = args.turn_id .. '@' .. string.format('%d', now + args.waiter_ms)
    position = #waiting
  end
  store(session_key, session, {waiting = table.concat(waiting, ' ')})
  return reply('queued', position)
end

-- Generic cell rate algorithm (ITU-T I.371): one timestamp a session, a burst of the whole limit.
local rate_tat_ms, rate_ahead_ms = session.rate_tat_ms, 0
if tonumber(args.rate_messages) > 0 then
  -- The whole window is the most that it can be charged ahead. More means that the clock was set back: it begins anew.
  local charged_until = tonumber(rate_tat_ms) or 0
  if charged_until > now + args.rate_ms then charged_until = 0 end
  local tat = math.max(charged_until, now) + args.rate_ms / args.rate_messages
  local wait = tat - args.rate_ms - now
  rate_ahead_ms = tat - now
  if wait <= 0 then
    rate_tat_ms = string.format('%.3f', tat)
  elseif args.rate_shadow ~= '1' then
    return reply('limited', math.ceil(wait))
  end
end

if position then table.remove(waiting, position) end
if session.user_id == '' and args.user_id ~= '' then
  local all = load(session_key)
  broken = damage(all)
  if broken then return reply('damaged', broken) end
  adopt(session_key, outbox_key, bytes_key, all)
end
local fence = redis.call('INCR', fence_key)
local changes = {
  'turn', args.turn_id, 'turn_fence', fence, 'turn_lease_until', iso(now + args.lease_ms), 'turn_message_id', message,
  'rate_tat_ms', rate_tat_ms,
}
-- These seldom change, and each field written costs Redis and its append-only file.
for name, value in pairs({waiting = table.concat(waiting, ' '), hot_ttl_s = args.hot_ttl_s, lease_ms = args.lease_ms}) do
  if session[name] ~= value then
    changes[#changes + 1] = name
    changes[#changes + 1] = value
  end
end
redis.call('HSET', session_key, unpack(changes))
redis.call('PERSIST', session_key)
redis.call('ZADD', running_key, now + args.lease_ms, args.session_id)
redis.call('PUBLISH', args.channel, args.turn_id)
return reply('begun', fence, now, math.ceil(rate_ahead_ms))
