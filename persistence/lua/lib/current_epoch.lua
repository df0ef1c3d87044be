-- The epoch of the partition, false until somebody has settled it: see settle.lua.
local function current_epoch(epoch_key)
  return redis.call('HGET', epoch_key, 'epoch')
end
