"""The tables of the store, the statements on them, and texts as they can stand in them.

Never does: anything but SQL. Read next: store.py.
"""

from __future__ import annotations

import hashlib

LONG = 400
"""Longest text that stands in an index as it is, in characters; an entry of an index has 2,704 bytes at most."""

TABLES = """
CREATE TABLE @reader (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, label text NOT NULL UNIQUE);
CREATE TABLE @inbox (
    reader integer NOT NULL, tenant text COLLATE "C" NOT NULL, id text COLLATE "C" NOT NULL, at integer NOT NULL,
    PRIMARY KEY (reader, tenant, id)
);
CREATE INDEX inbox_at ON @inbox USING brin (at);
CREATE TABLE @outbox (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, due double precision NOT NULL, channel text NOT NULL,
    event bytea NOT NULL
);
CREATE INDEX outbox_channel ON @outbox (channel, due, seq);
CREATE TABLE @relay (channel text PRIMARY KEY, owner integer NOT NULL);
CREATE TABLE @parked (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, reader integer NOT NULL, lane text COLLATE "C", key text,
    partition integer NOT NULL, position bigint NOT NULL, due double precision NOT NULL, attempt integer NOT NULL,
    reason text NOT NULL, owner integer NOT NULL DEFAULT 0, event bytea NOT NULL, head boolean NOT NULL DEFAULT false
);
CREATE INDEX parked_lane ON @parked (reader, lane, position, seq);
CREATE UNIQUE INDEX parked_head ON @parked (reader, lane) WHERE head;
CREATE INDEX parked_head_due ON @parked (reader, due) WHERE head;
CREATE INDEX parked_due ON @parked (reader, due) WHERE lane IS NULL;
CREATE TABLE @dead_letter (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, reader integer NOT NULL, channel text NOT NULL,
    lane text COLLATE "C", key text, partition integer NOT NULL, position bigint NOT NULL, id text NOT NULL,
    type text NOT NULL, code text NOT NULL, reason text NOT NULL, detail text NOT NULL, attempt integer NOT NULL,
    at double precision NOT NULL, holds boolean NOT NULL, event bytea NOT NULL
);
CREATE INDEX dead_letter_lane ON @dead_letter (reader, lane) WHERE holds;
CREATE TABLE @attempt (
    reader integer NOT NULL, id text COLLATE "C" NOT NULL, count integer NOT NULL, PRIMARY KEY (reader, id)
);
CREATE FUNCTION @release_store(dead integer) RETURNS void LANGUAGE sql AS $$
    UPDATE @parked SET owner = 0 WHERE owner = dead;
    UPDATE @relay SET owner = 0 WHERE owner = dead;
$$;
"""

REMEMBER = """
INSERT INTO @inbox (reader, tenant, id, at)
SELECT u.reader, u.tenant, u.id, $4 FROM unnest($1::integer[], $2::text[], $3::text[]) AS u(reader, tenant, id)
ON CONFLICT DO NOTHING
"""
KNOWN = """
SELECT u.number::integer
FROM unnest($1::integer[], $2::text[], $3::text[]) WITH ORDINALITY AS u(reader, tenant, id, number)
JOIN @inbox i ON i.reader = u.reader AND i.tenant = u.tenant AND i.id = u.id
"""
PARK = """
INSERT INTO @parked (reader, lane, key, partition, position, due, attempt, reason, event)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
BURY = """
INSERT INTO @dead_letter (reader, channel, lane, key, partition, position, id, type, code, reason, detail, attempt, at,
    holds, event) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
"""
# Which parked message of a key may run when it is due: the first, unless a dead letter holds the key.
UNMARK = "UPDATE @parked SET head = false WHERE reader = $1 AND lane = $2 AND head"
MARK = """
UPDATE @parked SET head = true WHERE seq = (SELECT seq FROM @parked WHERE reader = $1 AND lane = $2
    ORDER BY position, seq LIMIT 1)
AND NOT EXISTS (SELECT 1 FROM @dead_letter WHERE reader = $1 AND lane = $2 AND holds)
"""
COUNT_ATTEMPT = """
INSERT INTO @attempt AS a VALUES ($1, $2, 1) ON CONFLICT (reader, id) DO UPDATE SET count = a.count + 1
RETURNING a.count
"""
UNDO_ATTEMPT = (
    "DELETE FROM @attempt WHERE reader = $1 AND id = $2 AND count = 1",
    "UPDATE @attempt SET count = count - 1 WHERE reader = $1 AND id = $2",
)
PARKED_KEYS = """
SELECT key, partition, count(*) FROM @parked WHERE reader = $1 AND lane IS NOT NULL GROUP BY 1, 2
UNION ALL
SELECT key, partition, count(*) FROM @dead_letter WHERE reader = $1 AND holds GROUP BY 1, 2
"""
HEADS = """
SELECT seq, key, partition, position, due, attempt, event FROM @parked WHERE reader = $1 AND head ORDER BY due LIMIT $2
"""
CLAIM_LOOSE = """
UPDATE @parked SET owner = $1 WHERE seq = ANY (ARRAY(SELECT seq FROM @parked WHERE reader = $2 AND lane IS NULL
    AND owner = 0 AND due <= $3 ORDER BY due LIMIT $4 FOR UPDATE SKIP LOCKED))
RETURNING seq, key, partition, position, attempt, event
"""
STAGE = """
INSERT INTO @outbox (due, channel, event) SELECT * FROM unnest($1::double precision[], $2::text[], $3::bytea[])
"""
STAGE_AND_TELL = """
WITH staged AS (
    INSERT INTO @outbox (due, channel, event) SELECT * FROM unnest($1::double precision[], $2::text[], $3::bytea[])
    RETURNING seq
)
SELECT count(*), pg_notify($4::text, '0:staged') FROM staged
"""
TAKE_CHANNELS = """
INSERT INTO @relay AS r (channel, owner)
SELECT name, $1::integer FROM unnest($3::text[]) AS mine(name)
WHERE EXISTS (SELECT 1 FROM @outbox WHERE channel = mine.name AND due <= $2) ORDER BY 1
ON CONFLICT (channel) DO UPDATE SET owner = excluded.owner WHERE r.owner IN (0, excluded.owner)
RETURNING channel
"""
FIRST_DUE = """
SELECT min((SELECT due FROM @outbox WHERE channel = mine.name ORDER BY due, seq LIMIT 1))
FROM unnest($1::text[]) AS mine(name)
"""
DUE = """
SELECT o.seq, o.channel, o.event FROM unnest($2::text[]) AS mine(name)
CROSS JOIN LATERAL (SELECT * FROM @outbox WHERE channel = mine.name AND due <= $1 ORDER BY due, seq LIMIT $3) AS o
ORDER BY o.due, o.seq LIMIT $3
"""
DEAD_LETTERS = """
SELECT d.seq, r.label, d.channel, d.id, d.type, d.key, d.code, d.reason, d.detail, d.attempt, d.at, d.holds,
    (SELECT count(*) FROM @parked p WHERE d.holds AND p.reader = d.reader AND p.lane = d.lane), d.event
FROM @dead_letter d JOIN @reader r ON r.id = d.reader
WHERE $1::text IS NULL OR r.label = $1 OR starts_with(r.label, $1 || '@') ORDER BY d.seq LIMIT $2
"""


def text_of(text: str) -> str:
    """Return `text` as PostgreSQL can keep it: without zero bytes."""
    return text.replace("\0", "␀") if "\0" in text else text


def short(text: str) -> str:
    """Return `text`, or for what is too long for an index its beginning and its hash."""
    if len(text) > LONG:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        text = f"{text[:80]}…{digest}"
    return text_of(text)
