"""The store in a PostgreSQL schema: inbox, outbox, parked and dead letters, beside the user's own tables.

Invariant: inbox rows are the first write of a unit; a conflict undoes the unit and leaves only its settlement.
Never does: channels (transports/postgres). Read next: parking.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import asyncpg

from trunkline.clock import Clock
from trunkline.errors import TransportError
from trunkline.message import pack, unpack
from trunkline.outcome import ACK, DeadLetter, RetryLater
from trunkline.postgres import Engine, Stage, close_engine, open_engine
from trunkline.postgres.joining import run_within
from trunkline.postgres.settings import DRIVER_ERRORS, read_settings
from trunkline.store import (
    INBOX_WINDOW_S,
    DeadLetterRow,
    DuplicateSignal,
    OutboxRow,
    Transaction,
    Unit,
    with_submitted,
)
from trunkline.stores.postgres.letters import Letters, lane_of, no_dead_letter
from trunkline.stores.postgres.tables import (
    CLAIM_LOOSE,
    COUNT_ATTEMPT,
    DEAD_LETTERS,
    DUE,
    FIRST_DUE,
    HEADS,
    KNOWN,
    PARKED_KEYS,
    REMEMBER,
    STAGE,
    STAGE_AND_TELL,
    TABLES,
    TAKE_CHANNELS,
    UNDO_ATTEMPT,
    short,
    text_of,
)
from trunkline.transport import LIVE, Address, Delivery, Staged, Subscription, Transport

TIDY_ROWS = 20_000
"""Most inbox rows that one statement of tidying removes."""
STAGED_POLL_S, CHANGE_POLL_S = 1.0, 5.0
"""How often other processes' outbox rows and treated dead letters are looked for without a notification."""


class PostgresStore:
    """Store of one service or system in the schema that `address` names."""

    remembers = True
    keeps = True
    part = "store"
    tables = TABLES

    def __init__(self, address: Address, clock: Clock) -> None:
        self._settings = read_settings(address)
        self._clock = clock
        self._readers: dict[str, int] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._staged_callbacks: list[Callable[[], None]] = []
        self._same = False
        self._party: tuple[Stage, ...] = ()
        self._letters: Letters
        self._polls: list[asyncio.Task[None]] = []
        self.engine: Engine

    async def start(self, transport: Transport, subscriptions: Sequence[Subscription]) -> bool:
        """Connect; see Store."""
        self.engine = await open_engine(self._settings, self._clock)
        try:
            self._same = getattr(transport, "engine", None) is self.engine
            self._letters = Letters(self.engine.sql)
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
            self.engine.spawn(self._poll(STAGED_POLL_S, self._staged_callbacks)),
            self.engine.spawn(self._poll(CHANGE_POLL_S, self._callbacks)),
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
                await self.engine.run(self._give_back_mine)
            except TransportError:
                self.engine.owes = True
        elif self in self.engine.stages:
            self.engine.owes = True
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
            await self.engine.run_users(run)

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
            KNOWN, [reader] * len(names), [short(tenant) for tenant, _ in names], [short(name) for _, name in names]
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
            if isinstance(error, DRIVER_ERRORS):
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
        await self._treat(connection, units)
        outbox = [s for unit in units for s in unit.staged if s.due is not None or not self._same]
        if outbox:
            await self.stage(connection, outbox)
            told.add("staged")

    async def _treat(self, connection: asyncpg.Connection, units: Sequence[Unit]) -> None:
        """Set aside what failed, forget what was parked and is done, and tries that came to an end."""
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
        if finished:
            await connection.execute(self.engine.sql("DELETE FROM @parked WHERE seq = ANY ($1::bigint[])"), finished)
        for reader, lane in sorted(touched):
            await self._letters.mark_head(connection, reader, lane)

    async def stage(self, connection: Any, outbox: Sequence[Staged]) -> None:
        """Write outbox rows on a connection of asyncpg, in its transaction."""
        await connection.execute(
            self.engine.sql(STAGE),
            [staged.due or 0.0 for staged in outbox],
            [staged.channel.name for staged in outbox],
            [pack(staged.message) for staged in outbox],
        )

    def _touch(self, delivery: Delivery, touched: set[tuple[int, str]]) -> None:
        lane = lane_of(delivery)
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

    async def reconnected(self, *, anew: bool) -> None:
        """What this process had taken may be another's now; see Stage."""
        if anew:
            self._forget_relayed()
        self.changed(("*",))

    async def _give_back_mine(self, connection: asyncpg.Connection) -> None:
        """Give back what this store had taken, and not what other Apps of this process have."""
        process = self.engine.process
        readers = list(self._readers.values())
        channels = [name for name, store in self.engine.relays.items() if store is self]
        await connection.execute(
            self.engine.sql("UPDATE @parked SET owner = 0 WHERE owner = $1 AND reader = ANY ($2::integer[])"),
            process,
            readers,
        )
        await connection.execute(
            self.engine.sql("UPDATE @relay SET owner = 0 WHERE owner = $1 AND channel = ANY ($2::text[])"),
            process,
            channels,
        )
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
                        tenants.append(short(message.tenantid or ""))
                        names.append(short(message.identity))
        if not names:
            return
        status = await connection.execute(
            self.engine.sql(REMEMBER), numbers, tenants, names, int(self._clock.now())
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
        rows = await self._fetch(KNOWN, numbers, tenants, names)
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
            reader = self._reader(delivery.subscription)
            if isinstance(outcome, RetryLater):
                await self._letters.park(connection, reader, delivery, self._clock.now() + outcome.after_s, outcome)
            elif isinstance(outcome, DeadLetter):
                await self._letters.bury(connection, reader, delivery, self._clock.now(), outcome)

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
        sql = self.engine.sql(COUNT_ATTEMPT)
        rows = [(self._reader(d.subscription), _attempt_id(d)) for d in deliveries]

        async def count(connection: asyncpg.Connection) -> list[int]:
            return [await connection.fetchval(sql, *row) for row in rows]

        return await self.engine.run(count)

    async def undo_attempts(self, deliveries: Sequence[Delivery]) -> None:
        """Take back one try of each; see Store."""
        rows = [(self._reader(d.subscription), _attempt_id(d)) for d in deliveries]

        async def undo(connection: asyncpg.Connection) -> None:
            for sql in UNDO_ATTEMPT:
                await connection.executemany(self.engine.sql(sql), rows)

        await self.engine.run(undo)

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
            rows = await connection.fetch(self.engine.sql(PARKED_KEYS), reader)
            keys: dict[str, int] = {}
            for key, partition, count in rows:
                if owns(partition):
                    keys[key] = keys.get(key, 0) + count
            into(with_submitted(keys, self.engine.uncommitted(), subscription))

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
            rows = await self._fetch(HEADS, reader, size)
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
        sql, process = self.engine.sql(CLAIM_LOOSE), self.engine.process
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
        ((first,),) = await self._fetch(FIRST_DUE, names)
        if first is None or first > now:
            if any(store is self for store in relays.values()):
                await self._release_channels()
            return [], first
        sql, process = self.engine.sql, self.engine.process

        async def take(connection: asyncpg.Connection) -> list[Any]:
            mine = [row[0] for row in await connection.fetch(sql(TAKE_CHANNELS), process, now, names)]
            return list(await connection.fetch(sql(DUE), now, mine, limit))

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

    async def outbox_postpone(self, rows: Sequence[int], until: float) -> None:
        """Let rows wait; see Store."""
        await self._execute("UPDATE @outbox SET due = $1 WHERE seq = ANY ($2::bigint[])", until, list(rows))

    async def stage_within(self, connection: Any, staged: Sequence[Staged]) -> None:
        """Stage messages in the transaction of a connection of the user's; they leave when it is committed.

        Args:
            connection: of asyncpg or psycopg, or an AsyncConnection or AsyncSession of SQLAlchemy on one of them.
        Raises: PublishError E315 for any other, E316 if it has no transaction open.
        """
        await run_within(
            connection,
            self.engine.sql(STAGE_AND_TELL),
            [item.due or 0.0 for item in staged],
            [item.channel.name for item in staged],
            [pack(item.message) for item in staged],
            f"trunkline.{self._settings.schema}",
        )

    # --- dead letters ---

    async def dead_letters(self, subscription: str | None = None, limit: int = 1000) -> list[DeadLetterRow]:
        """Return dead letters; see Store."""
        rows = await self._fetch(DEAD_LETTERS, subscription, limit)
        return [DeadLetterRow(*row) for row in rows]

    async def redrive(self, number: int, raw: bytes | None = None) -> None:
        """Give a dead letter back; see Store."""

        async def move(connection: asyncpg.Connection) -> None:
            row = await self._letters.take(connection, number)
            await self._letters.park_again(connection, row, row["event"] if raw is None else raw)
            self.engine.tell({"treated"})

        await self.engine.run(move)

    async def edit_dead_letter(self, number: int, raw: bytes) -> None:
        """Replace the envelope of a dead letter; see Store."""
        message = unpack(raw)

        async def edit(connection: asyncpg.Connection) -> None:
            status = await connection.execute(
                self.engine.sql("UPDATE @dead_letter SET event = $1, id = $2, type = $3 WHERE seq = $4"),
                raw, text_of(message.id), text_of(message.type), number,
            )  # fmt: skip
            if status != "UPDATE 1":
                raise no_dead_letter(number)

        await self.engine.run(edit)

    async def discard_dead_letter(self, number: int) -> None:
        """Remove a dead letter; see Store."""

        async def remove(connection: asyncpg.Connection) -> None:
            row = await self._letters.take(connection, number)
            await self._letters.mark_head(connection, row["reader"], row["lane"])
            self.engine.tell({"treated"})

        await self.engine.run(remove)

    async def tidy(self) -> None:
        """Forget handled messages older than the inbox window; see Store."""
        await self._fetch(
            "DELETE FROM @inbox WHERE ctid = ANY (ARRAY(SELECT ctid FROM @inbox WHERE at < $1 LIMIT $2))",
            int(self._clock.now() - INBOX_WINDOW_S), TIDY_ROWS,
        )  # fmt: skip


def _attempt_id(delivery: Delivery) -> str:
    """Return what identifies a delivery over the end of its process, on any transport."""
    message = delivery.message
    if message is None:
        return f"{delivery.partition}/{delivery.position}/{delivery.row}"
    return short(f"{message.tenantid or ''}\n{message.identity}")
