#!lua flags=allow-oom
-- Runs one command on one key. It is a script for the sake of the echo: a plain reply does not tell whose it is.
--
-- KEYS 1 the key, of any type
-- ARGV session_id ('' : the reply is about no session), nonce, command, and as 1, 2 ... what follows the key in it
-- replies done, session_id, nonce, what the command replies
local key = KEYS[1]
local args = named(ARGV)

local rest = {}
while args[tostring(#rest + 1)] do rest[#rest + 1] = args[tostring(#rest + 1)] end
return {'done', args.session_id, args.nonce, redis.call(args.command, key, unpack(rest))}
