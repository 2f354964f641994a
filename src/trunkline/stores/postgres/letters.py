"""Parked and dead letters in PostgreSQL, statement by statement.

Invariant: of each key at most one parked message is marked to run: the first, and none behind a dead letter that holds.
Read next: store.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import asyncpg

from trunkline.errors import DeadLetterError
from trunkline.message import pack
from trunkline.outcome import DeadLetter, RetryLater
from trunkline.stores.postgres.tables import BURY, MARK, PARK, UNMARK, short, text_of
from trunkline.transport import Delivery


class Letters:
    """Statements on connections with a transaction open.

    Args:
        sql: gives a statement with its schema.
    """

    def __init__(self, sql: Callable[[str], str]) -> None:
        self._sql = sql

    async def park(
        self, connection: asyncpg.Connection, reader: int, delivery: Delivery, due: float, outcome: RetryLater
    ) -> None:
        """Let a delivery wait until `due`."""
        await connection.execute(
            self._sql(PARK), reader, lane_of(delivery), _key(delivery), delivery.partition, delivery.position, due,
            delivery.attempt, text_of(outcome.reason), _event(delivery),
        )  # fmt: skip

    async def park_again(self, connection: asyncpg.Connection, row: Any, event: bytes) -> None:
        """Let what was a dead letter run."""
        await connection.execute(
            self._sql(PARK), row["reader"], row["lane"], row["key"], row["partition"], row["position"], 0.0, 0,
            "redriven", event,
        )  # fmt: skip
        await self.mark_head(connection, row["reader"], row["lane"])

    async def bury(
        self, connection: asyncpg.Connection, reader: int, delivery: Delivery, at: float, outcome: DeadLetter
    ) -> None:
        """Set a delivery aside."""
        message = delivery.message
        lane = lane_of(delivery)
        await connection.execute(
            self._sql(BURY), reader, delivery.subscription.channel.name, lane, _key(delivery), delivery.partition,
            delivery.position, "" if message is None else text_of(message.id),
            "" if message is None else text_of(message.type), outcome.code, text_of(outcome.reason),
            text_of(outcome.detail), delivery.attempt, at, outcome.holds and lane is not None, _event(delivery),
        )  # fmt: skip

    async def take(self, connection: asyncpg.Connection, number: int) -> Any:
        """Remove a dead letter; return its row.

        Raises: DeadLetterError if there is none of that number.
        """
        row = await connection.fetchrow(
            self._sql(
                "DELETE FROM @dead_letter WHERE seq = $1 RETURNING reader, lane, key, partition, position, event"
            ),
            number,
        )
        if row is None:
            raise no_dead_letter(number)
        return row

    async def mark_head(self, connection: asyncpg.Connection, reader: int, lane: str | None) -> None:
        """Mark which parked message of a key may run when it is due."""
        if lane is not None:
            await connection.execute(self._sql(UNMARK), reader, lane)
            await connection.execute(self._sql(MARK), reader, lane)


def no_dead_letter(number: int) -> DeadLetterError:
    """Return the error for a number that no dead letter has."""
    return DeadLetterError("E601", f"no dead letter {number}", 'list them with "trunkline dead list"')


def lane_of(delivery: Delivery) -> str | None:
    """Return the key as it stands in an index; only Streams promise order per key, so only there successors wait."""
    return short(delivery.key) if delivery.partition >= 0 and delivery.key is not None else None


def _key(delivery: Delivery) -> str | None:
    return None if delivery.key is None else text_of(delivery.key)


def _event(delivery: Delivery) -> bytes:
    if delivery.raw is not None:
        return delivery.raw
    assert delivery.message is not None  # noqa: S101 - one of the two is always there
    return pack(delivery.message)
