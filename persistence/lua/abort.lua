#!lua flags=allow-oom
-- Gives up a turn, running or still waiting: the session is as it was before. Harmless when the turn is not there.
--
-- KEYS 1 session hash, 2 running zset, 3 logs hash, 4 events stream of the turn
-- ARGV session_id, nonce, turn_id, channel, events (what the turn's log still lacks, its end included; '' nothing)
-- replies (each followed by session_id and nonce): aborted | lost
local session_key, running_key, logs_key, events_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local args = named(ARGV)
local function reply(word) return {word, args.session_id, args.nonce} end

local session = load(session_key)
if not session or confusion(session) or not session.waiting then return reply('lost') end
local waiting, found = {}, false
for waiter in string.gmatch(session.waiting, '%S+') do
  if string.sub(waiter, 1, #args.turn_id + 1) == args.turn_id .. '@' then
    found = true
  else
    waiting[#waiting + 1] = waiter
  end
end
if found then store(session_key, session, {waiting = table.concat(waiting, ' ')}) end
if session.turn ~= args.turn_id then return reply(found and 'aborted' or 'lost') end
finish_log(logs_key, events_key, args)
give_up(session_key, running_key, session)
return reply('aborted')
