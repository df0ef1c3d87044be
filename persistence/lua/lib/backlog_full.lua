-- Whether an outbox has no room for the records of another turn. An empty one has, whatever its counter says.
local function backlog_full(outbox_key, bytes_key)
  local records = redis.call('XLEN', outbox_key)
  return records >= tonumber(args.max_backlog)
    or records > 0 and outbox_bytes(bytes_key) >= tonumber(args.max_backlog_bytes)
end
