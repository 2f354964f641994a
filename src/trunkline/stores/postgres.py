"""The store in a PostgreSQL schema: inbox, outbox, parked and dead letters, beside the user's own tables.

Invariant: inbox rows are the first write of a unit; a conflict undoes the unit and leaves only its settlement.
Never does: channels (transports/postgres). Read next: parking.py.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import asyncpg

from trunkline.clock import Clock
from trunkline.errors import DeadLetterError, TransportError
from trunkline.message import pack, unpack
from trunkline.outcome import ACK, DeadLetter, RetryLater
from trunkline.postgres import Engine, Stage, close_engine, open_engine
from trunkline.postgres.settings import read_settings
from trunkline.store import INBOX_WINDOW_S, DeadLetterRow, DuplicateSignal, OutboxRow, Transaction, Unit
from trunkline.transport import LIVE, Address, Delivery, Staged, Subscription, Transport

TIDY_ROWS = 20_000
"""Most inbox rows that one statement of tidying removes."""
LONG = 400
"""Longest text that stands in an index as it is, in characters; an entry of an index has 2,704 bytes at most."""
STAGED_POLL_S, CHANGE_POLL_S = 1.0, 5.0
"""How often other processes' outbox rows and treated dead letters are looked for without a notification."""

_TABLES = """
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
CREATE INDEX outbox_due ON @outbox (due, seq);
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
"""

_REMEMBER = """
INSERT INTO @inbox (reader, tenant, id, at)
SELECT u.reader, u.tenant, u.id, $4 FROM unnest($1::integer[], $2::text[], $3::text[]) AS u(reader, tenant, id)
ON CONFLICT DO NOTHING
"""
_KNOWN = """
SELECT u.number::integer FROM unnest($1::integer[], $2::text[], $3::text[]) WITH ORDINALITY AS u(reader, tenant, id, number)
JOIN @inbox i ON i.reader = u.reader AND i.tenant = u.tenant AND i.id = u.id
"""
_PARK = """
INSERT INTO @parked (reader, lane, key, partition, position, due, attempt, reason, event)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
_BURY = """
INSERT INTO @dead_letter (reader, channel, lane, key, partition, position, id, type, code, reason, detail, attempt, at,
    holds, event) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
"""
# Which parked message of a key may run when it is due: the first, unless a dead letter holds the key.
_UNMARK = "UPDATE @parked SET head = false WHERE reader = $1 AND lane = $2 AND head"
_MARK = """
UPDATE @parked SET head = true WHERE seq = (SELECT seq FROM @parked WHERE reader = $1 AND lane = $2
    ORDER BY position, seq LIMIT 1)
AND NOT EXISTS (SELECT 1 FROM @dead_letter WHERE reader = $1 AND lane = $2 AND holds)
"""
_COUNT_ATTEMPT = """
INSERT INTO @attempt AS a VALUES ($1, $2, 1) ON CONFLICT (reader, id) DO UPDATE SET count = a.count + 1
RETURNING a.count
"""
_PARKED_KEYS = """
SELECT key, partition, count(*) FROM @parked WHERE reader = $1 AND lane IS NOT NULL GROUP BY 1, 2
UNION ALL
SELECT key, partition, count(*) FROM @dead_letter WHERE reader = $1 AND holds GROUP BY 1, 2
"""
_HEADS = """
SELECT seq, key, partition, position, due, attempt, event FROM @parked WHERE reader = $1 AND head ORDER BY due LIMIT $2
"""
_CLAIM_LOOSE = """
UPDATE @parked SET owner = $1 WHERE seq = ANY (ARRAY(SELECT seq FROM @parked WHERE reader = $2 AND lane IS NULL
    AND owner = 0 AND due <= $3 ORDER BY due LIMIT $4 FOR UPDATE SKIP LOCKED))
RETURNING seq, key, partition, position, attempt, event
"""
_TAKE_CHANNELS = """
INSERT INTO @relay AS r (channel, owner)
SELECT DISTINCT channel, $1::integer FROM @outbox WHERE due <= $2 AND channel = ANY ($3::text[]) ORDER BY 1
ON CONFLICT (channel) DO UPDATE SET owner = excluded.owner WHERE r.owner IN (0, excluded.owner)
RETURNING channel
"""
_DEAD_LETTERS = """
SELECT d.seq, r.label, d.channel, d.id, d.type, d.key, d.code, d.reason, d.detail, d.attempt, d.at, d.holds,
    (SELECT count(*) FROM @parked p WHERE d.holds AND p.reader = d.reader AND p.lane = d.lane), d.event
FROM @dead_letter d JOIN @reader r ON r.id = d.reader
WHERE $1::text IS NULL OR r.label = $1 OR starts_with(r.label, $1 || '@') ORDER BY d.seq LIMIT $2
"""


class PostgresStore:
    """Store of one service or system in the schema that `address` names."""

    remembers = True
    keeps = True
    part = "store"
    tables = _TABLES

    def __init__(self, address: Address, clock: Clock) -> None:
        self._settings = read_settings(address)
        self._clock = clock
        self._readers: dict[str, int] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._staged_callbacks: list[Callable[[], None]] = []
        self._same = False
        self._party: tuple[Stage, ...] = ()
        self._polls: list[asyncio.Task[None]] = []
        self.engine: Engine

    async def start(self, transport: Transport, subscriptions: Sequence[Subscription]) -> bool:
        """Connect; see Store."""
        self.engine = await open_engine(self._settings, self._clock)
        try:
            self._same = getattr(transport, "engine", None) is self.engine
            await self.engine.add_stage(self)
            # The store first: inbox rows come before anything else is written.
            self._party = (self, cast("Stage", transport)) if self._same else (self,)
            labels = sorted(subscription.label for subscription in subscriptions)
            await self._execute("INSERT INTO @reader (label) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING", labels)
            rows = await self._fetch("SELECT label, id FROM @reader WHERE label = ANY ($1::text[])", labels)
            self._readers = dict(rows)
        except BaseException:
            await self.stop()
            raise
        self._polls = [
            asyncio.create_task(self._poll(STAGED_POLL_S, self._staged_callbacks)),
            asyncio.create_task(self._poll(CHANGE_POLL_S, self._callbacks)),
        ]
        return self._same

    async def _poll(self, every_s: float, callbacks: list[Callable[[], None]]) -> None:
        while True:
            await self._clock.sleep(every_s)
            for callback in callbacks:
                callback()

    async def stop(self) -> None:
        """Give back what was taken and disconnect; see Store."""
        for poll in self._polls:
            poll.cancel()
        await asyncio.gather(*self._polls, return_exceptions=True)
        if self.engine.link.is_up and self in self.engine.stages:
            try:
                await self.engine.run(lambda connection: self._give_back(connection, self.engine.process))
            except TransportError:
                self.engine.link.lost(None)  # given back when this process is seen to be gone
        self._forget_relayed()
        if self in self.engine.stages:
            self.engine.remove_stage(self)
        await close_engine(self.engine)

    async def run_schema(self, statements: Sequence[str]) -> None:
        """Run table definitions in one transaction; see Store."""

        async def run(connection: asyncpg.Connection) -> None:
            # One process at a time: IF NOT EXISTS alone fails when two make the same table.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext($1))", f"schema.{self._settings.schema}")
            for statement in statements:
                await connection.execute(statement)

        if statements:
            await self.engine.run(run)

    async def _fetch(self, sql: str, *parameters: Any) -> list[Any]:
        return await self.engine.fetch(self.engine.sql(sql), *parameters)

    async def _execute(self, sql: str, *parameters: Any) -> None:
        await self.engine.run(lambda connection: connection.execute(self.engine.sql(sql), *parameters))

    def _reader(self, subscription: Subscription) -> int:
        return self._readers[subscription.label]

    # --- the unit of work ---

    async def known(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> set[tuple[str, str]]:
        """Return which were handled before; see Store."""
        reader = self._reader(subscription)
        names = [(d.message.tenantid or "", d.message.identity) for d in deliveries if d.message is not None]
        rows = await self._fetch(
            _KNOWN, [reader] * len(names), [_short(tenant) for tenant, _ in names], [_short(name) for _, name in names]
        )
        return {names[row[0] - 1] for row in rows}

    def submit(self, unit: Unit) -> None:
        """Commit with the next group, or the handler's transaction by itself; see Store."""
        transaction = unit.transaction
        if transaction is None:
            self.engine.submit(self._party, unit)
        else:
            transaction.end()
            self.engine.commit(self._party, unit, transaction)  # type: ignore[arg-type]

    async def transaction(self, unit: Unit) -> Transaction:
        """Open the handler's transaction; see Store."""
        transaction = await self.engine.begin(unit)
        try:
            await self._remember(transaction.asyncpg, (unit,))
        except BaseException as error:
            await transaction.abandon()
            if isinstance(error, asyncpg.PostgresError | asyncpg.InterfaceError | OSError):
                raise self.engine.translate(error) from error
            raise
        unit.transaction = transaction
        return transaction

    async def rollback(self, unit: Unit) -> None:
        """Undo the handler's transaction; see Store."""
        transaction, unit.transaction = unit.transaction, None
        if transaction is not None:
            transaction.end()
            await transaction.abandon()  # type: ignore[attr-defined]

    # --- stage of the engine's group ---

    async def apply(self, connection: asyncpg.Connection, units: Sequence[Unit], told: set[str]) -> None:
        """Write inbox rows, parked and dead letters and scheduled messages of `units`."""
        fresh = [unit for unit in units if unit.transaction is None and not unit.duplicate]
        if fresh:
            await self._remember(connection, fresh)
        touched: set[tuple[int, str]] = set()
        finished: list[int] = []
        attempts: list[tuple[int, str]] = []
        for unit in units:
            if unit.outcome is not ACK:
                await self._set_aside(connection, unit, touched)
            for delivery in unit.deliveries:
                if delivery.row != LIVE:
                    finished.append(delivery.row)
                    self._touch(delivery, touched)
                if delivery.suspect:
                    attempts.append((self._reader(delivery.subscription), _attempt_id(delivery)))
        if attempts:
            await self._forget_attempts(connection, attempts)
        outbox = [s for unit in units for s in unit.staged if s.due is not None or not self._same]
        if outbox:
            await self.stage(connection, outbox)
            told.add("staged")
        if finished:
            await connection.execute(self.engine.sql("DELETE FROM @parked WHERE seq = ANY ($1::bigint[])"), finished)
        for reader, lane in sorted(touched):
            await self._mark_head(connection, reader, lane)

    async def stage(self, connection: Any, outbox: Sequence[Staged]) -> None:
        """Write outbox rows on a connection of asyncpg, in its transaction."""
        await connection.execute(
            self.engine.sql(
                "INSERT INTO @outbox (due, channel, event) SELECT * FROM"
                " unnest($1::double precision[], $2::text[], $3::bytea[])"
            ),
            [staged.due or 0.0 for staged in outbox],
            [staged.channel.name for staged in outbox],
            [pack(staged.message) for staged in outbox],
        )

    def _touch(self, delivery: Delivery, touched: set[tuple[int, str]]) -> None:
        lane = _lane(delivery)
        if lane is not None:
            touched.add((self._reader(delivery.subscription), lane))

    def alone(self, units: Sequence[Unit], told: set[str]) -> tuple[str, tuple[Any, ...], int] | None:  # noqa: ARG002
        """Return None: inbox rows are looked at before the commit."""
        return None

    def committed(self, units: Sequence[Unit], *, alone: bool) -> None:
        """Nothing to note: who waits is told."""

    def changed(self, told: Collection[str]) -> None:
        """Something was committed here or elsewhere: dead letters may be redriven, the outbox may have grown."""
        everything = "*" in told
        if everything or "treated" in told:
            for callback in self._callbacks:
                callback()
        if everything or "staged" in told:
            for callback in self._staged_callbacks:
                callback()

    def holds(self, delivery: Delivery) -> bool:
        """Return whether the transport still has `delivery`; one of another database is asked for itself."""
        return not self._same or delivery.row != LIVE or self._party[1].holds(delivery)

    async def release(self, connection: asyncpg.Connection, process: int) -> None:
        """Give back what a dead process had taken."""
        await self._give_back(connection, process)

    async def reconnected(self, *, anew: bool) -> None:
        """What this process had taken may be another's now; see Stage."""
        if anew:
            self._forget_relayed()
        self.changed(("*",))

    async def _give_back(self, connection: asyncpg.Connection, process: int) -> None:
        for table in ("parked", "relay"):
            await connection.execute(self.engine.sql(f"UPDATE @{table} SET owner = 0 WHERE owner = $1"), process)  # noqa: S608
        self.engine.tell({"treated", "staged"})

    def on_staged(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._staged_callbacks.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._callbacks.append(callback)

    async def _remember(self, connection: Any, units: Sequence[Unit]) -> None:
        readers = self._readers
        numbers: list[int] = []
        tenants: list[str] = []
        names: list[str] = []
        for unit in units:
            if unit.outcome is ACK:
                for delivery in unit.deliveries:
                    message = delivery.message
                    if message is not None:
                        numbers.append(readers[delivery.subscription.label])
                        tenants.append(_short(message.tenantid or ""))
                        names.append(_short(message.identity))
        if not names:
            return
        status = await connection.execute(
            self.engine.sql(_REMEMBER), numbers, tenants, names, int(self._clock.now())
        )  # fmt: skip
        if status != f"INSERT 0 {len(names)}":
            await self._note_duplicates(units, numbers, tenants, names)
            raise DuplicateSignal

    async def _note_duplicates(
        self, units: Sequence[Unit], numbers: list[int], tenants: list[str], names: list[str]
    ) -> None:
        """Mark the units that the inbox, or an earlier unit of the same group, already has."""
        if len(units) == 1:
            units[0].duplicate = units[0].transaction is None
            units[0].staged = units[0].staged if units[0].transaction is not None else ()
            return
        # On another connection, so as committed: what this group has written is not there.
        rows = await self._fetch(_KNOWN, numbers, tenants, names)
        identities = list(zip(numbers, tenants, names, strict=True))
        seen = {identities[row[0] - 1] for row in rows}
        place = 0
        for unit in units:
            if unit.outcome is not ACK:
                continue
            count = sum(delivery.message is not None for delivery in unit.deliveries)
            mine = identities[place : place + count]
            place += count
            if seen.intersection(mine) or len(set(mine)) < len(mine):
                unit.duplicate = True
                unit.staged = ()
            else:
                seen.update(mine)

    async def _set_aside(self, connection: asyncpg.Connection, unit: Unit, touched: set[tuple[int, str]]) -> None:
        outcome = unit.outcome
        for delivery in unit.deliveries:
            if not self.holds(delivery):
                continue  # another process has it now, and decides
            self._touch(delivery, touched)
            if isinstance(outcome, RetryLater):
                await self._park(connection, delivery, self._clock.now() + outcome.after_s, outcome.reason)
            elif isinstance(outcome, DeadLetter):
                await self._bury(connection, delivery, outcome)

    async def _park(self, connection: asyncpg.Connection, delivery: Delivery, due: float, reason: str) -> None:
        await connection.execute(
            self.engine.sql(_PARK), self._reader(delivery.subscription), _lane(delivery), _key(delivery),
            delivery.partition, delivery.position, due, delivery.attempt, _text(reason), _event(delivery),
        )  # fmt: skip

    async def _bury(self, connection: asyncpg.Connection, delivery: Delivery, outcome: DeadLetter) -> None:
        message = delivery.message
        lane = _lane(delivery)
        await connection.execute(
            self.engine.sql(_BURY), self._reader(delivery.subscription), delivery.subscription.channel.name, lane,
            _key(delivery), delivery.partition, delivery.position, "" if message is None else _text(message.id),
            "" if message is None else _text(message.type), outcome.code, _text(outcome.reason),
            _text(outcome.detail), delivery.attempt, self._clock.now(), outcome.holds and lane is not None,
            _event(delivery),
        )  # fmt: skip

    async def _mark_head(self, connection: asyncpg.Connection, reader: int, lane: str | None) -> None:
        if lane is not None:
            await connection.execute(self.engine.sql(_UNMARK), reader, lane)
            await connection.execute(self.engine.sql(_MARK), reader, lane)

    # --- suspects ---

    async def attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Return the tries that never came to an end; see Store."""
        rows = await self._fetch(
            "SELECT u.number::integer, a.count FROM unnest($1::integer[], $2::text[]) WITH ORDINALITY AS"
            " u(reader, id, number) JOIN @attempt a ON a.reader = u.reader AND a.id = u.id",
            [self._reader(delivery.subscription) for delivery in deliveries],
            [_attempt_id(delivery) for delivery in deliveries],
        )
        counts = dict(rows)
        return [counts.get(number, 0) for number in range(1, len(deliveries) + 1)]

    async def begin_attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Count one more try for each suspect; see Store."""
        sql = self.engine.sql(_COUNT_ATTEMPT)
        rows = [(self._reader(d.subscription), _attempt_id(d)) for d in deliveries]

        async def count(connection: asyncpg.Connection) -> list[int]:
            return [await connection.fetchval(sql, *row) for row in rows]

        return await self.engine.run(count)

    async def _forget_attempts(self, connection: asyncpg.Connection, attempts: list[tuple[int, str]]) -> None:
        await connection.execute(
            self.engine.sql(
                "DELETE FROM @attempt a USING unnest($1::integer[], $2::text[]) AS u(reader, id)"
                " WHERE a.reader = u.reader AND a.id = u.id"
            ),
            [reader for reader, _ in attempts], [name for _, name in attempts],
        )  # fmt: skip

    # --- parked messages ---

    async def load_parked(
        self, subscription: Subscription, owns: Callable[[int], bool], into: Callable[[dict[str, int]], None]
    ) -> None:
        """Tell which keys are parked or held; see Store."""
        reader = self._reader(subscription)

        async def load(connection: asyncpg.Connection) -> None:
            rows = await connection.fetch(self.engine.sql(_PARKED_KEYS), reader)
            keys: dict[str, int] = {}
            for key, partition, count in rows:
                if owns(partition):
                    keys[key] = keys.get(key, 0) + count
            # What was submitted while the rows were read is not among them.
            for unit in self.engine.uncommitted():
                for delivery in unit.deliveries:
                    if delivery.subscription is subscription and delivery.partition >= 0 and delivery.key is not None:
                        keys[delivery.key] = keys.get(delivery.key, 0) + _change(unit, delivery)
            into({key: count for key, count in keys.items() if count > 0})

        await self.engine.look(load)

    async def parked_due(
        self, subscription: Subscription, owns: Callable[[int], bool], now: float, limit: int, running: set[str]
    ) -> tuple[list[Delivery], float | None]:
        """Return the heads that may run now; see Store."""
        reader = self._reader(subscription)
        found: list[Delivery] = []
        next_due: float | None = None
        size = limit + len(running) + 100
        while True:
            rows = await self._fetch(_HEADS, reader, size)
            found, next_due = [], None
            for seq, key, partition, position, due, attempt, event in rows:
                if len(found) == limit or due > now:
                    next_due = due
                    break
                if key not in running and owns(partition):
                    found.append(Delivery(subscription, None, event, key, position, partition, attempt, seq))
            if next_due is not None or len(rows) < size:
                break
            size *= 4  # the first ones run, or are other processes'
        loose, loose_due = await self._claim_loose(subscription, reader, now, limit - len(found))
        dues = [due for due in (next_due, loose_due) if due is not None]
        return found + loose, min(dues) if dues else None

    async def _claim_loose(
        self, subscription: Subscription, reader: int, now: float, limit: int
    ) -> tuple[list[Delivery], float | None]:
        """Take parked messages without an order: any process may have them."""
        ((first,),) = await self._fetch(
            "SELECT min(due) FROM @parked WHERE reader = $1 AND lane IS NULL AND owner = 0", reader
        )
        if first is None or first > now or limit <= 0:
            return [], first
        sql, process = self.engine.sql(_CLAIM_LOOSE), self.engine.process
        rows = await self.engine.run(lambda connection: connection.fetch(sql, process, reader, now, limit))
        return [
            Delivery(subscription, None, event, key, position, partition, attempt, seq)
            for seq, key, partition, position, attempt, event in sorted(rows)
        ], now

    # --- outbox ---

    async def outbox_due(
        self, channels: Collection[str], now: float, limit: int
    ) -> tuple[list[OutboxRow], float | None]:
        """Take what is to be sent now; see Store."""
        relays = self.engine.relays
        names = [name for name in channels if relays.setdefault(name, self) is self]
        ((first,),) = await self._fetch("SELECT min(due) FROM @outbox WHERE channel = ANY ($1::text[])", names)
        if first is None or first > now:
            if any(store is self for store in relays.values()):
                await self._release_channels()
            return [], first
        sql, process = self.engine.sql, self.engine.process

        async def take(connection: asyncpg.Connection) -> list[Any]:
            mine = [row[0] for row in await connection.fetch(sql(_TAKE_CHANNELS), process, now, names)]
            return list(
                await connection.fetch(
                    sql(
                        "SELECT seq, channel, event FROM @outbox WHERE due <= $1 AND channel = ANY ($2::text[])"
                        " ORDER BY due, seq LIMIT $3"
                    ),
                    now, mine, limit,
                )  # fmt: skip
            )

        rows = await self.engine.run(take)
        # Nothing taken although something is due: another process relays; look again soon.
        later = now + 0.2 if not rows else now
        return [OutboxRow(seq, channel, unpack(event)) for seq, channel, event in rows], later

    async def _release_channels(self) -> None:
        names = [name for name, store in self.engine.relays.items() if store is self]
        await self._fetch(
            "UPDATE @relay SET owner = 0 WHERE owner = $1 AND channel = ANY ($2::text[])", self.engine.process, names
        )
        self._forget_relayed()

    def _forget_relayed(self) -> None:
        relays = self.engine.relays
        for name in [name for name, store in relays.items() if store is self]:
            del relays[name]

    async def outbox_sent(self, rows: Sequence[int]) -> None:
        """Forget what was sent; see Store."""
        await self._execute("DELETE FROM @outbox WHERE seq = ANY ($1::bigint[])", list(rows))

    # --- dead letters ---

    async def dead_letters(self, subscription: str | None = None, limit: int = 1000) -> list[DeadLetterRow]:
        """Return dead letters; see Store."""
        rows = await self._fetch(_DEAD_LETTERS, subscription, limit)
        return [DeadLetterRow(*row) for row in rows]

    async def redrive(self, number: int, raw: bytes | None = None) -> None:
        """Give a dead letter back; see Store."""

        async def move(connection: asyncpg.Connection) -> None:
            row = await self._take_dead_letter(connection, number)
            await connection.execute(
                self.engine.sql(_PARK), row["reader"], row["lane"], row["key"], row["partition"], row["position"],
                0.0, 0, "redriven", row["event"] if raw is None else raw,
            )  # fmt: skip
            await self._mark_head(connection, row["reader"], row["lane"])

        await self.engine.run(move)

    async def _take_dead_letter(self, connection: asyncpg.Connection, number: int) -> Any:
        row = await connection.fetchrow(
            self.engine.sql(
                "DELETE FROM @dead_letter WHERE seq = $1 RETURNING reader, lane, key, partition, position, event"
            ),
            number,
        )
        if row is None:
            raise _no_dead_letter(number)
        self.engine.tell({"treated"})
        return row

    async def edit_dead_letter(self, number: int, raw: bytes) -> None:
        """Replace the envelope of a dead letter; see Store."""
        message = unpack(raw)

        async def edit(connection: asyncpg.Connection) -> None:
            status = await connection.execute(
                self.engine.sql("UPDATE @dead_letter SET event = $1, id = $2, type = $3 WHERE seq = $4"),
                raw, _text(message.id), _text(message.type), number,
            )  # fmt: skip
            if status != "UPDATE 1":
                raise _no_dead_letter(number)

        await self.engine.run(edit)

    async def discard_dead_letter(self, number: int) -> None:
        """Remove a dead letter; see Store."""

        async def remove(connection: asyncpg.Connection) -> None:
            row = await self._take_dead_letter(connection, number)
            await self._mark_head(connection, row["reader"], row["lane"])

        await self.engine.run(remove)

    async def tidy(self) -> None:
        """Forget handled messages older than the inbox window; see Store."""
        await self._fetch(
            "DELETE FROM @inbox WHERE ctid = ANY (ARRAY(SELECT ctid FROM @inbox WHERE at < $1 LIMIT $2))",
            int(self._clock.now() - INBOX_WINDOW_S), TIDY_ROWS,
        )  # fmt: skip


def _no_dead_letter(number: int) -> DeadLetterError:
    return DeadLetterError("E601", f"no dead letter {number}", 'list them with "trunkline dead list"')


def _change(unit: Unit, delivery: Delivery) -> int:
    """Return by how much the end of a unit changes what is parked or held of a key; see parking.py."""
    outcome = unit.outcome
    adds = isinstance(outcome, RetryLater) or (isinstance(outcome, DeadLetter) and outcome.holds)
    return int(adds) - int(delivery.row != LIVE)


def _key(delivery: Delivery) -> str | None:
    return None if delivery.key is None else _text(delivery.key)


def _lane(delivery: Delivery) -> str | None:
    """Return the key as it stands in an index; only Streams promise order per key, so only there successors wait."""
    return _short(delivery.key) if delivery.partition >= 0 and delivery.key is not None else None


def _text(text: str) -> str:
    """Return `text` as PostgreSQL can keep it: without zero bytes."""
    return text.replace("\0", "␀") if "\0" in text else text


def _short(text: str) -> str:
    """Return `text`, or for what is too long for an index its beginning and its hash."""
    if len(text) > LONG:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        text = f"{text[:80]}…{digest}"
    return _text(text)


def _event(delivery: Delivery) -> bytes:
    if delivery.raw is not None:
        return delivery.raw
    assert delivery.message is not None  # noqa: S101 - one of the two is always there
    return pack(delivery.message)


def _attempt_id(delivery: Delivery) -> str:
    """Return what identifies a delivery over the end of its process, on any transport."""
    message = delivery.message
    if message is None:
        return f"{delivery.partition}/{delivery.position}/{delivery.row}"
    return _short(f"{message.tenantid or ''}\n{message.identity}")
