"""Looking into an embedded file from outside, read only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from trunkline.testing import Entry, Kind
from trunkline.transports.sqlite import count_backlog


@contextlib.contextmanager
def opened(path: Path) -> Iterator[apsw.Connection]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(10_000)
    try:
        yield connection
    finally:
        connection.close()


def rows(path: Path, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with opened(path) as connection:
        return connection.execute(sql, parameters).fetchall()


def number(path: Path, sql: str, *parameters: Any) -> int:
    return int(rows(path, sql, *parameters)[0][0])


def backlog(path: Path) -> int:
    """Messages that wait, are under way, are parked or scheduled."""
    with opened(path) as connection, connection:
        subscriptions = connection.execute(
            "SELECT s.id, c.kind FROM trunkline_subscription s JOIN trunkline_channel c ON c.id = s.channel"
        ).fetchall()
        waiting = sum(count_backlog(connection, row[0], stream=row[1] == "stream").waiting for row in subscriptions)
        (aside,) = connection.execute(
            "SELECT (SELECT count(*) FROM trunkline_parked) + (SELECT count(*) FROM trunkline_outbox)"
        ).fetchall()[0]
        return waiting + aside


def effects(path: Path) -> list[Entry]:
    """The rows of the effects' table, in the order in which they were committed."""
    return [Entry(Kind.EFFECT, *row) for row in rows(path, "SELECT producer, key, seq FROM effect ORDER BY n")]


def is_sound(path: Path) -> bool:
    return rows(path, "PRAGMA integrity_check") == [("ok",)]
