#!lua flags=allow-oom
-- Gives up a turn, running or still waiting: the session is as it was before. Does nothing if there is no such turn.
--
-- KEYS 1 session hash, 2 running zset, 3 logs hash, 4 events stream of the turn
-- ARGV session_id, nonce, turn_id, fence, channel, events (JSON array, those missing in the turn's log, its end included;
--      '' none), first, last (numbers of the first and the last of them), keep_from, log_ttl_ms
-- replies (session_id and nonce follow the word): aborted | lost
local session_key, running_key, logs_key, events_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local session = load(session_key)
if not session or misplaced(session) or not session.waiting then return reply('lost') end
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
finish_log(logs_key, events_key)
give_up(session_key, running_key, session)
return reply('aborted')
