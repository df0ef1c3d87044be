#!lua flags=allow-oom
-- Runs one command on one key. A script, because a plain command's reply has no echo that proves whose it is.
--
-- KEYS 1 the key, of any type
-- ARGV session_id ('' : no session), nonce, command, ... (its arguments after the key)
-- replies (session_id and nonce follow the word)
--   done    the command's reply
local key = KEYS[1]
local rest = {unpack(ARGV, 4)}

return reply('done', redis.call(args.command, key, unpack(rest)))
