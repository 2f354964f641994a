"""Queue, Topic and Stream in PostgreSQL.

Invariant: what a unit sends and settles is written with the unit where the store is the same schema; only what this
process still has is settled. Never does: inbox or dead letters (stores/postgres).
Read next: ../../postgres/engine.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import asyncpg

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.message import pack, partition_of
from trunkline.postgres import Engine, close_engine, open_engine
from trunkline.postgres.settings import read_settings
from trunkline.store import Unit
from trunkline.transport import LIVE, Address, Backlog, Capabilities, Delivery, Staged, Subscription
from trunkline.transports.postgres.inspector import PostgresInspector
from trunkline.transports.postgres.readers import Partition, QueueReader, StreamReader
from trunkline.transports.postgres.tables import (
    BEGIN_SINCE,
    HIGHEST,
    MOVE_CURSORS,
    PUT_QUEUE,
    PUT_QUEUE_ALONE,
    PUT_STREAM,
    PUT_STREAM_ALONE,
    PUT_TOPIC,
    QUEUE_BACKLOG,
    REMOVE,
    STREAM_BACKLOG,
    TABLES,
    TRIM,
    queue_base,
    queue_range,
    stored_name,
)

log = logging.getLogger("trunkline.transport.postgres")

BALANCE_S = 1.0
"""How often the partitions of Streams are shared out anew."""
CURSORS_S = 0.1
"""After so long without another group, cursors are written by themselves."""


class PostgresTransport:
    """Channels in the schema that `address` names."""

    part = "channels"
    tables = TABLES
    capabilities = Capabilities(
        durable=True,
        processes=True,
        priority=True,
        ordered_streams=True,
        description="tables of a PostgreSQL schema, confirmed after the commit",
    )

    def __init__(self, address: Address, clock: Clock) -> None:
        self._address = address
        self._settings = read_settings(address)
        self._clock = clock
        self._routes: dict[str, _Route] = {}
        self._undeclared: dict[str, tuple[Unit, _Route]] = {}
        self._readers: dict[str, QueueReader | StreamReader] = {}
        self._retention: dict[str, float] = {}
        self._labels: set[str] = set()
        self._balancing: asyncio.Task[None] | None = None
        self._balance_due = asyncio.Event()
        self._timer: Any = None
        self._moving: list[tuple[Partition, int]] = []
        self._draining = False
        self.engine: Engine

    async def left_over(self) -> dict[str, int]:
        """Return subscription → what waits for it in the schema; not to be started for that, see inspection.py."""
        inspector = PostgresInspector(self._address, self._clock)
        await inspector.open()
        try:
            return await inspector.left_over()
        finally:
            await inspector.close()

    # --- contract ---

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Connect, declare what is missing; see Transport."""
        self._loop = asyncio.get_running_loop()
        self.engine = await open_engine(self._settings, self._clock)
        try:
            await self._open(list(channels), list(subscriptions))
        except BaseException:
            await self.stop()
            raise

    async def _open(self, listed: list[Channel], wanted: list[Subscription]) -> None:
        engine = self.engine
        self._statements = {
            sql: engine.sql(sql)
            for sql in (PUT_QUEUE, PUT_QUEUE_ALONE, PUT_TOPIC, PUT_STREAM, PUT_STREAM_ALONE, REMOVE, MOVE_CURSORS)
        }  # fmt: skip
        await engine.add_stage(self)
        self._take_labels({subscription.label for subscription in wanted})
        routes: dict[str, _Route] = {}
        numbers = await engine.run(lambda connection: self._declare(connection, listed, wanted, routes))
        self._routes = routes
        for subscription in wanted:
            kind = StreamReader if isinstance(subscription.channel, Stream) else QueueReader
            self._readers[subscription.label] = kind(engine, subscription, *numbers[subscription.label])
        await engine.members.sweep()
        await self._balance()
        for reader in self._readers.values():
            reader.start()
        self._balancing = engine.spawn(self._keep_balance())

    def _take_labels(self, labels: set[str]) -> None:
        taken = labels & self.engine.labels
        if taken:
            raise ConfigurationError(
                "E220",
                f"{', '.join(sorted(taken))} is read already by another App of this process",
                "start one App with all services, or another process",
            )
        self.engine.labels |= labels
        self._labels = labels

    async def _declare(
        self,
        connection: asyncpg.Connection,
        channels: list[Channel],
        subscriptions: list[Subscription],
        routes: dict[str, _Route],
    ) -> dict[str, tuple[int, int]]:
        # One process at a time: two that declare the same things in another order would wait for each other.
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext($1))", f"trunkline.{self._settings.schema}")
        for channel in channels:
            await self._declare_channel(connection, channel, routes)
        numbers = {}
        for subscription in subscriptions:
            route = await self._declare_channel(connection, subscription.channel, routes)
            number = await self._declare_subscription(connection, route.number, stored_name(subscription))
            numbers[subscription.label] = (number, route.number)
            if isinstance(subscription.channel, Stream):
                await self._declare_cursors(connection, number, route.number, subscription)
        self.engine.tell({"declared"})
        return numbers

    async def _declare_channel(
        self, connection: asyncpg.Connection, channel: Channel, routes: dict[str, _Route]
    ) -> _Route:
        known = routes.get(channel.name)
        if known is not None:
            return known
        sql = self.engine.sql
        partitions = getattr(channel, "partitions", 0)
        await connection.execute(
            sql("INSERT INTO @channel (name, kind, partitions) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"),
            channel.name, channel.kind, partitions,
        )  # fmt: skip
        number, kind, existing = await connection.fetchrow(
            sql("SELECT id, kind, partitions FROM @channel WHERE name = $1"), channel.name
        )
        if kind != channel.kind or existing != partitions:
            raise ConfigurationError(
                "E207",
                f"{channel.kind} {channel.name!r} with {partitions} partitions exists as {kind} with {existing}",
                "declare it as it exists, or use another name",
            )
        route = routes[channel.name] = _Route(number)
        if isinstance(channel, Queue):
            # A queue keeps what is sent before its owner ever runs: its one reader is known from the start.
            route.queue = await self._declare_subscription(connection, number, channel.name)
        elif isinstance(channel, Stream):
            await connection.execute(
                sql("INSERT INTO @head SELECT $1, n, 1 FROM generate_series(0, $2 - 1) n ON CONFLICT DO NOTHING"),
                number, partitions,
            )  # fmt: skip
        if isinstance(channel, Stream) and channel.retention_s is not None:
            self._retention[channel.name] = channel.retention_s
        return route

    async def _declare_subscription(self, connection: asyncpg.Connection, channel: int, name: str) -> int:
        await connection.execute(
            self.engine.sql("INSERT INTO @subscription (channel, name) VALUES ($1, $2) ON CONFLICT DO NOTHING"),
            channel, name,
        )  # fmt: skip
        number = await connection.fetchval(
            self.engine.sql("SELECT id FROM @subscription WHERE channel = $1 AND name = $2"), channel, name
        )
        return int(number)

    async def _declare_cursors(
        self, connection: asyncpg.Connection, number: int, channel: int, subscription: Subscription
    ) -> None:
        if subscription.since_s is not None:
            await connection.execute(self.engine.sql(BEGIN_SINCE), number, channel, subscription.since_s)
            return
        begin = "next" if subscription.start == "latest" else "1"
        await connection.execute(
            self.engine.sql(
                f"INSERT INTO @cursor SELECT $1, partition, {begin}, 0, false FROM @head WHERE channel = $2"  # noqa: S608
                " ON CONFLICT DO NOTHING"
            ),
            number, channel,
        )  # fmt: skip

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Commit `batch`; see Transport."""
        return self._commit((), batch)

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what is ready for `subscription`; see Transport."""
        reader = self._readers[subscription.label]
        deliveries = await reader.inflow.receive(limit)
        if isinstance(reader, StreamReader):
            reader.handed_out(deliveries)
        return deliveries

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge `deliveries`, for a Store in another database; see Transport."""
        await self._commit(deliveries, ())

    def _commit(self, deliveries: Sequence[Delivery], staged: Sequence[Staged]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self.engine.submit((self,), Unit(deliveries, partial(_resolve, future), "", staged))
        return future

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process reads `partition`; see Transport."""
        reader = self._readers[subscription.label]
        return isinstance(reader, StreamReader) and partition in reader.partitions

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes with the partitions read here; see Transport."""
        return self._readers[subscription.label].inflow.assignment

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport."""
        reader = self._readers[subscription.label]
        if isinstance(reader, QueueReader):
            ((waiting, in_flight),) = await self.engine.fetch(
                self.engine.sql(QUEUE_BACKLOG), *queue_range(reader.number)
            )
            return Backlog(waiting, in_flight)
        if self._dirty():
            await self._commit((), ())
        ((waiting,),) = await self.engine.fetch(self.engine.sql(STREAM_BACKLOG), reader.number)
        return Backlog(waiting, sum(len(state.watermark) for state in reader.partitions.values()))

    async def tidy(self) -> None:
        """Remove log rows older than their Stream's retention; see Transport."""
        now = self._clock.now()
        await self.engine.run(self.engine.members.tidy)
        for name, retention_s in self._retention.items():
            route = self._routes.get(name)
            if route is None:  # its first message was not committed yet
                continue
            partitions = await self.engine.fetch(
                self.engine.sql("SELECT partition FROM @head WHERE channel = $1"), route.number
            )
            for (partition,) in partitions:
                await self.engine.fetch(self.engine.sql(TRIM), route.number, partition, int(now - retention_s))

    async def drain(self) -> None:
        """Stop handing out; see Transport."""
        self._draining = True
        for reader in self._readers.values():
            try:
                await reader.drain()
            except TransportError as error:
                log.warning("%s: given back when this process is gone: %s", reader.subscription.label, error)

    async def stop(self) -> None:
        """Give back what is held and disconnect; see Transport."""
        await self.drain()
        if self._timer is not None:
            self._timer.cancel()
        if self._balancing is not None:
            self._balancing.cancel()
            await asyncio.gather(self._balancing, return_exceptions=True)
        if self.engine.link.is_up:
            for reader in self._readers.values():
                try:
                    await reader.stop()
                    if isinstance(reader, StreamReader):
                        await reader.ownership.leave()
                except TransportError as error:
                    self.engine.owes = True
                    log.warning("%s: given back when this process is gone: %s", reader.subscription.label, error)
        else:
            self.engine.owes = True
            await asyncio.gather(*(reader.end() for reader in self._readers.values()))
        self.engine.labels -= self._labels
        if self in self.engine.stages:
            self.engine.remove_stage(self)
        await close_engine(self.engine)

    # --- stage of the engine's group ---

    async def apply(self, connection: asyncpg.Connection, units: Sequence[Unit], told: set[str]) -> None:
        """Remove what `units` settle, move cursors, then write what they send."""
        gone = self._settled_places(units)
        statements = self._statements
        if gone:
            await connection.execute(statements[REMOVE], gone)
        if connection is self.engine.writer:
            await self._move_cursors(connection)
        rows = await self._place(connection, units, told)
        if rows.queue[0]:
            await connection.execute(statements[PUT_QUEUE], *rows.queue)
        if rows.topic[0]:
            await connection.execute(statements[PUT_TOPIC], *rows.topic)
        if rows.stream:
            # Last of all: until the commit nobody else can append to these partitions.
            await connection.execute(statements[PUT_STREAM], *rows.appended(int(self._clock.now())))

    async def _place(self, connection: asyncpg.Connection, units: Sequence[Unit], told: set[str]) -> _Rows:
        rows = _Rows()
        undeclared: dict[str, _Route] = {}
        routes = self._routes
        for unit in units:
            for staged in unit.staged:
                if staged.due is None:
                    route = routes.get(staged.channel.name)
                    if route is None:  # declared after the start; known once this is committed
                        route = await self._declare_channel(connection, staged.channel, undeclared)
                        self._undeclared[staged.channel.name] = (unit, route)
                    rows.add(staged, route)
                    told.add(route.word)
        return rows

    def alone(self, units: Sequence[Unit], told: set[str]) -> tuple[str, tuple[Any, ...], int] | None:
        """Return one statement that writes `units`, its parameters and how many rows it adds, or None."""
        if any(unit.deliveries for unit in units) or self._dirty():
            return None
        rows = _Rows()
        routes = self._routes
        for unit in units:
            for staged in unit.staged:
                route = routes.get(staged.channel.name)
                if route is None:
                    return None
                rows.add(staged, route)
                told.add(route.word)
        if rows.topic[0] or bool(rows.queue[0]) == bool(rows.stream):
            return None
        if rows.stream:
            parameters = rows.appended(int(self._clock.now()))
            return self._statements[PUT_STREAM_ALONE], parameters, len(parameters[3])
        return self._statements[PUT_QUEUE_ALONE], rows.queue, len(rows.queue[0])

    def _settled_places(self, units: Sequence[Unit]) -> list[int]:
        """Return the rows to be removed: what others have by now is theirs to settle."""
        gone: list[int] = []
        for unit in units:
            for delivery in unit.deliveries:
                if delivery.row == LIVE and delivery.partition < 0:
                    held = self._readers[delivery.subscription.label].held  # type: ignore[union-attr]
                    if delivery.position in held:
                        gone.append(delivery.position)
        return gone

    def _dirty(self) -> list[tuple[int, Partition]]:
        return [
            (reader.number, state)
            for reader in self._readers.values()
            if isinstance(reader, StreamReader)
            for state in reader.partitions.values()
            if state.watermark.low != state.written
        ]

    async def _move_cursors(self, connection: asyncpg.Connection) -> None:
        """Write how far partitions were handled, by groups before this one: what is undone is never passed."""
        dirty = self._dirty()
        self._moving = [(state, state.watermark.low) for _, state in dirty]
        if dirty:
            await connection.execute(
                self._statements[MOVE_CURSORS],
                [number for number, _ in dirty],
                [state.number for _, state in dirty],
                [low for _, low in self._moving],
                self.engine.process,
            )

    def committed(self, units: Sequence[Unit], *, alone: bool) -> None:
        """Forget what was settled; move on."""
        if self._undeclared:
            self._learn_routes(units)
        if not alone:
            moving, self._moving = self._moving, []
            for state, low in moving:
                state.written = low
        if self._let_go(units) and self._timer is None and not self._draining:
            self._timer = self._clock.call_later(CURSORS_S, self._write_cursors)

    def _let_go(self, units: Sequence[Unit]) -> bool:
        """Forget what `units` settled; return whether that moves a partition on."""
        settled: dict[Partition, list[int]] = {}
        for unit in units:
            for delivery in unit.deliveries:
                if delivery.row != LIVE:
                    continue
                reader = self._readers[delivery.subscription.label]
                if isinstance(reader, QueueReader):
                    reader.held.discard(delivery.position)
                else:
                    state = reader.partitions.get(delivery.partition)
                    if state is not None:
                        settled.setdefault(state, []).append(delivery.position)
        for state, positions in settled.items():
            state.watermark.done(positions)
        return bool(settled)

    def _learn_routes(self, units: Sequence[Unit]) -> None:
        """From now on know the channels that `units` declared."""
        for name, (unit, route) in list(self._undeclared.items()):
            if any(unit is one for one in units):
                self._routes[name] = route
                del self._undeclared[name]

    def _write_cursors(self) -> None:
        self._timer = None
        if self._dirty():
            self.engine.submit((self,), Unit((), _nothing))

    def changed(self, told: Collection[str]) -> None:
        """Look again: there may be messages, or other processes."""
        everything = "*" in told or "returned" in told
        for reader in self._readers.values():
            if everything or reader.word in told:
                reader.look()
        if everything or "members" in told:
            self._balance_due.set()

    def holds(self, delivery: Delivery) -> bool:
        """Return whether `delivery` is still to be settled here."""
        reader = self._readers.get(delivery.subscription.label)
        if isinstance(reader, QueueReader):
            return delivery.position in reader.held
        return reader is not None and delivery.partition in reader.partitions

    async def reconnected(self, *, anew: bool) -> None:
        """Go on with a new connection; see Stage."""
        for reader in self._readers.values():
            try:
                await reader.reconnected(anew=anew)
            except TransportError as error:
                log.warning("%s: %s", reader.subscription.label, error)
        self._balance_due.set()

    # --- partitions ---

    async def _keep_balance(self) -> None:
        wait_s = min(BALANCE_S, self._settings.lease_s * 0.1)
        while True:
            timer = self._clock.call_later(wait_s, self._balance_due.set)
            await self._balance_due.wait()
            timer.cancel()
            self._balance_due.clear()
            try:
                await self._balance()
            except TransportError as error:
                log.warning("sharing the partitions of %s failed: %s", self._settings.shown, error)

    async def _balance(self) -> None:
        for reader in self._readers.values():
            if isinstance(reader, StreamReader):
                await reader.ownership.step()


class _Route:
    """Where messages of one channel go.

    Attributes:
        number: of the channel. queue: of a Queue's one subscription.
        word: see Reader.
    """

    __slots__ = ("number", "queue", "word")

    def __init__(self, number: int) -> None:
        self.number = number
        self.queue = 0
        self.word = f"c{number}"


class _Rows:
    """Messages, each where its kind of channel is written from.

    Attributes:
        queue: places and envelopes. topic: channels and envelopes.
        stream: (channel, partition) → envelopes.
    """

    __slots__ = ("queue", "stream", "topic")

    def __init__(self) -> None:
        self.queue: tuple[list[int], list[bytes]] = ([], [])
        self.topic: tuple[list[int], list[bytes]] = ([], [])
        self.stream: dict[tuple[int, int], list[bytes]] = defaultdict(list)

    def add(self, staged: Staged, route: _Route) -> None:
        """Add one message."""
        channel, message = staged.channel, staged.message
        event = pack(message)
        if isinstance(channel, Queue):
            urgent = min(max(message.priority, 0), HIGHEST) if channel.priority else 0
            self.queue[0].append(queue_base(route.queue, urgent))
            self.queue[1].append(event)
        elif isinstance(channel, Stream):
            self.stream[route.number, partition_of(message, channel.partitions)].append(event)
        else:
            self.topic[0].append(route.number)
            self.topic[1].append(event)

    def appended(self, at: int) -> tuple[Any, ...]:
        """Return the parameters of PUT_STREAM."""
        places = sorted(self.stream)
        counts = [len(self.stream[place]) for place in places]
        rows: tuple[list[int], list[int], list[int], list[bytes]] = ([], [], [], [])
        for place, count in zip(places, counts, strict=True):
            rows[0].extend([place[0]] * count)
            rows[1].extend([place[1]] * count)
            rows[2].extend(range(count))
            rows[3].extend(self.stream[place])
        return ([channel for channel, _ in places], [partition for _, partition in places], counts, *rows, at)


def _resolve(future: asyncio.Future[None], unit: Unit, error: BaseException | None) -> None:
    """End `future` as a unit ended; an error names what was not sent."""
    if future.done():
        return  # whoever waited was cancelled
    if error is None:
        future.set_result(None)
    elif isinstance(error, TrunklineError):
        fields = {**error.fields, "unsent": list(unit.staged)}
        future.set_exception(type(error)(error.code, error.message, error.hint, **fields))
    else:
        future.set_exception(error)


def _nothing(_unit: Unit, _error: BaseException | None) -> None:
    """Nobody waits: cursors that were not written are written with the next group."""
