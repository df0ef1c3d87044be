-- Puts a record, a list of names and values, on an outbox; returns the entry's id. The record carries its size as its last
-- field, so that exactly what was added to the counter is subtracted later.
local function enqueue(outbox_key, bytes_key, record)
  local bytes = 0
  for i = 1, #record do bytes = bytes + #record[i] end
  bytes = string.format('%d', bytes)
  local counted = redis.pcall('INCRBY', bytes_key, bytes)
  -- INCRBY fails on a counter that is no number.
  if type(counted) == 'table' then redis.call('SET', bytes_key, bytes) end
  record[#record + 1] = 'bytes'
  record[#record + 1] = bytes
  return redis.call('XADD', outbox_key, '*', unpack(record))
end
