"""The same work on SQLite by hand: as little code as a durable queue can have, and as fast as it gets.

Group commit with `synchronous=FULL`, hand-over of what was just committed, one row per message, deleted with the
next group. No retries, no dead letters, no order per key, no second process, no schema versions, no limits.
Read next: embedded.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

import apsw
import uvloop

from benchmarks.cases import Run
from benchmarks.contestants.orders import OrderCreated, decode, encode, order

SCHEMA = """
CREATE TABLE IF NOT EXISTS message (position INTEGER PRIMARY KEY, lease INTEGER, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS ready ON message (position) WHERE lease IS NULL;
CREATE TABLE IF NOT EXISTS inbox (id TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS charge (id INTEGER PRIMARY KEY, order_id TEXT NOT NULL, cents INTEGER NOT NULL);
"""


def connect(path: Path) -> apsw.Connection:
    """Open a file as Trunkline does: WAL, synchronous=FULL."""
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(10_000)
    connection.execute("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint=4000")
    connection.execute(SCHEMA)
    return connection


class Loop:
    """Group commit and hand-over in one event loop.

    Args:
        inbox: whether each message also leaves a row that says it was handled.
    """

    def __init__(self, path: Path, *, inbox: bool) -> None:
        self._connection = connect(path)
        self._inbox = inbox
        self._position = 0
        self._new: list[tuple[bytes, asyncio.Future[None]]] = []
        self._done: list[tuple[int]] = []
        self._scheduled = False
        self.handled = 0

    async def publish(self, payload: OrderCreated) -> None:
        """Return when the message is on disk."""
        future = asyncio.get_running_loop().create_future()
        self._new.append((encode(payload), future))
        self._schedule()
        await future

    async def handle(self, _order: OrderCreated) -> None:
        """Count."""
        self.handled += 1

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._group)

    def _group(self) -> None:
        self._scheduled = False
        new, self._new = self._new, []
        done, self._done = self._done, []
        first = self._position + 1
        self._position += len(new)
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        if self._inbox:
            rows = [(f"0190aaaa-bbbb-7000-8000-{position:012x}", 1) for (position,) in done]
            connection.executemany("INSERT INTO inbox VALUES (?, ?)", rows)
        connection.executemany("DELETE FROM message WHERE position = ?", done)
        connection.executemany(
            "INSERT INTO message VALUES (?, 1, ?)", [(first + index, body) for index, (body, _) in enumerate(new)]
        )
        connection.execute("COMMIT")
        for index, (body, future) in enumerate(new):
            future.set_result(None)
            try:
                self.handle(decode(body)).send(None)
            except StopIteration:
                self._done.append((first + index,))
        if self._done:
            self._schedule()


def one_process(run: Run, *, inbox: bool) -> dict[str, float]:
    """100 publishers, one handler, one process."""
    return uvloop.run(_one_process(run, inbox=inbox))


async def _one_process(run: Run, *, inbox: bool) -> dict[str, float]:
    loop = Loop(run.folder / "loop.db", inbox=inbox)
    orders = [order(number) for number in range(1000)]

    async def publisher(first: int) -> None:
        for number in range(first, run.messages, 100):
            await loop.publish(orders[number % 1000])

    gc.collect()
    gc.freeze()
    began = time.perf_counter()
    await asyncio.gather(*(publisher(first) for first in range(100)))
    await loop.publish(orders[0])  # its group holds the last acknowledgements
    return {"per_s": run.messages / (time.perf_counter() - began)}


def two_processes(run: Run) -> dict[str, float]:
    """One process inserts in groups of 100, the other claims, decodes and deletes 100 at a time."""
    connect(run.folder / "raw.db").close()
    given = json.dumps({"messages": run.messages, "folder": str(run.folder), "shared": "", "options": {}})
    command = [sys.executable, "-m", "benchmarks.contest"]
    with (
        subprocess.Popen([*command, "handwritten:consume", given], stdout=subprocess.PIPE, text=True) as consumer,
        subprocess.Popen([*command, "handwritten:produce", given], stdout=subprocess.PIPE, text=True) as producer,
    ):
        began = json.loads(producer.communicate()[0])["began"]
        ended = json.loads(consumer.communicate()[0])["ended"]
    return {"per_s": run.messages / (ended - began)}


def produce(run: Run) -> dict[str, float]:
    """Insert."""
    connection = connect(run.folder / "raw.db")
    orders = [order(number) for number in range(1000)]
    began = time.monotonic()
    for first in range(0, run.messages, 100):
        bodies = [(encode(orders[number % 1000]),) for number in range(first, first + 100)]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO message (body) VALUES (?)", bodies)
        connection.execute("COMMIT")
    return {"began": began}


def consume(run: Run) -> dict[str, float]:
    """Claim, decode, delete."""
    connection = connect(run.folder / "raw.db")
    handled = 0
    done: list[tuple[int]] = []
    while handled < run.messages or done:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM message WHERE position = ?", done)
        rows = connection.execute(
            "UPDATE message SET lease = 1 WHERE position IN"
            " (SELECT position FROM message WHERE lease IS NULL ORDER BY position LIMIT 100)"
            " RETURNING position, body"
        ).fetchall()
        connection.execute("COMMIT")
        for _position, body in rows:
            decode(body)
        handled += len(rows)
        done = [(position,) for position, _body in rows]
        if not rows:
            time.sleep(0.0005)
    return {"ended": time.monotonic()}


def one_commit_each(run: Run) -> dict[str, float]:
    """One INSERT, one COMMIT, one sync per message."""
    connection = connect(run.folder / "raw.db")
    body = encode(order(1))
    took = []
    for _ in range(run.messages):
        began = time.perf_counter()
        connection.execute("INSERT INTO message (body) VALUES (?)", (body,))
        took.append(time.perf_counter() - began)
    return latencies(took)


def latencies(took: list[float]) -> dict[str, float]:
    """Return rate and percentiles of single calls."""
    cuts = quantiles(took, n=100)
    return {
        "per_s": len(took) / sum(took),
        "p50_us": cuts[49] * 1e6,
        "p99_us": cuts[98] * 1e6,
        "p99_over_p50": cuts[98] / cuts[49],
    }


def handler_with_insert(run: Run) -> dict[str, float]:
    """Per message: a savepoint, inbox row, own INSERT, one message out, the message in deleted; 64 in a commit."""
    connection = connect(run.folder / "raw.db")
    for chunk in _chunks(run.messages, 1000):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO message VALUES (?, NULL, ?)", [(n + 1, encode(order(n))) for n in chunk])
        connection.execute("COMMIT")
    gc.collect()
    gc.freeze()
    began = time.perf_counter()
    for chunk in _chunks(run.messages, 64):
        connection.execute("BEGIN IMMEDIATE")
        rows = connection.execute(
            "UPDATE message SET lease = 1 WHERE position IN"
            " (SELECT position FROM message WHERE lease IS NULL ORDER BY position LIMIT ?) RETURNING position, body",
            (len(chunk),),
        ).fetchall()
        for position, body in rows:
            placed = decode(body)
            connection.execute("SAVEPOINT one")
            connection.execute("INSERT INTO inbox VALUES (?, 1)", (f"0190aaaa-bbbb-7000-8000-{position:012x}",))
            connection.execute(
                "INSERT INTO charge (order_id, cents) VALUES (?, ?)", (placed.order_id, placed.total_cents)
            )
            connection.execute("INSERT INTO message VALUES (?, 2, ?)", (run.messages + position, encode(placed)))
            connection.execute("DELETE FROM message WHERE position = ?", (position,))
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
    return {"per_s": run.messages / (time.perf_counter() - began)}


def _chunks(messages: int, size: int) -> Iterator[range]:
    for first in range(0, messages, size):
        yield range(first, min(first + size, messages))
