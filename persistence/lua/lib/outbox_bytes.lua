-- The size of the records on an outbox, by its counter; a counter that is no number counts 0.
local function outbox_bytes(bytes_key)
  return whole(redis.call('GET', bytes_key)) or 0
end
