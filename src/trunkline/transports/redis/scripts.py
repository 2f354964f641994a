"""What Redis does in one step: small Lua scripts.

Invariant: who changes something of a partition shows that the partition is its own, in the same step.
All keys of a script stand in one hash slot. Times are the server's. They run while memory is full too, or
nobody could receive what fills it; none stores a message.
Source: redis.io/docs, Scripting with Lua; commands XGROUP, XINFO, XPENDING, XCLAIM, XAUTOCLAIM, XTRIM.
"""

from __future__ import annotations

import hashlib

from trunkline.transports.redis.connection import pack

_MAP = """
-- A full server refuses a script whose first write may take memory, and lets one that begins with a deletion run to its
-- end (Scripting with Lua, Execution under low memory conditions; in every version). What this deletes is not there.
local function though_full(delete, key, nothing)
  redis.call(delete, key, nothing)
end
local function map(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
local function group_of(key, name)
  if redis.call('EXISTS', key) == 0 then return end
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local group = map(flat)
    if group['name'] == name then return group end
  end
end
local function parts(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local function before(a, b)
  local ms, seq = parts(a)
  local other_ms, other_seq = parts(b)
  return ms < other_ms or (ms == other_ms and seq < other_seq)
end
local function mine(owners, partition, token)
  local held = redis.call('HGET', owners, partition)
  return held and string.match(held, ' (.*)$') == token
end
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""


class Script:
    """One script.

    Args:
        body: Lua; the functions above are at hand.
    """

    def __init__(self, body: str) -> None:
        self._text = _MAP + body
        self._digest = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()
        ALL.append(self)

    @property
    def load(self) -> bytes:
        """Return the command that makes the server know it."""
        return pack(("SCRIPT", "LOAD", self._text))

    def run(self, keys: tuple[bytes, ...], *arguments: str | int | bytes) -> bytes:
        """Return the command that runs it."""
        return pack(("EVALSHA", self._digest, len(keys), *keys, *arguments))


ALL: list[Script] = []

DECLARE = Script("""
-- KEYS settings; ARGV kind, partitions. Returns kind and partitions as they are.
though_full('HDEL', KEYS[1], '')
redis.call('HSETNX', KEYS[1], 'kind', ARGV[1])
redis.call('HSETNX', KEYS[1], 'partitions', ARGV[2])
return redis.call('HMGET', KEYS[1], 'kind', 'partitions')
""")

GROUP = Script("""
-- KEYS streams; ARGV group, 0 or $ or an id, whether the server counts entries. Creates what is missing.
though_full('XDEL', KEYS[1], '0-0')
for _, key in ipairs(KEYS) do
  if redis.call('EXISTS', key) == 0 then
    redis.call('XGROUP', 'CREATE', key, ARGV[1], '0', 'MKSTREAM')
  elseif not group_of(key, ARGV[1]) then
    local stream = map(redis.call('XINFO', 'STREAM', key))
    local read = stream['entries-added']
    if ARGV[2] == '0' and read then read = read - stream['length'] end
    if ARGV[3] == '1' and read and (ARGV[2] == '0' or ARGV[2] == '$') then
      redis.call('XGROUP', 'CREATE', key, ARGV[1], ARGV[2], 'ENTRIESREAD', read)
    else
      redis.call('XGROUP', 'CREATE', key, ARGV[1], ARGV[2])
    end
  end
end
return 1
""")

# --- Queues and Topics ---

RENEW = Script("""
-- KEYS stream; ARGV group, consumer, ids. Resets the idle time of what is the consumer's; returns what is not.
local kept, lost = {}, {}
for i = 3, #ARGV do
  local found = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #found > 0 then kept[#kept + 1] = ARGV[i] else lost[#lost + 1] = ARGV[i] end
end
if #kept > 0 then
  kept[#kept + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(kept))
end
return lost
""")

RECLAIM = Script("""
-- KEYS stream; ARGV group, consumer, who holds what was given back, idle ms, cursor, count.
-- Returns the next cursor, what was left by the silent, what was given back.
local free = {}
for _, found in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[6], ARGV[3])) do
  free[#free + 1] = found[1]
end
local given = {}
if #free > 0 then given = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(free)) end
local left = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[4], ARGV[5], 'COUNT', ARGV[6])
return {left[1], left[2], given}
""")

GIVE_BACK = Script("""
-- KEYS stream; ARGV group, consumer, who holds what is given back, ids.
local ids = {}
for i = 4, #ARGV do
  local found = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #found > 0 then ids[#ids + 1] = ARGV[i] end
end
if #ids > 0 then
  ids[#ids + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, unpack(ids))
end
return #ids
""")

LEAVE = Script("""
-- KEYS stream; ARGV group, consumer, who holds what is given back. The consumer ends and is forgotten.
though_full('XDEL', KEYS[1], '0-0')
while true do
  local ids = {}
  for _, found in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])) do
    ids[#ids + 1] = found[1]
  end
  if #ids == 0 then break end
  ids[#ids + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, unpack(ids))
end
return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
""")

SWEEP = Script("""
-- KEYS stream; ARGV group, idle ms, who holds what is given back. Forgets consumers that are gone and hold nothing.
though_full('XDEL', KEYS[1], '0-0')
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = map(flat)
  if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[2]) and consumer['name'] ~= ARGV[3] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
  end
end
return 1
""")

TRIM = Script("""
-- KEYS stream. Removes what every group has acknowledged; without a group, everything.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local lowest = false
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = map(flat)
  local id
  if group['pending'] > 0 then
    id = redis.call('XPENDING', KEYS[1], group['name'])[2]
  else
    local ms, seq = string.match(group['last-delivered-id'], '^(%d+)-(%d+)$')
    id = ms .. '-' .. string.format('%.0f', seq + 1)
  end
  if not lowest or before(id, lowest) then lowest = id end
end
if not lowest then return redis.call('XTRIM', KEYS[1], 'MAXLEN', 0) end
return redis.call('XTRIM', KEYS[1], 'MINID', lowest)
""")

# --- partitions of Streams ---

KEEP = Script("""
-- KEYS members, owners; ARGV token, lease ms, partitions. Returns how many live, then which are still the token's.
local now = now_ms()
local until_ms = string.format('%.0f', now + ARGV[2])
-- In this order: what begins with a deletion runs while memory is full.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
redis.call('ZADD', KEYS[1], until_ms, ARGV[1])
local answer = {redis.call('ZCARD', KEYS[1])}
for i = 3, #ARGV do
  -- Also when its time is over: nobody has taken it, so nothing happened to it meanwhile.
  if mine(KEYS[2], ARGV[i], ARGV[1]) then
    redis.call('HSET', KEYS[2], ARGV[i], until_ms .. ' ' .. ARGV[1])
    answer[#answer + 1] = tonumber(ARGV[i])
  end
end
return answer
""")

CLAIM = Script("""
-- KEYS owners, bounds, one stream for each number; ARGV token, lease ms, most, group, numbers.
-- Returns of each one taken: number, cursor, entries read or -1, the bound of what its last reader handed out.
though_full('HDEL', KEYS[1], '')
local now = now_ms()
local until_ms = string.format('%.0f', now + ARGV[2])
local answer = {}
for i = 5, #ARGV do
  if #answer >= tonumber(ARGV[3]) then break end
  local held = redis.call('HGET', KEYS[1], ARGV[i])
  local ends = held and string.match(held, '^(%d+) ')
  if not ends or tonumber(ends) <= now or mine(KEYS[1], ARGV[i], ARGV[1]) then
    local key = KEYS[i - 2]
    local group = group_of(key, ARGV[4])
    if not group then return redis.error_reply('NOGROUP group ' .. ARGV[4] .. ' of ' .. key .. ' was deleted') end
    redis.call('HSET', KEYS[1], ARGV[i], until_ms .. ' ' .. ARGV[1])
    local cursor = group['last-delivered-id']
    local read = group['entries-read']
    local stream = map(redis.call('XINFO', 'STREAM', key))
    if not read and stream['entries-added'] then
      if cursor == '0-0' then read = stream['entries-added'] - stream['length'] end
      if cursor == stream['last-generated-id'] then read = stream['entries-added'] end
    end
    answer[#answer + 1] = {tonumber(ARGV[i]), cursor, read or -1, redis.call('HGET', KEYS[2], ARGV[i]) or ''}
  end
end
return answer
""")

NOTE = Script("""
-- KEYS owners, bounds; ARGV token, then number and id of each. Returns the numbers that are not the token's.
though_full('HDEL', KEYS[1], '')
local lost = {}
for i = 2, #ARGV, 2 do
  if mine(KEYS[1], ARGV[i], ARGV[1]) then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  else
    lost[#lost + 1] = tonumber(ARGV[i])
  end
end
return lost
""")

COMMIT = Script("""
-- KEYS owners, streams; ARGV token, group, then number, id and entries read (or -1) of each stream.
-- A group that was deleted is made again: only the owner knows where it was.
though_full('HDEL', KEYS[1], '')
for i = 2, #KEYS do
  local number, id, read = ARGV[i * 3 - 3], ARGV[i * 3 - 2], ARGV[i * 3 - 1]
  if mine(KEYS[1], number, ARGV[1]) then
    local group = group_of(KEYS[i], ARGV[2])
    if not group and redis.call('EXISTS', KEYS[i]) == 1 then
      redis.call('XGROUP', 'CREATE', KEYS[i], ARGV[2], id)
      if read ~= '-1' then redis.call('XGROUP', 'SETID', KEYS[i], ARGV[2], id, 'ENTRIESREAD', read) end
    elseif group and before(group['last-delivered-id'], id) then
      if read == '-1' then
        redis.call('XGROUP', 'SETID', KEYS[i], ARGV[2], id)
      else
        redis.call('XGROUP', 'SETID', KEYS[i], ARGV[2], id, 'ENTRIESREAD', read)
      end
    end
  end
end
return 1
""")

RELEASE = Script("""
-- KEYS owners, bounds; ARGV token, numbers.
for i = 2, #ARGV do
  if mine(KEYS[1], ARGV[i], ARGV[1]) then
    redis.call('HDEL', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[2], ARGV[i])
  end
end
return 1
""")
