-- What scripts share. When a script is loaded, the blocks whose names it uses are put behind its `#!lua` line, for all that
-- stands there is done anew at each call. A block begins with `local`, and a blank line is before it.

-- The fields of a session hash that describe the session, in this order. records.py reads them by name.
local HEADER = {
  'format', 'id', 'session_id', 'agent_id', 'channel', 'status', 'user_id', 'website_domain', 'ip_address',
  'user_agent', 'started_at', 'last_activity_at', 'ended_at', 'message_count', 'context', 'metadata', 'minted',
  'turns', 'revision',
}

-- The fields that only the hash has: where its turns are and what holds it.
local STATE = {
  'first_hot', 'flushed', 'unflushed', 'hot_ttl_s', 'turn', 'turn_fence', 'turn_lease_until', 'turn_message_id',
  'waiting', 'rate_tat_ms',
}

-- The names of all fields: HEADER, then STATE. Made when it is asked for: most scripts that are run often never do.
local function all_fields()
  local names = {}
  for _, part in ipairs({HEADER, STATE}) do
    for _, name in ipairs(part) do names[#names + 1] = name end
  end
  return names
end

-- ARGV as name, value, name, value ... becomes a table.
local function named(argv)
  local args = {}
  for i = 1, #argv, 2 do args[argv[i]] = argv[i + 1] end
  return args
end

-- Milliseconds since 1970 by the only clock there is.
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Civil date arithmetic after Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
local function iso(ms)
  local seconds = math.floor(ms / 1000)
  local days = math.floor(seconds / 86400)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local rest = seconds - days * 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, day,
    math.floor(rest / 3600), math.floor(rest % 3600 / 60), rest % 60, ms % 1000)
end

local function from_iso(text)
  local year, month, day, hour, minute, second, ms =
    string.match(text or '', '^(%d+)-(%d+)-(%d+)T(%d+):(%d+):(%d+)%.(%d+)Z$')
  if not year then return nil end
  year, month, day = tonumber(year), tonumber(month), tonumber(day)
  if month < 1 or month > 12 or day < 1 or day > 31 or tonumber(hour) > 23 or tonumber(minute) > 59
    or tonumber(second) > 59 then return nil end
  if month <= 2 then year = year - 1 end
  local era = math.floor(year / 400)
  local yoe = year - era * 400
  local doy = math.floor((153 * (month > 2 and month - 3 or month + 9) + 2) / 5) + day - 1
  local doe = yoe * 365 + math.floor(yoe / 4) - math.floor(yoe / 100) + doy
  local days = era * 146097 + doe - 719468
  return ((days * 24 + hour) * 60 + minute) * 60000 + second * 1000 + tonumber(ms)
end

-- The session's fields by name, or nil when there is no such session.
local function load(key)
  local names = all_fields()
  local values = redis.call('HMGET', key, unpack(names))
  if not values[1] and redis.call('EXISTS', key) == 0 then return nil end
  local session = {key = key}
  for i, name in ipairs(names) do session[name] = values[i] end
  return session
end

-- A whole number that is not negative, as scripts write it; else nil ('nan', 'inf' and '1e300' are numbers to Lua).
local function whole(text)
  return text and #text <= 15 and not string.find(text, '%D') and tonumber(text) or nil
end

-- The name of a field without which nobody can tell what runs on the session and where its turns are, or nil. `session` has
-- at least those that are named here.
local function confusion(session)
  if session.format ~= '1' then return 'format' end
  local turns, first_hot = whole(session.turns), whole(session.first_hot)
  if not turns then return 'turns' end
  if not first_hot or first_hot < 1 or first_hot > turns + 1 then return 'first_hot' end
  local hot_ttl_s = whole(session.hot_ttl_s)
  if not hot_ttl_s or hot_ttl_s < 1 then return 'hot_ttl_s' end
  local key = session.key
  if turns - first_hot + 1 > redis.call('HLEN', key) then return 'turns' end
  if session.minted ~= '0' and session.minted ~= '1' then return 'minted' end
  for _, name in ipairs({'turn', 'turn_fence', 'turn_lease_until'}) do
    if not session[name] then return name end
  end
  if session.turn ~= '' then
    if not whole(session.turn_fence) then return 'turn_fence' end
    if not from_iso(session.turn_lease_until) then return 'turn_lease_until' end
  end
  if not session.rate_tat_ms or session.rate_tat_ms ~= '' and not string.match(session.rate_tat_ms, '^%d+%.?%d*$') then
    return 'rate_tat_ms'
  end
  local tail = ':session:' .. (session.session_id or '')
  if string.sub(key, -#tail) ~= tail then return 'session_id' end
  return nil
end

-- The name of a field that is missing or unreadable, or nil. Damage is never taken for absence.
local function damage(session)
  local field = confusion(session)
  if field then return field end
  for _, name in ipairs({'message_count', 'revision', 'flushed'}) do
    if not whole(session[name]) then return name end
  end
  for _, name in ipairs(all_fields()) do
    if not session[name] then return name end
  end
  local uuid = '^%x%x%x%x%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x%x%x%x%x%x%x%x%x%x%x%x$'
  if not string.match(session.id, uuid) then return 'id' end
  if session.status ~= 'erased' and not string.match(session.agent_id, uuid) then return 'agent_id' end
  if tonumber(session.flushed) > tonumber(session.turns) then return 'flushed' end
  for _, name in ipairs({'started_at', 'last_activity_at'}) do
    if not from_iso(session[name]) then return name end
  end
  if session.ended_at ~= '' and not from_iso(session.ended_at) then return 'ended_at' end
  return nil
end

-- Why the caller may not have this session: a word, or nil when it may. An empty agent_id or website_domain is not
-- compared. A session that has a user is for that user alone, but for callers that are trusted: operators, and servers of
-- the site. What is foreign comes first: who may not have the session does not learn that it was there either.
local function refusal(session, args)
  if args.agent_id ~= '' and session.agent_id ~= args.agent_id then return 'foreign' end
  if args.website_domain ~= '' and session.website_domain ~= args.website_domain then return 'foreign' end
  local user_id = session.user_id or ''
  if user_id ~= '' and user_id ~= args.user_id and args.trusted ~= '1' then return 'foreign' end
  if session.status == 'erased' then return 'erased' end
  if session.minted == '1' and args.authorized ~= '1' then return 'unauthorized' end
  return nil
end

-- The reply to a caller who gets nothing of this session, because it is damaged or not the caller's; else nil.
local function bar(session, args)
  local broken = damage(session)
  if broken then return {'damaged', args.session_id, args.nonce, broken} end
  local refused = refusal(session, args)
  if refused then return {refused, args.session_id, args.nonce} end
  return nil
end

-- The reply for a session that is not in Redis: a ticket to install what Postgres has of it. All who ask while it is absent
-- share one, for Postgres learns nothing new about it meanwhile; whoever installs or creates it uses the ticket up, and
-- nothing that was read before can be installed afterwards.
local function absent(fence_key, ticket_key, args)
  local ticket = tonumber(redis.call('GET', ticket_key) or redis.call('INCR', fence_key))
  redis.call('SET', ticket_key, ticket, 'PX', args.ticket_ms)
  return {'absent', args.session_id, args.nonce, ticket}
end

-- HSET of a table, and of the table's values in the loaded session too.
local function store(key, session, fields)
  local flat = {}
  for name, value in pairs(fields) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
    session[name] = tostring(value)
  end
  redis.call('HSET', key, unpack(flat))
end

-- The bytes of the records on an outbox, by its counter. What is no number counts 0.
local function outbox_bytes(bytes_key)
  return whole(redis.call('GET', bytes_key)) or 0
end

-- Whether an outbox has no room for the records of another turn. An empty one has, whatever its counter says.
local function backlog_full(outbox_key, bytes_key, args)
  local records = redis.call('XLEN', outbox_key)
  return records >= tonumber(args.max_backlog)
    or records > 0 and outbox_bytes(bytes_key) >= tonumber(args.max_backlog_bytes)
end

-- Puts a record, a list of names and values, on an outbox and counts its bytes, which it carries as its last field: what
-- is taken off the counter later is what was added. Returns the entry's id.
local function enqueue(outbox_key, bytes_key, record)
  local bytes = 0
  for i = 1, #record do bytes = bytes + #record[i] end
  bytes = string.format('%d', bytes)
  local counted = redis.pcall('INCRBY', bytes_key, bytes)
  -- The error of a counter that is no number.
  if type(counted) == 'table' then redis.call('SET', bytes_key, bytes) end
  record[#record + 1] = 'bytes'
  record[#record + 1] = bytes
  return redis.call('XADD', outbox_key, '*', unpack(record))
end

-- A record: a fact about the session, which `described` is as JSON; `turn` is the turn's JSON or ''.
local function record(session_id, fact, described, turn)
  return {'format', '2', 'session_id', session_id, 'fact', fact, 'session', described, 'turn', turn}
end

-- Takes bytes off an outbox's counter. When nothing is left the counter begins anew: an operator may have removed entries by
-- hand.
local function uncount(outbox_key, bytes_key, bytes)
  local left = redis.call('XLEN', outbox_key) > 0 and math.max(outbox_bytes(bytes_key) - bytes, 0) or 0
  redis.call('SET', bytes_key, string.format('%d', left))
end

-- Takes an entry off an outbox and its bytes off the counter, if it is there.
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

-- The session as JSON, as it travels with a record: records.py decodes it as its Session.
local function described(session)
  local members = {}
  for i = 2, #HEADER do
    local name, value = HEADER[i], session[HEADER[i]]
    if name == 'minted' then
      value = value == '1' and 'true' or 'false'
    elseif name ~= 'message_count' and name ~= 'turns' and name ~= 'revision' and name ~= 'context' and name ~= 'metadata' then
      value = cjson.encode(value)
    end
    members[#members + 1] = '"' .. name .. '":' .. value
  end
  return '{' .. table.concat(members, ',') .. '}'
end

-- Adds a record on its way to the list of those that Postgres does not have yet.
local function with_unflushed(unflushed, fact, entry)
  return (unflushed == '' and '' or unflushed .. ' ') .. fact .. '@' .. entry
end

-- Puts a fact about the session, other than a turn, on its way to Postgres. The hash, already stored, and the record change
-- in one script: both or neither.
local function emit(key, outbox_key, bytes_key, session, word)
  session.revision = string.format('%d', session.revision + 1)
  local fact = word .. ':' .. session.revision
  local entry = enqueue(outbox_key, bytes_key, record(session.session_id, fact, described(session), ''))
  store(key, session, {revision = session.revision, unflushed = with_unflushed(session.unflushed, fact, entry)})
  redis.call('PERSIST', key)
end

-- An anonymous session becomes the user's who comes with a verified user token, and stays it. Postgres is told by a record
-- of its own, whatever becomes of the turn.
local function adopt(key, outbox_key, bytes_key, session, args)
  if session.user_id ~= '' or args.user_id == '' then return end
  store(key, session, {user_id = args.user_id})
  emit(key, outbox_key, bytes_key, session, 'opened')
end

-- The one rule of the hot store: a TTL if, and only if, all of the session is in Postgres and no turn runs on it.
-- `last_activity_ms` is when something last happened on it.
local function settle(key, unflushed, turn, hot_ttl_s, last_activity_ms, now)
  if unflushed ~= '' or turn ~= '' then
    redis.call('PERSIST', key)
    return
  end
  local left = hot_ttl_s * 1000 - (now - last_activity_ms)
  redis.call('PEXPIRE', key, string.format('%d', math.max(left, 1000)))
end

-- Lets go of the turn that holds the session.
local function release(key, running_key, session)
  store(key, session, {turn = '', turn_fence = '', turn_lease_until = '', turn_message_id = ''})
  redis.call('ZREM', running_key, session.session_id)
end

-- Lets go of a turn that came to nothing: the session is as it was before. One that is damaged gets no TTL.
local function give_up(key, running_key, session)
  release(key, running_key, session)
  local last = from_iso(session.last_activity_at)
  if last then settle(key, session.unflushed, '', session.hot_ttl_s, last, now_ms()) end
end

-- The session's HEADER as a list, for a reply.
local function header(session)
  local values = {}
  for i, name in ipairs(HEADER) do values[i] = session[name] end
  return values
end

-- The turns numbered from first to last, for a reply; a missing one is false.
local function hot_turns(key, first, last)
  local turns = {}
  for chunk = first, last, 500 do
    local names = {}
    for n = chunk, math.min(chunk + 499, last) do names[n - chunk + 1] = 't:' .. n end
    local some = redis.call('HMGET', key, unpack(names))
    if last - first < 500 then return some end
    for _, turn in ipairs(some) do turns[#turns + 1] = turn end
  end
  return turns
end

-- The log of a turn is a stream. An entry holds some events, numbered without gaps, as `session` (whose they are),
-- `first` (the number of the first) and `events` (a JSON array); its id is `<fence>-<number of the last>`, which is the
-- last one's cursor.

-- The number of the last event in a log, 0 when there is none.
local function log_tail(events_key)
  local tail = redis.call('XREVRANGE', events_key, '+', '-', 'COUNT', 1)
  return tail[1] and tonumber(string.match(tail[1][1], '%-(%d+)$')) or 0
end

-- The logs of a session that have not expired, as turn_id@until_ms; kept apart from the session, which may leave Redis and
-- come back while they are there.
local function live_logs(logs_key, session_id, now)
  local logs = {}
  for turn_id, until_ms in string.gmatch(redis.call('HGET', logs_key, session_id) or '', '([^@ ]+)@(%d+)') do
    if tonumber(until_ms) > now then logs[#logs + 1] = {turn_id, until_ms} end
  end
  return logs
end

-- Notes that a turn has a log, whose life begins anew, so that erasing the session finds it.
local function note_log(logs_key, events_key, args)
  local now = now_ms()
  local noted = args.turn_id .. '@' .. string.format('%d', now + args.log_ttl_ms)
  for _, one in ipairs(live_logs(logs_key, args.session_id, now)) do
    if one[1] ~= args.turn_id then noted = one[1] .. '@' .. one[2] .. ' ' .. noted end
  end
  redis.call('HSET', logs_key, args.session_id, noted)
  redis.call('PEXPIRE', events_key, args.log_ttl_ms)
end

-- Appends what args.events says, and wakes those who follow the session.
local function append_log(logs_key, events_key, args)
  redis.call('XADD', events_key, args.fence .. '-' .. args.last,
    'session', args.session_id, 'first', args.first, 'events', args.events)
  if tonumber(args.keep_from) > 1 then
    redis.call('XTRIM', events_key, 'MINID', args.fence .. '-' .. args.keep_from)
  end
  note_log(logs_key, events_key, args)
  redis.call('PUBLISH', args.channel, args.turn_id)
end

-- Ends a log together with its turn: appends what it lacks, if it is one that streams, and wakes those who follow.
local function finish_log(logs_key, events_key, args)
  if args.events == '' then
    redis.call('PUBLISH', args.channel, args.turn_id)
  elseif log_tail(events_key) < tonumber(args.last) then
    append_log(logs_key, events_key, args)
  end
end

-- Ends a log from outside with one more event. A turn that has not stored any, or streams nothing, gets a log of this one.
local function end_log(logs_key, events_key, fence, event, args)
  local last = string.format('%d', log_tail(events_key) + 1)
  redis.call('XADD', events_key, fence .. '-' .. last,
    'session', args.session_id, 'first', last, 'events', '[' .. event .. ']')
  note_log(logs_key, events_key, args)
  redis.call('PUBLISH', args.channel, args.turn_id)
end
