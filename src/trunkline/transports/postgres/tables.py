"""The tables of channels, and the statements on them.

Invariant: the rows of one reader stand together in the order in which they are handed out; positions of a partition
have no gaps and become visible in their order, for they are given under the lock of the partition's head, which is
held until the commit. Never does: anything but SQL. Read next: transport.py.
"""

from __future__ import annotations

from trunkline.channel import Queue
from trunkline.transport import Subscription

TABLES = """
CREATE TABLE @channel (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL UNIQUE, kind text NOT NULL,
    partitions integer NOT NULL
);
CREATE TABLE @subscription (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, channel integer NOT NULL REFERENCES @channel,
    name text NOT NULL, UNIQUE (channel, name)
);
CREATE SEQUENCE @message_row;
CREATE TABLE @message (
    place bigint PRIMARY KEY, owner integer NOT NULL, suspect boolean NOT NULL, event bytea NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 20000);
CREATE TABLE @head (
    channel integer NOT NULL REFERENCES @channel, partition integer NOT NULL, next bigint NOT NULL,
    PRIMARY KEY (channel, partition)
) WITH (fillfactor = 20);
CREATE TABLE @log (
    channel integer NOT NULL, partition integer NOT NULL, position bigint NOT NULL, at integer NOT NULL,
    event bytea NOT NULL, PRIMARY KEY (channel, partition, position)
);
CREATE TABLE @cursor (
    subscription integer NOT NULL REFERENCES @subscription, partition integer NOT NULL, position bigint NOT NULL,
    owner integer NOT NULL, suspect boolean NOT NULL, PRIMARY KEY (subscription, partition)
) WITH (fillfactor = 20);
CREATE TABLE @member (
    subscription integer NOT NULL REFERENCES @subscription, process integer NOT NULL,
    PRIMARY KEY (subscription, process)
);
CREATE FUNCTION @release_channels(dead integer) RETURNS void LANGUAGE sql AS $$
    UPDATE @message SET owner = 0, suspect = true WHERE owner = dead;
    UPDATE @cursor SET owner = 0, suspect = true WHERE owner = dead;
    DELETE FROM @member WHERE process = dead;
$$;
"""

NOBODY = 0
"""`owner` of what no process has; processes are numbered from 1."""
HIGHEST = 9
"""The most urgent priority."""
ROWS = 1 << 40


def queue_base(subscription: int, priority: int = 0) -> int:
    """Return the place before the first row of a subscription with a priority: the most urgent come first."""
    return (subscription * 16 + HIGHEST - priority) * ROWS


def queue_range(subscription: int) -> tuple[int, int]:
    """Return the places between which all rows of a subscription stand."""
    return queue_base(subscription, HIGHEST), queue_base(subscription + 1, HIGHEST)


def stored_name(subscription: Subscription) -> str:
    """A Queue has one owner, known or not when the first message comes: its row carries the queue's name."""
    return subscription.channel.name if isinstance(subscription.channel, Queue) else subscription.name


# Each exists twice: inside the transaction of a group, and as a group by itself, in one statement. Then it goes on from
# `fence`, a row while this process was not taken over, and its parameters begin after those of the fence.

_QUEUE = """
INSERT INTO @message (place, owner, suspect, event)
SELECT u.base + nextval('@message_row'), 0, false, u.event FROM unnest({0}::bigint[], {1}::bytea[]) AS u(base, event)
"""
_TOPIC = """
INSERT INTO @message (place, owner, suspect, event)
SELECT (s.id::bigint * 16 + 9) * 1099511627776 + nextval('@message_row'), 0, false, u.event
FROM unnest({0}::integer[], {1}::bytea[]) WITH ORDINALITY AS u(channel, event, number)
JOIN @subscription s ON s.channel = u.channel{2} ORDER BY u.number, s.id
"""
# The heads are locked in their order, so that two groups never wait for each other; what is read under the lock is what
# is written back. {0} to {2}: partitions and how many go there; {3} to {7}: the messages.
_STREAM = """
locked AS MATERIALIZED (
    SELECT h.channel, h.partition, h.next, w.count
    FROM unnest({0}::integer[], {1}::integer[], {2}::integer[]) AS w(channel, partition, count)
    JOIN @head h ON h.channel = w.channel AND h.partition = w.partition ORDER BY 1, 2 FOR UPDATE OF h
), moved AS (
    UPDATE @head h SET next = l.next + l.count FROM locked l
    WHERE h.channel = l.channel AND h.partition = l.partition RETURNING h.channel, h.partition, l.next
)
INSERT INTO @log (channel, partition, position, at, event)
SELECT u.channel, u.partition, m.next + u.number, {7}, u.event
FROM unnest({3}::integer[], {4}::integer[], {5}::integer[], {6}::bytea[]) AS u(channel, partition, number, event)
JOIN moved m ON m.channel = u.channel AND m.partition = u.partition{8}
"""

PUT_QUEUE = _QUEUE.format("$1", "$2")
PUT_TOPIC = _TOPIC.format("$1", "$2", "")
PUT_STREAM = "WITH" + _STREAM.format(*(f"${number}" for number in range(1, 9)), "")
PUT_QUEUE_ALONE = _QUEUE.format("$4", "$5") + "CROSS JOIN fence"
PUT_STREAM_ALONE = "," + _STREAM.format(*(f"${number}" for number in range(4, 12)), " CROSS JOIN fence")

# Claimed by ctid, which the locked rows keep; never in one statement with the removal of others: that deadlocked.
CLAIM = """
WITH alive AS (SELECT 1 FROM @process WHERE id = $1 AND NOT dead FOR KEY SHARE)
UPDATE @message SET owner = $1 WHERE EXISTS (SELECT 1 FROM alive) AND ctid = ANY (ARRAY(
    SELECT ctid FROM @message WHERE place > $2 AND place < $3 AND owner = 0 ORDER BY place LIMIT $4
    FOR UPDATE SKIP LOCKED
)) RETURNING place, suspect, event
"""
"""Nothing for a process that was taken over: what it claimed after that nobody would ever give back."""

REMOVE = "DELETE FROM @message WHERE place = ANY ($1::bigint[])"

GIVE_BACK = "UPDATE @message SET owner = 0 WHERE place = ANY ($1::bigint[]) AND owner = $2"

GIVE_BACK_OTHERS = """
UPDATE @message SET owner = 0 WHERE place > $1 AND place < $2 AND owner = $3 AND place <> ALL ($4::bigint[])
"""

READ_LOG = """
SELECT u.partition, l.position, l.event FROM unnest($2::integer[], $3::bigint[]) AS u(partition, next)
CROSS JOIN LATERAL (
    SELECT position, event FROM @log WHERE channel = $1 AND partition = u.partition AND position >= u.next
    ORDER BY position LIMIT $4
) l
"""

# A search by halves, for there is no index on the times; what retention has removed counts as older.
BEGIN_SINCE = """
WITH RECURSIVE search(partition, low, high) AS (
    SELECT partition, 1::bigint, next FROM @head WHERE channel = $2
    UNION ALL
    SELECT
        s.partition,
        CASE WHEN m.older THEN m.middle + 1 ELSE s.low END,
        CASE WHEN m.older THEN s.high ELSE m.middle END
    FROM search s CROSS JOIN LATERAL (
        SELECT (s.low + s.high) / 2 AS middle, coalesce((
            SELECT at FROM @log WHERE channel = $2 AND partition = s.partition AND position = (s.low + s.high) / 2
        ), 0) < $3::bigint AS older
    ) m WHERE s.low < s.high
)
INSERT INTO @cursor SELECT $1, partition, low, 0, false FROM search WHERE low = high ON CONFLICT DO NOTHING
"""

MOVE_CURSORS = """
UPDATE @cursor c SET position = u.position
FROM unnest($1::integer[], $2::integer[], $3::bigint[]) AS u(subscription, partition, position)
WHERE c.subscription = u.subscription AND c.partition = u.partition AND c.owner = $4
"""

FREE_PARTITIONS = """
SELECT partition, position, suspect FROM @cursor
WHERE subscription = $1 AND owner = 0 AND partition = ANY ($2::integer[])
ORDER BY array_position($2::integer[], partition) LIMIT $3 FOR UPDATE SKIP LOCKED
"""

OWN_PARTITIONS = """
UPDATE @cursor SET owner = $1, suspect = false WHERE subscription = $2 AND partition = ANY ($3::integer[])
"""

FREE_OWN = """
UPDATE @cursor c SET owner = 0, suspect = c.suspect OR u.suspect
FROM unnest($3::integer[], $4::boolean[]) AS u(partition, suspect)
WHERE c.subscription = $1 AND c.owner = $2 AND c.partition = u.partition
"""

QUEUE_BACKLOG = "SELECT count(*), count(*) FILTER (WHERE owner <> 0) FROM @message WHERE place > $1 AND place < $2"

STREAM_BACKLOG = """
SELECT coalesce(sum(h.next - greatest(c.position, coalesce((
    SELECT min(l.position) FROM @log l WHERE l.channel = h.channel AND l.partition = h.partition
), h.next))), 0)::bigint
FROM @cursor c JOIN @subscription s ON s.id = c.subscription
JOIN @head h ON h.channel = s.channel AND h.partition = c.partition WHERE c.subscription = $1
"""

TRIM = """
DELETE FROM @log WHERE ctid = ANY (ARRAY(SELECT o.ctid FROM (
    SELECT ctid, at FROM @log WHERE channel = $1 AND partition = $2 ORDER BY position LIMIT 10000
) o WHERE o.at < $3))
"""
