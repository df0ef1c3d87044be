#!lua
-- Puts a dead letter back on the outbox, once its cause has been removed.
--
-- KEYS 1 outbox stream, 2 outbox bytes string, 3 dead stream, 4 session hash
-- ARGV session_id, nonce, dead_entry
-- replies (session_id and nonce follow the word)
--   queued  id on the outbox
--   gone
local outbox_key, bytes_key, dead_key, session_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

-- Replaces each token whose text is `old` in a list of tokens; an empty `new` removes it.
local function replace(list, old, new)
  local tokens = {}
  for token in string.gmatch(list or '', '%S+') do
    if token == old then token = new end
    if token ~= '' then tokens[#tokens + 1] = token end
  end
  return table.concat(tokens, ' ')
end

local found = redis.call('XRANGE', dead_key, args.dead_entry, args.dead_entry)
if #found == 0 then return reply('gone') end
local fields, fact, was = {}, nil, nil
for i = 1, #found[1][2], 2 do
  local name, value = found[1][2][i], found[1][2][i + 1]
  if name == 'entry' then
    was = value
  elseif name ~= 'reason' and name ~= 'died_at' and name ~= 'bytes' then
    if name == 'fact' then fact = value end
    fields[#fields + 1] = name
    fields[#fields + 1] = value
  end
end
local entry = enqueue(outbox_key, bytes_key, fields)
redis.call('XDEL', dead_key, args.dead_entry)
local lists = redis.call('HMGET', session_key, 'unflushed', 'dead')
if lists[1] and fact and was then
  redis.call('HSET', session_key, 'unflushed', replace(lists[1], fact .. '@' .. was, fact .. '@' .. entry),
    'dead', replace(lists[2], fact .. '@' .. args.dead_entry, ''))
end
return reply('queued', entry)
