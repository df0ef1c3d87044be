-- Removes an entry from an outbox, if it is there, and its size from the counter.
local function dequeue(outbox_key, bytes_key, group, entry)
  local found = redis.call('XRANGE', outbox_key, entry, entry)[1]
  redis.call('XACK', outbox_key, group, entry)
  if redis.call('XDEL', outbox_key, entry) == 0 then return end
  local fields, bytes = found[2], 0
  for i = 1, #fields, 2 do
    if fields[i] == 'bytes' then bytes = whole(fields[i + 1]) or 0 end
  end
  uncount(outbox_key, bytes_key, bytes)
end
