-- Subtracts from an outbox's counter. On an empty outbox it starts from 0 again: an operator may have removed entries by
-- hand.
local function uncount(outbox_key, bytes_key, bytes)
  local left = redis.call('XLEN', outbox_key) > 0 and math.max(outbox_bytes(bytes_key) - bytes, 0) or 0
  redis.call('SET', bytes_key, string.format('%d', left))
end
