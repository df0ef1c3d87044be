#!lua flags=allow-oom
-- Reads a session and some of its hot turns.
--
-- KEYS 1 session hash, 2 fence string, 3 ticket string, 4 epoch hash
-- ARGV session_id, nonce, agent_id ('' any), website_domain ('' any), authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), count (of the newest turns to return), ticket_ms,
--      any_epoch (1: as Redis has it, whatever Postgres may know since)
-- replies (session_id and nonce follow the word)
--   read    ttl_ms (-1: none), first_hot, flushed, id and fence of the running turn ('' none), number of the
--           first turn returned, header, turns
--   absent  ticket, id
--   erased | foreign | unauthorized
--   damaged field
local session_key, fence_key, ticket_key, epoch_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local session = load(session_key)
if session and args.any_epoch == '1' then session.epoch = current_epoch(epoch_key) end
local barrier = unavailable(session, epoch_key, fence_key, ticket_key)
if barrier then return barrier end

local first_hot, last = tonumber(session.first_hot), tonumber(session.turns)
local first = math.max(first_hot, last - args.count + 1)
return reply('read', redis.call('PTTL', session_key), first_hot, tonumber(session.flushed), session.turn, session.turn_fence,
  first, header(session), hot_turns(session_key, first, last))
