#!lua flags=allow-oom
-- Reads the log of a turn from a cursor on, and the state of the turn.
--
-- KEYS 1 session hash, 2 events stream, 3 fence string, 4 ticket string, 5 epoch hash
-- ARGV session_id, nonce, turn_id, agent_id ('' any), website_domain ('' any), authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), after (id of the last entry read, '-': none),
--      ticket_ms
-- replies (session_id and nonce follow the word)
--   running    fence, entries as {id, {field, value, ...}}, lease_left_ms
--   committed  number, entries, header, the turn's JSON
--   gone       entries: the turn no longer runs and is not a hot one
--   absent     ticket, id
--   erased | foreign | unauthorized
--   damaged    field
local session_key, events_key, fence_key, ticket_key, epoch_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

local session = load(session_key)
local barrier = unavailable(session, epoch_key, fence_key, ticket_key)
if barrier then return barrier end

local from = args.after
if from ~= '-' then from = '(' .. from end
local entries = redis.call('XRANGE', events_key, from, '+')
-- The key has only the turn's id in it, which does not prove whose the log is: an entry's first field is its `session`.
if entries[1] and entries[1][2][2] ~= args.session_id then entries = {} end
if session.turn == args.turn_id then
  return reply('running', session.turn_fence, entries, from_iso(session.turn_lease_until) - now_ms())
end
local first_hot, turns = tonumber(session.first_hot), tonumber(session.turns)
-- The newest first: most calls are about that one.
local needle = '{"id":"' .. args.turn_id .. '"'
for n = turns, first_hot, -1 do
  local turn = redis.call('HGET', session_key, 't:' .. n)
  if turn and string.sub(turn, 1, #needle) == needle then
    return reply('committed', n, entries, header(session), turn)
  end
end
return reply('gone', entries)
