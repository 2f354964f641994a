"""The tables of channels in the file, and the order of their rows.

Invariant: rows of one reader stand together, in the order in which they are handed out, so one B-tree serves for
keeping and for finding them. Never does: anything but SQL. Read next: transport.py.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Collection
from pathlib import Path

import apsw

from trunkline.codec import encode_json
from trunkline.engine import count_up, query
from trunkline.errors import TrunklineError
from trunkline.transport import Backlog

SCHEMA = """
CREATE TABLE IF NOT EXISTS trunkline_channel (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, partitions INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS trunkline_subscription (
    id INTEGER PRIMARY KEY, channel INTEGER NOT NULL, name TEXT NOT NULL, UNIQUE (channel, name)
);
CREATE TABLE IF NOT EXISTS trunkline_log (
    place INTEGER PRIMARY KEY, partition INTEGER NOT NULL, at INTEGER NOT NULL, event BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS trunkline_queue (
    place INTEGER PRIMARY KEY, holder INTEGER NOT NULL, suspect INTEGER NOT NULL, event BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS trunkline_hold (
    owner INTEGER NOT NULL, subscription INTEGER NOT NULL, high INTEGER NOT NULL, PRIMARY KEY (owner, subscription)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trunkline_partition (
    subscription INTEGER NOT NULL, partition INTEGER NOT NULL, position INTEGER NOT NULL, owner INTEGER,
    suspect INTEGER NOT NULL, PRIMARY KEY (subscription, partition)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trunkline_member (
    subscription INTEGER NOT NULL, owner INTEGER NOT NULL, PRIMARY KEY (subscription, owner)
) WITHOUT ROWID;
"""

FREE = 1 << 24
"""`holder` of a queue row that nobody has; else FREE plus the number of the process.

Numbers of this size all take four bytes, so a claim overwrites the row where it stands and no page is split.
"""
HIGHEST = 9
"""The most urgent priority."""
POSITIONS = 1 << 40


# --- Streams ---


def log_place(channel: int, position: int) -> int:
    """Return where the log keeps a position of a Stream."""
    return channel * POSITIONS + position


def last_position(connection: apsw.Connection, channel: int) -> int:
    """Return the position of the newest message of a Stream; 0 if there was none yet."""
    base = log_place(channel, 0)
    sql = "SELECT max(place) FROM trunkline_log WHERE place > ? AND place < ?"
    (newest,) = query(connection, sql, (base, base + POSITIONS))[0]
    return 0 if newest is None else int(newest - base)


def position_before(connection: apsw.Connection, channel: int, last: int, moment_s: int) -> int:
    """Return the position after which a Stream goes on with the first message stored at a moment or later.

    Args:
        last: the position of its newest message.
    """

    def stored(position: int) -> int:
        sql = "SELECT at FROM trunkline_log WHERE place >= ? ORDER BY place LIMIT 1"  # those before it may be trimmed
        (at,) = query(connection, sql, (log_place(channel, position),))[0]
        return int(at)

    return bisect_left(range(1, last + 1), moment_s, key=stored)


def read_log(connection: apsw.Connection, channel: int, after: int, limit: int) -> list[tuple[int, int, bytes]]:
    """Return (position, partition, event) of the messages of a Stream after a position, in order."""
    base = log_place(channel, 0)
    return query(
        connection,
        "SELECT place - ?1, partition, event FROM trunkline_log WHERE place > ?1 + ?2 AND place < ?3"
        " ORDER BY place LIMIT ?4",
        (base, after, base + POSITIONS, limit),
    )


def trim_log(connection: apsw.Connection, channel: int, before: int) -> None:
    """Remove messages of a Stream that were stored before a time; the newest stays, for positions go on from it."""
    connection.execute(
        "DELETE FROM trunkline_log WHERE place IN (SELECT place FROM trunkline_log WHERE place > ? AND place < ?"
        " AND at < ? ORDER BY place LIMIT 10000)",
        (log_place(channel, 0), log_place(channel, last_position(connection, channel)), before),
    )


# --- Queues and Topics ---


def queue_place(subscription: int, priority: int, row: int) -> int:
    """Return where the row of a message stands: by subscription, then the most urgent first, then in commit order."""
    return (subscription * 16 + HIGHEST - priority) * POSITIONS + row


def queue_range(subscription: int) -> tuple[int, int]:
    """Return the places between which all rows of a subscription stand."""
    return queue_place(subscription, HIGHEST, 0), queue_place(subscription + 1, HIGHEST, 0)


def read_queue(connection: apsw.Connection, subscription: int, after: int, limit: int) -> list[tuple[int, bytes]]:
    """Return (row, event) of what waits for a subscription after a row, in commit order."""
    found: list[tuple[int, bytes]] = []
    for priority in range(HIGHEST + 1):
        base = queue_place(subscription, priority, 0)
        sql = "SELECT place - ?1, event FROM trunkline_queue WHERE place > ?2 AND place < ?3 ORDER BY place LIMIT ?4"
        found += query(connection, sql, (base, base + after, base + POSITIONS, limit))
    return sorted(found)[:limit]


def has_free(connection: apsw.Connection, subscription: int, after: int) -> bool:
    """Return whether a row after the place `after` is nobody's."""
    end = queue_range(subscription)[1]
    sql = "SELECT 1 FROM trunkline_queue WHERE place > ? AND place < ? AND holder = ? LIMIT 1"
    return bool(query(connection, sql, (after, end, FREE)))


def claim(
    connection: apsw.Connection, subscription: int, after: int, process: int, limit: int
) -> list[tuple[int, int, bytes]]:
    """Take the first free rows after a place; return (place, suspect, event) in order."""
    end = queue_range(subscription)[1]
    rows = query(
        connection,
        "UPDATE trunkline_queue SET holder = ?1 WHERE place IN (SELECT place FROM trunkline_queue"
        " WHERE place > ?2 AND place < ?3 AND holder = ?4 ORDER BY place LIMIT ?5) RETURNING place, suspect, event",
        (FREE + process, after, end, FREE, limit),
    )
    return sorted(rows)


def hold(connection: apsw.Connection, process: int, subscription: int, high: int) -> None:
    """Note that a process may own rows of a subscription up to the place `high`, for `give_back`."""
    connection.execute(
        "INSERT INTO trunkline_hold VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET high = max(high, excluded.high)",
        (process, subscription, high),
    )


def give_back(connection: apsw.Connection, process: int, subscriptions: Collection[int] | None = None) -> None:
    """Free what a process owns.

    Args:
        subscriptions: of these only, by an App that stops; None frees everything of a process that is dead and may
            have died of one of them.
    """
    suspect = subscriptions is None
    owned = "owner = ?1 AND (?2 OR subscription IN (SELECT value FROM json_each(?3)))"
    which = (process, suspect, encode_json(sorted(subscriptions or ())).decode())
    for subscription, high in query(
        connection,
        f"SELECT subscription, high FROM trunkline_hold WHERE {owned}",  # noqa: S608
        which,
    ):
        connection.execute(
            "UPDATE trunkline_queue SET holder = ?, suspect = max(suspect, ?)"
            " WHERE place > ? AND place <= ? AND holder = ?",
            (FREE, suspect, queue_range(subscription)[0], high, FREE + process),
        )
        if connection.changes():
            count_up(connection, "returned")
    connection.execute(f"DELETE FROM trunkline_hold WHERE {owned}", which)  # noqa: S608
    connection.execute(
        f"UPDATE trunkline_partition SET owner = NULL, suspect = max(suspect, ?2) WHERE {owned}",  # noqa: S608
        which,
    )
    connection.execute(f"DELETE FROM trunkline_member WHERE {owned}", which)  # noqa: S608


def count_backlog(connection: apsw.Connection, number: int, *, stream: bool) -> Backlog:
    """Count what waits for the subscription of that number."""
    if stream:
        waiting = query(
            connection,
            "SELECT count(*) FROM (SELECT channel * ?2 AS base FROM trunkline_subscription WHERE id = ?1) s"
            " CROSS JOIN trunkline_log l CROSS JOIN trunkline_partition p WHERE l.place < s.base + ?2"
            " AND l.place > s.base + (SELECT min(position) FROM trunkline_partition WHERE subscription = ?1)"
            " AND p.subscription = ?1 AND p.partition = l.partition AND l.place > s.base + p.position",
            (number, POSITIONS),
        )[0][0]
        return Backlog(waiting)
    waiting, free = query(
        connection,
        "SELECT count(*), count(*) FILTER (WHERE holder = ?) FROM trunkline_queue WHERE place > ? AND place < ?",
        (FREE, *queue_range(number)),
    )[0]
    return Backlog(waiting, waiting - free)


def left_over(path: str) -> dict[str, int]:
    """Return subscription → what waits for it in a file that may not exist, without taking part in anything."""
    if not Path(path).is_file():
        return {}
    try:
        with contextlib.closing(apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)) as connection:
            connection.set_busy_timeout(1000)
            if not query(connection, "SELECT 1 FROM sqlite_schema WHERE name = 'trunkline_subscription'"):
                return {}
            rows = query(
                connection,
                "SELECT s.id, CASE c.kind WHEN 'queue' THEN c.name ELSE s.name || '@' || c.name END, c.kind = 'stream'"
                " FROM trunkline_subscription s JOIN trunkline_channel c ON c.id = s.channel ORDER BY c.name, s.name",
            )
            counts = {label: count_backlog(connection, number, stream=stream).waiting for number, label, stream in rows}
    except (apsw.Error, TrunklineError):
        return {}  # whoever needs the file says what is wrong with it
    return {label: waiting for label, waiting in counts.items() if waiting}


def oldest(connection: apsw.Connection, number: int) -> float | None:
    """Return when the oldest message was stored that waits for that subscription of a Stream; None if none waits."""
    rows = query(
        connection,
        "SELECT l.at FROM (SELECT channel * ?2 AS base FROM trunkline_subscription WHERE id = ?1) s"
        " CROSS JOIN trunkline_log l CROSS JOIN trunkline_partition p WHERE l.place < s.base + ?2"
        " AND l.place > s.base + (SELECT min(position) FROM trunkline_partition WHERE subscription = ?1)"
        " AND p.subscription = ?1 AND p.partition = l.partition AND l.place > s.base + p.position"
        " ORDER BY l.place LIMIT 1",
        (number, POSITIONS),
    )
    return float(rows[0][0]) if rows else None
