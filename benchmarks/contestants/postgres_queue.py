"""PostgreSQL as a queue without Trunkline: asyncpg by hand, batches of 1,000. Runs in the environment of peers."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Run
from benchmarks.contestants.broker import BODIES, OUTSTANDING, Stopwatch, fresh_name, url_of
from benchmarks.contestants.orders import decode

BATCH = 1000


def raw_consume(run: Run) -> dict[str, float]:
    """Claim 1,000 rows with SKIP LOCKED, decode, delete them; two transactions."""
    import uvloop

    return uvloop.run(_raw_consume(run))


async def _raw_consume(run: Run) -> dict[str, float]:
    connection, table = await _table(run)
    await _insert(connection, table, run.messages, BATCH)
    claim = (
        f'UPDATE "{table}" SET taken = true WHERE position IN (SELECT position FROM "{table}" WHERE NOT taken'
        " ORDER BY position LIMIT $1 FOR UPDATE SKIP LOCKED) RETURNING position, body"
    )
    delete = f'DELETE FROM "{table}" WHERE position = ANY($1)'
    watch = Stopwatch()
    handled = 0
    while handled < run.messages:
        rows = await connection.fetch(claim, BATCH)
        for row in rows:
            decode(row["body"])
        await connection.execute(delete, [row["position"] for row in rows])
        handled += len(rows)
    measured = watch.read(run.messages)
    await connection.close()
    return measured


def raw_publish(run: Run) -> dict[str, float]:
    """Insert 100 rows in one statement."""
    import uvloop

    return uvloop.run(_raw_publish(run))


async def _raw_publish(run: Run) -> dict[str, float]:
    connection, table = await _table(run)
    watch = Stopwatch()
    await _insert(connection, table, run.messages, OUTSTANDING)
    measured = watch.read(run.messages)
    await connection.close()
    return measured


async def _table(run: Run) -> tuple[Any, str]:
    import asyncpg

    connection = await asyncpg.connect(url_of(run))
    table = fresh_name()
    await connection.execute(
        f'CREATE TABLE "{table}"'
        " (position BIGSERIAL PRIMARY KEY, body BYTEA NOT NULL, taken BOOLEAN NOT NULL DEFAULT false)"
    )
    await connection.execute(f'CREATE INDEX ON "{table}" (position) WHERE NOT taken')
    return connection, table


async def _insert(connection: Any, table: str, messages: int, batch: int) -> None:
    sql = f'INSERT INTO "{table}" (body) SELECT unnest($1::bytea[])'
    for first in range(0, messages, batch):
        bodies = [BODIES[number % 1000] for number in range(first, min(first + batch, messages))]
        await connection.execute(sql, bodies)
