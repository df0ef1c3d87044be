#!lua
-- Syncs one pod's counts with the limits that all pods share, any number of them at once.
-- Rates: generic cell rate algorithm (ITU-T I.371), one timestamp per bucket, which expires by itself.
--
-- KEYS any number of limits: 1 ... string (rate, day) or hash (running)
-- ARGV session_id ('' : no session), nonce, ... (for each key one of the following
--        rate <cost> <interval_ms> <most_ms>
--                                          turns, negative for a refund, the time that one costs, and how far ahead the
--                                          bucket can have been charged
--        day <cost>                        turns of this UTC day, negative for a refund
--        running <pod> <count> <life_ms>   turns that run on this pod, and how long that counts)
-- replies (session_id and nonce follow the word)
--   synced   for each key
--              rate     {ms that the bucket is charged beyond now, 0}
--              day      {turns of all pods, ms until midnight}
--              running  {turns of the other pods, 0}
local limit_keys = {}
for i = 1, #KEYS do limit_keys[i] = KEYS[i] end
local counts = {unpack(ARGV, 3)}
local now = now_ms()

local function rate(limit_key, cost, interval_ms, most_ms)
  local charged_until = tonumber(redis.call('GET', limit_key) or 0) or 0
  -- No limit is charged that far ahead: the clock was set back, and it begins anew.
  if charged_until > now + most_ms then charged_until = 0 end
  local ahead = math.max(math.max(charged_until - now, 0) + cost * interval_ms, 0)
  if ahead == 0 then
    redis.call('DEL', limit_key)
  else
    redis.call('SET', limit_key, string.format('%.3f', now + ahead), 'PX', string.format('%d', math.ceil(ahead) + 1))
  end
  return {math.ceil(ahead), 0}
end

local function day(limit_key, cost)
  local midnight = (math.floor(now / 86400000) + 1) * 86400000
  local turns = whole(redis.call('GET', limit_key)) or 0
  if cost ~= 0 then
    turns = math.max(turns + cost, 0)
    redis.call('SET', limit_key, string.format('%d', turns), 'PXAT', string.format('%d', midnight))
  end
  return {turns, midnight - now}
end

local function running(limit_key, pod, count, life_ms)
  if count > 0 then
    redis.call('HSET', limit_key, pod, string.format('%d@%d', count, now + life_ms))
  else
    redis.call('HDEL', limit_key, pod)
  end
  local others = 0
  local flat = redis.call('HGETALL', limit_key)
  for i = 1, #flat, 2 do
    local turns, until_ms = string.match(flat[i + 1], '^(%d+)@(%d+)$')
    if not turns or tonumber(until_ms) <= now or tonumber(until_ms) > now + life_ms then
      redis.call('HDEL', limit_key, flat[i])
    elseif flat[i] ~= pod then
      others = others + turns
    end
  end
  redis.call('PEXPIRE', limit_key, life_ms)
  return {others, 0}
end

local synced = {}
for i, limit_key in ipairs(limit_keys) do
  local words = {}
  for word in string.gmatch(counts[i], '%S+') do words[#words + 1] = word end
  if words[1] == 'rate' then
    synced[#synced + 1] = rate(limit_key, tonumber(words[2]), tonumber(words[3]), tonumber(words[4]))
  elseif words[1] == 'day' then
    synced[#synced + 1] = day(limit_key, tonumber(words[2]))
  else
    synced[#synced + 1] = running(limit_key, words[2], tonumber(words[3]), tonumber(words[4]))
  end
end
return reply('synced', unpack(synced))
