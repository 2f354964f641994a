"""Parked and dead letters of a store in a file, statement by statement.

Read next: store.py.
"""

from __future__ import annotations

from typing import Any

import apsw

from trunkline.engine import count_up, query
from trunkline.errors import DeadLetterError
from trunkline.store import DeadLetterRow


def mark_head(connection: apsw.Connection, reader: int, key: str | None) -> None:
    """Mark which parked message of a key may run when it is due: the first, unless a dead letter holds the key.

    So finding what is due costs the same however many wait behind.
    """
    if key is None:
        return
    connection.execute("UPDATE trunkline_parked SET head = 0 WHERE reader = ? AND key = ? AND head", (reader, key))
    connection.execute(
        "UPDATE trunkline_parked SET head = 1 WHERE seq = (SELECT seq FROM trunkline_parked"
        " WHERE reader = ?1 AND key = ?2 ORDER BY position, seq LIMIT 1) AND NOT EXISTS"
        " (SELECT 1 FROM trunkline_dead_letter WHERE reader = ?1 AND key = ?2 AND holds)",
        (reader, key),
    )


def take_dead_letter(connection: apsw.Connection, number: int) -> tuple[Any, ...]:
    """Remove a dead letter; return (reader, key, partition, position, envelope).

    Raises: DeadLetterError if there is none of that number.
    """
    rows = query(
        connection,
        "DELETE FROM trunkline_dead_letter WHERE seq = ? RETURNING reader, key, partition, position, event",
        (number,),
    )
    if not rows:
        raise no_dead_letter(number)
    count_up(connection, "treated")
    return tuple(rows[0])


def no_dead_letter(number: int) -> DeadLetterError:
    """Return the error for a number that no dead letter has."""
    return DeadLetterError("E601", f"no dead letter {number}", 'list them with "trunkline dead list"')


def read_dead_letters(
    connection: apsw.Connection,
    *,
    subscription: str | None = None,
    message_type: str | None = None,
    number: int | None = None,
    limit: int = -1,
) -> list[DeadLetterRow]:
    """Return dead letters, oldest first.

    Args:
        subscription: label, or name alone; None for all.
        message_type: CloudEvents type; None for all.
        number: that one only.
        limit: most rows; -1 for all.
    """
    rows = query(
        connection,
        "SELECT d.seq, r.label, d.channel, d.id, d.type, d.key, d.code, d.reason, d.detail, d.attempt, d.at,"
        " d.holds, (SELECT count(*) FROM trunkline_parked p WHERE d.holds AND p.reader = d.reader"
        " AND p.key = d.key), d.event FROM trunkline_dead_letter d JOIN trunkline_reader r ON r.id = d.reader"
        " WHERE (?1 IS NULL OR r.label = ?1 OR substr(r.label, 1, length(?1) + 1) = ?1 || '@')"
        " AND (?2 IS NULL OR d.type = ?2) AND (?3 IS NULL OR d.seq = ?3) ORDER BY d.seq LIMIT ?4",
        (subscription, message_type, number, limit),
    )
    return [DeadLetterRow(*(*row[:11], bool(row[11]), *row[12:])) for row in rows]
