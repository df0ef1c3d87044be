-- How many records of a session are on the outbox: those that Postgres lacks, without its dead letters (`dead`, as the hash
-- has them), which wait for an operator.
local function waiting_records(session, dead)
  local buried, waiting = {}, 0
  for fact in string.gmatch(dead, '(%S+)@') do buried[fact] = true end
  for fact in string.gmatch(session.unflushed, '(%S+)@') do
    if not buried[fact] then waiting = waiting + 1 end
  end
  return waiting
end
