"""The store in one SQLite file: inbox, outbox, parked and dead letters, the user's own tables.

Invariant: inbox rows are the first write of a unit; a conflict undoes the unit and leaves only its settlement.
Never does: channels (transports/sqlite). Read next: letters.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any, cast

import apsw

from trunkline.claims import Claims
from trunkline.clock import Clock
from trunkline.codec import encode_json
from trunkline.dbapi import ApswTransaction
from trunkline.engine import Engine, Stage, count_up, query
from trunkline.engines import close_engine, open_engine
from trunkline.errors import ConfigurationError
from trunkline.message import pack, unpack
from trunkline.outcome import ACK, DeadLetter, RetryLater
from trunkline.store import INBOX_WINDOW_S, DeadLetterRow, DuplicateSignal, OutboxRow, Transaction, Unit
from trunkline.stores.sqlite.letters import mark_head, no_dead_letter, read_dead_letters, take_dead_letter
from trunkline.transport import LIVE, Address, Delivery, Subscription, Transport

TIDY_ROWS = 20_000
"""How many inbox rows one round of tidying looks at."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trunkline_reader (id INTEGER PRIMARY KEY, label TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS trunkline_inbox (
    reader INTEGER NOT NULL, tenant TEXT NOT NULL, id TEXT NOT NULL, at INTEGER NOT NULL,
    PRIMARY KEY (reader, tenant, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trunkline_outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, due REAL NOT NULL, channel TEXT NOT NULL, owner INTEGER,
    event BLOB NOT NULL
);
DROP INDEX IF EXISTS trunkline_outbox_due;
CREATE INDEX IF NOT EXISTS trunkline_outbox_channel ON trunkline_outbox (channel, due, seq);
CREATE INDEX IF NOT EXISTS trunkline_outbox_owner ON trunkline_outbox (owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS trunkline_parked (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, reader INTEGER NOT NULL, key TEXT, partition INTEGER NOT NULL,
    position INTEGER NOT NULL, due REAL NOT NULL, attempt INTEGER NOT NULL, reason TEXT NOT NULL,
    owner INTEGER, event BLOB NOT NULL, head INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS trunkline_parked_key ON trunkline_parked (reader, key, position, seq);
CREATE UNIQUE INDEX IF NOT EXISTS trunkline_parked_head ON trunkline_parked (reader, key) WHERE head;
CREATE INDEX IF NOT EXISTS trunkline_parked_head_due ON trunkline_parked (reader, due) WHERE head;
CREATE INDEX IF NOT EXISTS trunkline_parked_due ON trunkline_parked (reader, due) WHERE key IS NULL;
CREATE TABLE IF NOT EXISTS trunkline_dead_letter (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, reader INTEGER NOT NULL, channel TEXT NOT NULL, key TEXT,
    partition INTEGER NOT NULL, position INTEGER NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL,
    code TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, attempt INTEGER NOT NULL, at REAL NOT NULL,
    holds INTEGER NOT NULL, event BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS trunkline_dead_letter_key ON trunkline_dead_letter (reader, key) WHERE holds;
CREATE TABLE IF NOT EXISTS trunkline_attempt (
    reader INTEGER NOT NULL, id TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (reader, id)
) WITHOUT ROWID;
"""


class SqliteStore:
    """Store of one service or system in the file that `address` names."""

    remembers = True
    keeps = True

    schema = _SCHEMA
    owned: tuple[str, ...] = ("trunkline_parked", "trunkline_outbox")

    def __init__(self, address: Address, clock: Clock) -> None:
        if not address.path:
            raise ConfigurationError("E206", "sqlite: without a file", "such as sqlite:///shop.db")
        self._path = address.path.removeprefix("/")
        self._options = address.options
        self._clock = clock
        self._readers: dict[str, int] = {}
        self._known: dict[int, set[str]] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._staged_callbacks: list[Callable[[], None]] = []
        self._same = False
        self._seen = (-1, -1)
        self._staged_seen = -1
        self._tidied: tuple[int, str, str] = (0, "", "")
        self.engine: Engine

    async def start(self, transport: Transport, subscriptions: Sequence[Subscription]) -> bool:
        """Open the file; see Store."""
        self.engine = await open_engine(self._path, self._clock, self._options)
        self._same = getattr(transport, "engine", None) is self.engine
        self._parked = Claims(self.engine, "trunkline_parked")
        self._outbox = Claims(self.engine, "trunkline_outbox")
        await self.engine.add_stage(self)
        # The store first: inbox rows come before anything else is written.
        self._party = self.engine.party(self, cast("Stage", transport)) if self._same else self.engine.party(self)
        labels = [(subscription.label,) for subscription in subscriptions]

        def declare(connection: apsw.Connection) -> None:
            connection.executemany("INSERT INTO trunkline_reader (label) VALUES (?) ON CONFLICT DO NOTHING", labels)
            count_up(connection, "declared")

        await self.engine.run(declare)
        self.foreign_change()
        return self._same

    async def stop(self) -> None:
        """Give back what was taken and close; see Store."""
        if self.engine.failure is None:
            await self.engine.run(self._give_back)
        self.engine.remove_stage(self)
        await close_engine(self.engine)

    def _give_back(self, connection: apsw.Connection) -> None:
        for claims in (self._parked, self._outbox):
            claims.give_back(connection)
        count_up(connection, "treated")
        count_up(connection, "staged")

    async def run_schema(self, statements: Sequence[str]) -> None:
        """Run table definitions in one transaction; see Store."""

        def run(connection: apsw.Connection) -> None:
            for statement in statements:
                connection.execute(statement)

        await self.engine.run(run)

    def _reader(self, subscription: Subscription) -> int:
        return self._readers[subscription.label]

    # --- the unit of work ---

    async def known(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> set[tuple[str, str]]:
        """Return which were handled before; see Store."""
        reader = self._reader(subscription)
        by_tenant: dict[str, list[str]] = {}
        for delivery in deliveries:
            message = delivery.message
            if message is not None:
                by_tenant.setdefault(message.tenantid or "", []).append(message.identity)
        found: set[tuple[str, str]] = set()
        for tenant, identities in by_tenant.items():
            for (identity,) in query(
                self.engine.reader,
                "SELECT i.id FROM json_each(?) j CROSS JOIN trunkline_inbox i ON i.id = j.value"
                " WHERE i.reader = ? AND i.tenant = ?",
                (encode_json(identities).decode(), reader, tenant),
            ):
                found.add((tenant, identity))
        return found

    def submit(self, unit: Unit) -> None:
        """Commit with the next group; see Store."""
        if unit.transaction is None:
            self.engine.submit(self._party, unit)
            return
        unit.transaction.end()
        try:
            self.engine.release(self._party, unit)
        except Exception as error:  # noqa: BLE001 - told to the one who waits for the unit
            unit.transaction = None
            unit.done(unit, error)

    async def transaction(self, unit: Unit) -> Transaction:
        """Open the handler's transaction; see Store."""
        connection = await self.engine.acquire(unit.owner)
        try:
            self._remember(connection, (unit,))
        except BaseException:
            self.engine.release(self._party, None)
            raise
        unit.transaction = ApswTransaction(connection, self.engine.statement_failed)
        return unit.transaction

    async def rollback(self, unit: Unit) -> None:
        """Undo the handler's transaction; see Store."""
        if unit.transaction is not None:
            unit.transaction.end()
            unit.transaction = None
            self.engine.release(self._party, None)

    # --- stage of the engine's group ---

    def apply(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        """Write inbox rows, parked and dead letters and scheduled messages of `units`."""
        fresh = [unit for unit in units if unit.transaction is None and not unit.duplicate]
        if fresh:
            self._remember(connection, fresh)
        finished: list[tuple[int]] = []
        touched: set[tuple[int, str]] = set()
        for unit in units:
            if unit.outcome is not ACK:
                self._set_aside(connection, unit, touched)
            for delivery in unit.deliveries:
                if delivery.row != LIVE:
                    finished.append((delivery.row,))
                    self._touch(delivery, touched)
                if delivery.suspect:
                    self._forget_attempt(connection, delivery)
        outbox = [
            (staged.due or 0.0, staged.channel.name, pack(staged.message))
            for unit in units
            for staged in unit.staged
            if staged.due is not None or not self._same
        ]
        if outbox:
            connection.executemany("INSERT INTO trunkline_outbox (due, channel, event) VALUES (?, ?, ?)", outbox)
            count_up(connection, "staged")
        if finished:
            connection.executemany("DELETE FROM trunkline_parked WHERE seq = ?", finished)
        for reader, key in touched:
            mark_head(connection, reader, key)

    def _touch(self, delivery: Delivery, touched: set[tuple[int, str]]) -> None:
        key = _parking_key(delivery)
        if key is not None:
            touched.add((self._reader(delivery.subscription), key))

    def committed(self, units: Sequence[Unit]) -> None:
        """Wake the relay when something scheduled was committed."""
        if self._parked.rows:
            self._parked.finished(delivery.row for unit in units for delivery in unit.deliveries)
        for unit in units:
            if unit.staged and (not self._same or any(staged.due is not None for staged in unit.staged)):
                self._notify_staged()
                return

    def aborted(self) -> None:
        """Nothing to forget."""

    def foreign_change(self) -> None:
        """Another process committed: readers may have been added, dead letters redriven."""
        seen = self.engine.counter("declared"), self.engine.counter("treated")
        if seen != self._seen:
            self._seen = seen
            self._readers = dict(query(self.engine.reader, "SELECT label, id FROM trunkline_reader"))
            self._notify()
        staged = self.engine.counter("staged")
        if staged != self._staged_seen:
            self._staged_seen = staged
            self._notify_staged()

    def release(self, connection: apsw.Connection, process: int) -> None:
        """Give back the parked and staged messages that a process had taken."""
        count_up(connection, "treated")
        count_up(connection, "staged")
        for table in self.owned:
            connection.execute(f"UPDATE {table} SET owner = NULL WHERE owner = ?", (process,))  # noqa: S608

    def on_staged(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._staged_callbacks.append(callback)

    def _notify_staged(self) -> None:
        for callback in self._staged_callbacks:
            callback()

    def on_change(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._callbacks.append(callback)

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()

    def _remember(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        now = int(self._clock.now())
        readers = self._readers
        rows = []
        for unit in units:
            if unit.outcome is ACK:
                for delivery in unit.deliveries:
                    message = delivery.message
                    if message is not None:
                        reader = readers[delivery.subscription.label]
                        rows.append((reader, message.tenantid or "", message.identity, now))
        if not rows:
            return
        before = connection.total_changes()
        connection.executemany("INSERT OR IGNORE INTO trunkline_inbox VALUES (?, ?, ?, ?)", rows)
        if connection.total_changes() - before != len(rows):
            raise DuplicateSignal

    def _set_aside(self, connection: apsw.Connection, unit: Unit, touched: set[tuple[int, str]]) -> None:
        outcome = unit.outcome
        for delivery in unit.deliveries:
            self._touch(delivery, touched)
            if isinstance(outcome, RetryLater):
                self._park(connection, delivery, self._clock.now() + outcome.after_s, outcome.reason)
            elif isinstance(outcome, DeadLetter):
                self._bury(connection, delivery, outcome)

    def _park(self, connection: apsw.Connection, delivery: Delivery, due: float, reason: str) -> None:
        connection.execute(
            "INSERT INTO trunkline_parked (reader, key, partition, position, due, attempt, reason, event)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._reader(delivery.subscription), _parking_key(delivery), delivery.partition, delivery.position,
                due, delivery.attempt, reason, _event(delivery),
            ),
        )  # fmt: skip

    def _bury(self, connection: apsw.Connection, delivery: Delivery, outcome: DeadLetter) -> None:
        message = delivery.message
        key = _parking_key(delivery)
        connection.execute(
            "INSERT INTO trunkline_dead_letter (reader, channel, key, partition, position, id, type, code, reason,"
            " detail, attempt, at, holds, event) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._reader(delivery.subscription), delivery.subscription.channel.name, key, delivery.partition,
                delivery.position, "" if message is None else message.id, "" if message is None else message.type,
                outcome.code, outcome.reason, outcome.detail, delivery.attempt, self._clock.now(),
                int(outcome.holds and key is not None), _event(delivery),
            ),
        )  # fmt: skip

    def _forget_attempt(self, connection: apsw.Connection, delivery: Delivery) -> None:
        connection.execute(
            "DELETE FROM trunkline_attempt WHERE reader = ? AND id = ?",
            (self._reader(delivery.subscription), _attempt_id(delivery)),
        )

    # --- suspects ---

    async def attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Return the tries that never came to an end; see Store."""
        sql = "SELECT count FROM trunkline_attempt WHERE reader = ? AND id = ?"
        counts = []
        for delivery in deliveries:
            rows = query(self.engine.reader, sql, (self._reader(delivery.subscription), _attempt_id(delivery)))
            counts.append(int(rows[0][0]) if rows else 0)
        return counts

    async def begin_attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Count one more try for each suspect; see Store."""
        rows = [(self._reader(d.subscription), _attempt_id(d)) for d in deliveries]

        def count(connection: apsw.Connection) -> list[int]:
            return [
                query(
                    connection,
                    "INSERT INTO trunkline_attempt VALUES (?, ?, 1)"
                    " ON CONFLICT DO UPDATE SET count = count + 1 RETURNING count",
                    row,
                )[0][0]
                for row in rows
            ]

        return await self.engine.run(count)

    async def undo_attempts(self, deliveries: Sequence[Delivery]) -> None:
        """Take back one try of each; see Store."""
        rows = [(self._reader(d.subscription), _attempt_id(d)) for d in deliveries]

        def undo(connection: apsw.Connection) -> None:
            connection.executemany("DELETE FROM trunkline_attempt WHERE reader = ? AND id = ? AND count = 1", rows)
            connection.executemany("UPDATE trunkline_attempt SET count = count - 1 WHERE reader = ? AND id = ?", rows)

        await self.engine.run(undo)

    # --- parked messages ---

    async def load_parked(
        self, subscription: Subscription, owns: Callable[[int], bool], into: Callable[[dict[str, int]], None]
    ) -> None:
        """Tell which keys are parked or held; see Store."""
        reader = self._reader(subscription)
        queries = (
            "SELECT key, partition, count(*) FROM trunkline_parked WHERE reader = ? AND key NOTNULL GROUP BY 1, 2",
            "SELECT key, partition, count(*) FROM trunkline_dead_letter WHERE reader = ? AND holds GROUP BY 1, 2",
        )

        def load(connection: apsw.Connection) -> None:
            keys: dict[str, int] = {}
            for sql in queries:
                for key, partition, count in query(connection, sql, (reader,)):
                    if owns(partition):
                        keys[key] = keys.get(key, 0) + count
            into(keys)

        await self.engine.run(load)

    async def parked_due(
        self, subscription: Subscription, owns: Callable[[int], bool], now: float, limit: int, running: set[str]
    ) -> tuple[list[Delivery], float | None]:
        """Return the heads that may run now; see Store."""
        reader = self._reader(subscription)
        found: list[Delivery] = []
        next_due: float | None = None
        heads = self.engine.reader.execute(
            "SELECT seq, key, partition, position, due, attempt, event FROM trunkline_parked"
            " WHERE reader = ? AND head ORDER BY due",
            (reader,),
        )
        for seq, key, partition, position, due, attempt, event in heads:
            if len(found) == limit or due > now:
                next_due = due
                break
            if key not in running and owns(partition):
                found.append(Delivery(subscription, None, event, key, position, partition, attempt, seq))
        heads.close()
        loose, loose_due = await self._claim_loose(subscription, reader, now, limit - len(found))
        dues = [due for due in (next_due, loose_due) if due is not None]
        return found + loose, min(dues) if dues else None

    async def _claim_loose(
        self, subscription: Subscription, reader: int, now: float, limit: int
    ) -> tuple[list[Delivery], float | None]:
        """Take parked messages without a key: any process may have them."""
        first = query(
            self.engine.reader,
            "SELECT min(due) FROM trunkline_parked WHERE reader = ? AND key IS NULL AND owner IS NULL",
            (reader,),
        )[0][0]
        if first is None or first > now or limit <= 0:
            return [], first
        process = self.engine.process

        def claim(connection: apsw.Connection) -> list[tuple[Any, ...]]:
            return query(
                connection,
                "UPDATE trunkline_parked SET owner = ? WHERE seq IN (SELECT seq FROM trunkline_parked"
                " WHERE reader = ? AND key IS NULL AND owner IS NULL AND due <= ? ORDER BY due LIMIT ?)"
                " RETURNING seq, partition, position, attempt, event",
                (process, reader, now, limit),
            )

        return [
            Delivery(subscription, None, event, None, position, partition, attempt, seq)
            for seq, partition, position, attempt, event in await self._parked.take(claim)
        ], now

    # --- outbox ---

    async def outbox_due(
        self, channels: Collection[str], now: float, limit: int
    ) -> tuple[list[OutboxRow], float | None]:
        """Take what is to be sent now; see Store."""
        names = encode_json(sorted(channels)).decode()
        first = query(
            self.engine.reader,
            "SELECT min((SELECT min(due) FROM trunkline_outbox WHERE channel = value)) FROM json_each(?)",
            (names,),
        )[0][0]
        if first is None or first > now:
            return [], first
        process = self.engine.process

        def take(connection: apsw.Connection) -> list[tuple[Any, ...]]:
            return query(
                connection,
                # The first of each channel, then of all: what others have waiting is not looked at.
                "UPDATE trunkline_outbox SET owner = ?1 WHERE seq IN (SELECT seq FROM json_each(?4) mine"
                " JOIN trunkline_outbox ON seq IN (SELECT seq FROM trunkline_outbox"
                " WHERE channel = mine.value AND due <= ?2 ORDER BY due, seq LIMIT ?3)"
                " WHERE mine.value NOT IN (SELECT channel FROM trunkline_outbox WHERE owner IS NOT NULL"
                " AND seq NOT IN (SELECT value FROM json_each(?5)))"
                " ORDER BY due, seq LIMIT ?3) RETURNING seq, due, channel, event",
                (process, now, limit, names, encode_json(sorted(self._outbox.rows)).decode()),
            )

        rows = sorted(await self._outbox.take(take), key=itemgetter(1, 0))
        # Nothing taken although something is due: somebody else relays; look again soon.
        later = now + 0.2 if not rows else now
        return [OutboxRow(seq, channel, unpack(event)) for seq, _, channel, event in rows], later

    async def outbox_sent(self, rows: Sequence[int]) -> None:
        """Forget what was sent; see Store."""
        await self.engine.run(
            lambda c: c.executemany("DELETE FROM trunkline_outbox WHERE seq = ?", [(row,) for row in rows])
        )
        self._outbox.finished(rows)

    async def outbox_postpone(self, rows: Sequence[int], until: float) -> None:
        """Let rows wait; see Store."""
        await self.engine.run(
            lambda c: c.executemany(
                "UPDATE trunkline_outbox SET due = ?, owner = NULL WHERE seq = ?", [(until, row) for row in rows]
            )
        )
        self._outbox.finished(rows)

    # --- dead letters ---

    async def dead_letters(self, subscription: str | None = None, limit: int = 1000) -> list[DeadLetterRow]:
        """Return dead letters; see Store."""
        return read_dead_letters(self.engine.reader, subscription=subscription, limit=limit)

    async def redrive(self, number: int, raw: bytes | None = None) -> None:
        """Give a dead letter back; see Store."""

        def move(connection: apsw.Connection) -> None:
            row = take_dead_letter(connection, number)
            reader, key, partition, position, event = row
            connection.execute(
                "INSERT INTO trunkline_parked (reader, key, partition, position, due, attempt, reason, event)"
                " VALUES (?, ?, ?, ?, 0, 0, 'redriven', ?)",
                (reader, key, partition, position, event if raw is None else raw),
            )
            mark_head(connection, reader, key)

        await self.engine.run(move)
        self._notify()

    async def edit_dead_letter(self, number: int, raw: bytes) -> None:
        """Replace the envelope of a dead letter; see Store."""
        message = unpack(raw)

        def edit(connection: apsw.Connection) -> None:
            connection.execute(
                "UPDATE trunkline_dead_letter SET event = ?, id = ?, type = ? WHERE seq = ?",
                (raw, message.id, message.type, number),
            )
            if not connection.changes():
                raise no_dead_letter(number)

        await self.engine.run(edit)

    async def discard_dead_letter(self, number: int) -> None:
        """Remove a dead letter; see Store."""

        def remove(connection: apsw.Connection) -> None:
            reader, key, *_ = take_dead_letter(connection, number)
            mark_head(connection, reader, key)

        await self.engine.run(remove)
        self._notify()

    async def tidy(self) -> None:
        """Forget handled messages older than the inbox window; see Store."""
        rows = query(
            self.engine.reader,
            "SELECT reader, tenant, id, at FROM trunkline_inbox WHERE (reader, tenant, id) > (?, ?, ?)"
            " ORDER BY reader, tenant, id LIMIT ?",
            (*self._tidied, TIDY_ROWS),
        )
        self._tidied = rows[-1][:3] if len(rows) == TIDY_ROWS else (0, "", "")
        oldest = self._clock.now() - INBOX_WINDOW_S
        old = [row[:3] for row in rows if row[3] < oldest]
        if old:
            await self.engine.run(
                lambda c: c.executemany("DELETE FROM trunkline_inbox WHERE reader = ? AND tenant = ? AND id = ?", old)
            )


def _parking_key(delivery: Delivery) -> str | None:
    """Only Streams promise order per key, so only there successors wait."""
    return delivery.key if delivery.partition >= 0 else None


def _event(delivery: Delivery) -> bytes:
    if delivery.raw is not None:
        return delivery.raw
    assert delivery.message is not None  # noqa: S101 - one of the two is always there
    return pack(delivery.message)


def _attempt_id(delivery: Delivery) -> str:
    message = delivery.message
    if message is not None:
        return f"{message.tenantid or ''}/{message.identity}/{delivery.row}"  # a broker may give it another position
    return f"{delivery.partition}/{delivery.position}/{delivery.row}"
