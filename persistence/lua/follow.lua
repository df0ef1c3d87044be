#!lua flags=allow-oom
-- Reads the log of a turn behind a cursor, and how the turn stands.
--
-- KEYS 1 session hash, 2 events stream, 3 fence string, 4 ticket string
-- ARGV session_id, nonce, turn_id, agent_id ('' any), website_domain ('' any), authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), after ('-': from the start, or an entry id behind which to read),
--      ticket_ms
-- replies (each followed by session_id and nonce)
--   running    fence, entries as {id, {field, value, ...}}, lease_left_ms
--   committed  number, entries, header, the turn's JSON
--   gone       entries: the turn runs no more and is not among the hot ones
--   absent     ticket
--   erased | foreign | unauthorized
--   damaged    field
local session_key, events_key, fence_key, ticket_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local args = named(ARGV)
local function reply(word, ...) return {word, args.session_id, args.nonce, ...} end

local session = load(session_key)
if not session then return absent(fence_key, ticket_key, args) end
local barred = bar(session, args)
if barred then return barred end

local from = args.after
if from ~= '-' then from = '(' .. from end
local entries = redis.call('XRANGE', events_key, from, '+')
-- The key is named by the turn alone, and its id is no proof of whose it is: `session` is the first field of an entry.
if entries[1] and entries[1][2][2] ~= args.session_id then entries = {} end
if session.turn == args.turn_id then
  return reply('running', session.turn_fence, entries, from_iso(session.turn_lease_until) - now_ms())
end
local first_hot, turns = tonumber(session.first_hot), tonumber(session.turns)
-- The newest first: that is the one which is asked for.
local needle = '{"id":"' .. args.turn_id .. '"'
for n = turns, first_hot, -1 do
  local turn = redis.call('HGET', session_key, 't:' .. n)
  if turn and string.sub(turn, 1, #needle) == needle then
    return reply('committed', n, entries, header(session), turn)
  end
end
return reply('gone', entries)
