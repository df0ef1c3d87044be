#!lua flags=allow-oom
-- Compares a session that is in Redis as of an older epoch with what Postgres has of it, read under the ticket that was given
-- before. One that knows all that Postgres knows belongs to the current epoch from now on.
--
-- KEYS 1 session hash, 2 ticket string, 3 epoch hash
-- ARGV session_id, nonce, ticket, id (of the session in Postgres, '' : Postgres has none), revision (the newest in Postgres),
--      ended (1 | 0), user_id (what is final of it in Postgres),
--      vouched (1: nobody has looked into Postgres, or waited for what is on its way there: look again in the next epoch)
-- replies (session_id and nonce follow the word)
--   kept       it belongs to the current epoch
--   behind     Postgres has what Redis has, and more: hydrate
--   waiting    Postgres knows something else, and lacks records on the outbox: flush them first
--   stale      the ticket is used up, or the session is not one of an older epoch any more: ask again
--   damaged    field
local session_key, ticket_key, epoch_key = KEYS[1], KEYS[2], KEYS[3]

local session = load(session_key)
local epoch = current_epoch(epoch_key)
if not session or not epoch or session.epoch == epoch or redis.call('GET', ticket_key) ~= args.ticket then
  return reply('stale')
end
local broken = damage(session)
if broken then return reply('damaged', broken) end

if args.vouched ~= '1' and args.id ~= '' then
  local waiting = waiting_records(session, redis.call('HGET', session_key, 'dead') or '')
  local unknown = args.ended == '1' and session.status ~= 'ended' or args.user_id ~= '' and args.user_id ~= session.user_id
  if unknown or args.id ~= session.id or tonumber(args.revision) > tonumber(session.revision) - waiting then
    return reply(waiting > 0 and 'waiting' or 'behind')
  end
end
if args.vouched == '1' then redis.call('HINCRBY', epoch_key, 'vouched', 1) end
store(session_key, session, {epoch = epoch})
redis.call('DEL', ticket_key)
return reply('kept')
