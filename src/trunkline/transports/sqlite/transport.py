"""Queue, Topic and Stream in one SQLite file.

Invariant: positions rise in commit order; what this process just committed is handed to its own readers
without reading it back; what another process holds is never touched while that process lives.
Never does: inbox or dead letters (stores/sqlite/store.py). Read next: engine.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial

import apsw

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock, offload
from trunkline.engine import Engine, count_up, query
from trunkline.engines import close_engine, open_engine
from trunkline.errors import ConfigurationError, TransportError
from trunkline.message import pack, partition_of
from trunkline.store import Unit, resolve
from trunkline.tasks import spawn
from trunkline.transport import (
    LIVE,
    Address,
    Backlog,
    Capabilities,
    Delivery,
    Staged,
    Subscription,
)
from trunkline.transports.sqlite.reader import Partition, QueueReader, StreamReader
from trunkline.transports.sqlite.tables import (
    FREE,
    HIGHEST,
    SCHEMA,
    count_backlog,
    give_back,
    hold,
    last_position,
    left_over,
    log_place,
    position_before,
    queue_place,
    trim_log,
)

log = logging.getLogger("trunkline.transport.sqlite")

HOLD_AHEAD = 10_000
"""How many rows beyond the one handed over a process says it may hold, so that it need not say so each time."""


class SqliteTransport:
    """Channels in the file that `address` names."""

    schema = SCHEMA
    owned: tuple[str, ...] = ("trunkline_hold", "trunkline_partition", "trunkline_member")
    capabilities = Capabilities(
        durable=True,
        processes=True,
        priority=True,
        ordered_streams=True,
        description="one SQLite file, WAL, synchronous=FULL; processes of one machine",
    )

    def __init__(self, address: Address, clock: Clock) -> None:
        if not address.path:
            raise ConfigurationError("E206", "sqlite: without a file", "such as sqlite:///shop.db")
        self._path = address.path.removeprefix("/")
        self._options = address.options
        self.clock = clock
        self._routes: dict[str, _Route] = {}
        self._new_routes: list[str] = []
        self._readers: dict[str, QueueReader | StreamReader] = {}
        self._stored: dict[tuple[str, str], QueueReader | StreamReader] = {}
        self._retention: dict[str, float] = {}
        self._counters = (-1, -1)
        self._labels: set[str] = set()
        self._row = 0
        self._now = 0
        self._stale = True
        self._fresh: list[tuple[QueueReader | StreamReader, Delivery]] = []
        self._noted: list[tuple[Partition, int]] = []
        self._advanced: list[tuple[Partition, list[int]]] = []
        self._rebalance_due = True
        self._task: asyncio.Task[None] | None = None
        self.engine: Engine

    async def left_over(self) -> dict[str, int]:
        """Return subscription → what waits for it in the file; not to be started for that, see inspection.py."""
        return await offload(left_over, self._path)

    # --- contract ---

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Open the file, declare what is missing; see Transport."""
        self._loop = asyncio.get_running_loop()
        self.engine = await open_engine(self._path, self.clock, self._options)
        try:
            await self._open(list(channels), list(subscriptions))
        except BaseException:
            await self.stop()
            raise

    async def _open(self, listed: list[Channel], wanted: list[Subscription]) -> None:
        await self.engine.add_stage(self)
        self._party = self.engine.party(self)
        self._take_labels({_exclusive(subscription) for subscription in wanted})
        numbers = await self.engine.run(lambda connection: self._declare(connection, listed, wanted))
        for subscription in wanted:
            kind = StreamReader if isinstance(subscription.channel, Stream) else QueueReader
            reader = kind(self, subscription, *numbers[subscription.label])
            self._readers[subscription.label] = reader
            self._stored[subscription.channel.name, _stored_name(subscription)] = reader
        self._reload_routes()
        await self.engine.sweep()
        await self._rebalance()
        self._task = spawn(self._keep_balance(), self.engine.failed)

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

    def _declare(
        self, connection: apsw.Connection, channels: list[Channel], subscriptions: list[Subscription]
    ) -> dict[str, tuple[int, int]]:
        for channel in channels:
            self._declare_channel(connection, channel)
        count_up(connection, "declared")
        numbers = {}
        for subscription in subscriptions:
            channel_number = self._declare_channel(connection, subscription.channel)
            connection.execute(
                "INSERT INTO trunkline_subscription (channel, name) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (channel_number, _stored_name(subscription)),
            )
            number = query(
                connection,
                "SELECT id FROM trunkline_subscription WHERE channel = ? AND name = ?",
                (channel_number, _stored_name(subscription)),
            )[0][0]
            numbers[subscription.label] = (number, channel_number)
            if isinstance(subscription.channel, Stream):
                self._declare_partitions(connection, number, subscription)
        return numbers

    def _declare_channel(self, connection: apsw.Connection, channel: Channel) -> int:
        partitions = getattr(channel, "partitions", 0)
        connection.execute(
            "INSERT INTO trunkline_channel (name, kind, partitions) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (channel.name, channel.kind, partitions),
        )
        number, kind, existing = query(
            connection, "SELECT id, kind, partitions FROM trunkline_channel WHERE name = ?", (channel.name,)
        )[0]
        if kind != channel.kind or existing != partitions:
            raise ConfigurationError(
                "E207",
                f"{channel.kind} {channel.name!r} with {partitions} partitions exists as {kind} with {existing}",
                "declare it as it exists, or use another name",
            )
        if isinstance(channel, Queue):
            # A queue keeps what is sent before its owner ever runs: its one reader is known from the start.
            connection.execute(
                "INSERT INTO trunkline_subscription (channel, name) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (number, channel.name),
            )
        if isinstance(channel, Stream) and channel.retention_s is not None:
            self._retention[channel.name] = channel.retention_s
        return int(number)

    def _declare_partitions(self, connection: apsw.Connection, number: int, subscription: Subscription) -> None:
        channel = subscription.channel
        assert isinstance(channel, Stream)  # noqa: S101 - for the type checker
        begin = 0
        if subscription.start != "earliest":
            (channel_number,) = query(
                connection, "SELECT channel FROM trunkline_subscription WHERE id = ?", (number,)
            )[0]  # fmt: skip
            begin = last_position(connection, channel_number)
            if subscription.since_s is not None:
                begin = position_before(connection, channel_number, begin, subscription.since_s)
        for partition in range(channel.partitions):
            connection.execute(
                "INSERT INTO trunkline_partition VALUES (?, ?, ?, NULL, 0) ON CONFLICT DO NOTHING",
                (number, partition, begin),
            )

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Commit `batch`; see Transport."""
        return self._commit((), batch)

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what is ready for `subscription`; see Transport."""
        return await self._readers[subscription.label].receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge `deliveries`, for a Store in another database; see Transport."""
        await self._commit(deliveries, ())

    def _commit(self, deliveries: Sequence[Delivery], staged: Sequence[Staged]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self.engine.submit(self._party, Unit(deliveries, partial(resolve, future), "", staged))
        return future

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process reads `partition`; see Transport."""
        reader = self._readers[subscription.label]
        return isinstance(reader, StreamReader) and partition in reader.partitions

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes with the partitions read here; see Transport."""
        return self._readers[subscription.label].assignment

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport."""
        reader = self._readers[subscription.label]
        return count_backlog(self.engine.reader, reader.number, stream=isinstance(reader, StreamReader))

    async def tidy(self) -> None:
        """Remove log rows older than their Stream's retention; see Transport."""
        now = self.clock.now()
        for name, retention_s in self._retention.items():
            route = self._routes.get(name)
            if route is not None:
                await self.engine.run(partial(trim_log, channel=route.number, before=int(now - retention_s)))

    async def drain(self) -> None:
        """Stop handing out; see Transport."""
        for reader in self._readers.values():
            reader.drain()

    async def stop(self) -> None:
        """Give back what is held and close; see Transport."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.engine.failure is None:
            await self.engine.run(self._give_back)
        self.engine.labels -= self._labels
        if self in self.engine.stages:
            self.engine.remove_stage(self)
        await close_engine(self.engine)

    def _give_back(self, connection: apsw.Connection) -> None:
        for reader in self._readers.values():
            if isinstance(reader, StreamReader):
                reader.mark_suspects(connection)
        give_back(connection, self.engine.process, {reader.number for reader in self._readers.values()})

    # --- stage of the engine's group ---

    def apply(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        """Write the messages that `units` send and remove those that they settle; leave no trace if that fails."""
        noted = self._marks()
        try:
            self._write(connection, units)
        except BaseException:
            self._take_back(*noted)
            raise

    def _marks(self) -> tuple[int, int, int, int]:
        return len(self._fresh), len(self._noted), len(self._advanced), len(self._new_routes)

    def _write(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        if self._stale or self.engine.places_for is not self:
            self._read_positions(connection)
        self._now = int(self.clock.now())
        self._place_all(connection, units)
        self._settle_all(connection, units)

    def _read_positions(self, connection: apsw.Connection) -> None:
        """Learn where the file goes on: somebody else may have written."""
        self._row = query(connection, "SELECT value FROM trunkline_counter WHERE name = 'row'")[0][0]
        for route in self._routes.values():
            route.position = None
        self._stale = False
        self.engine.places_for = self

    def _place_all(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        log_rows: list[tuple[int, int, int, bytes]] = []
        queue_rows: list[tuple[int, int, bytes]] = []
        for unit in units:
            for staged in unit.staged:
                if staged.due is None:
                    self._place(connection, staged, log_rows, queue_rows)
        if log_rows:
            connection.executemany("INSERT INTO trunkline_log VALUES (?, ?, ?, ?)", log_rows)
        if queue_rows:
            connection.executemany("INSERT INTO trunkline_queue VALUES (?, ?, 0, ?)", queue_rows)
            connection.execute("UPDATE trunkline_counter SET value = ? WHERE name = 'row'", (self._row,))

    def _settle_all(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        gone: list[tuple[int]] = []
        touched: set[Partition] = set()
        for unit in units:
            for delivery in unit.deliveries:
                if delivery.row != LIVE:
                    continue
                reader = self._readers.get(delivery.subscription.label)
                if isinstance(reader, StreamReader):
                    state = reader.partitions.get(delivery.partition)
                    if state is not None:
                        state.done.add(delivery.position)
                        self._noted.append((state, delivery.position))
                        touched.add(state)
                else:
                    gone.append((delivery.position,))
        if gone:
            connection.executemany("DELETE FROM trunkline_queue WHERE place = ?", gone)
        if touched:
            self._advance(connection, touched)

    def _place(
        self,
        connection: apsw.Connection,
        staged: Staged,
        log_rows: list[tuple[int, int, int, bytes]],
        queue_rows: list[tuple[int, int, bytes]],
    ) -> None:
        channel, message = staged.channel, staged.message
        route = self._routes.get(channel.name)
        if route is None:
            route = self._new_route(connection, channel)
        event = pack(message)
        key = message.partitionkey
        if isinstance(channel, Stream):
            if route.position is None:
                route.position = last_position(connection, route.number)
            position = route.position = route.position + 1
            partition = partition_of(message, channel.partitions)
            log_rows.append((log_place(route.number, position), partition, self._now, event))
            for stream_reader in route.readers:
                fresh = Delivery(
                    stream_reader.subscription, message, None, key, position, partition, fresh=staged.fresh
                )  # fmt: skip
                self._fresh.append((stream_reader, fresh))
            return
        urgent = isinstance(channel, Queue) and channel.priority
        priority = min(max(message.priority, 0), HIGHEST) if urgent else 0
        for number, reader in route.queues:
            self._row += 1
            place = queue_place(number, priority, self._row)
            holder = FREE
            if reader is not None and reader.takes_fresh():
                holder += self.engine.process
                reader.held += 1
                if place > reader.high:
                    reader.high = place + HOLD_AHEAD
                    hold(connection, self.engine.process, number, reader.high)
                fresh = Delivery(reader.subscription, message, None, key, place, fresh=staged.fresh)
                self._fresh.append((reader, fresh))
            elif reader is not None:
                reader.behind = True
            queue_rows.append((place, holder, event))

    def _advance(self, connection: apsw.Connection, touched: set[Partition]) -> None:
        rows = []
        for state in touched:
            passed: list[int] = []
            while state.pending and state.pending[0] in state.done:
                passed.append(state.pending.popleft())
            if passed:
                state.done.difference_update(passed)
                self._advanced.append((state, passed))
                rows.append((passed[-1], state.subscription_number, state.number))
        if rows:
            connection.executemany(
                "UPDATE trunkline_partition SET position = ? WHERE subscription = ? AND partition = ?", rows
            )

    def committed(self, units: Sequence[Unit]) -> None:
        """Hand over what was just committed and give room for more."""
        self._new_routes.clear()
        self._advanced.clear()
        self._noted.clear()
        fresh, self._fresh = self._fresh, []
        for reader, delivery in fresh:
            reader.take_fresh(delivery)
        for unit in units:
            for delivery in unit.deliveries:
                if delivery.row == LIVE:
                    self._readers[delivery.subscription.label].settled()

    def aborted(self) -> None:
        """Take back what `apply` noted: the group was undone."""
        self._take_back(0, 0, 0, 0)

    def _take_back(self, fresh: int, noted: int, advanced: int, routes: int) -> None:
        """Forget what was noted after those marks."""
        self._stale = True
        for name in self._new_routes[routes:]:
            self._routes.pop(name, None)  # its number was undone with it
        del self._new_routes[routes:]
        for reader, _ in self._fresh[fresh:]:
            if isinstance(reader, QueueReader):
                reader.held -= 1
        del self._fresh[fresh:]
        for kept in self._readers.values():
            if isinstance(kept, QueueReader):
                kept.look_again()
        for state, passed in reversed(self._advanced[advanced:]):
            state.pending.extendleft(reversed(passed))
            state.done.update(passed)
        del self._advanced[advanced:]
        for state, position in self._noted[noted:]:
            state.done.discard(position)
        del self._noted[noted:]

    def foreign_change(self) -> None:
        """Another process committed: there may be messages, subscriptions, members."""
        self._stale = True
        self._rebalance_due = True
        declared, returned = self._counters
        self._counters = self.engine.counter("declared"), self.engine.counter("returned")
        if declared != self._counters[0]:
            self._reload_routes()
        for reader in self._readers.values():
            if returned != self._counters[1] and isinstance(reader, QueueReader):
                reader.look_again()
            reader.behind = True
            reader.wake()

    def release(self, connection: apsw.Connection, process: int) -> None:
        """Give back what a dead process held, as suspect."""
        give_back(connection, process)

    # --- routes and partitions ---

    def _reload_routes(self) -> None:
        reader = self.engine.reader
        subscriptions: dict[int, list[tuple[int, str]]] = {}
        for number, channel, name in reader.execute("SELECT id, channel, name FROM trunkline_subscription"):
            subscriptions.setdefault(channel, []).append((number, name))
        self._routes = {
            name: self._route(number, name, subscriptions.get(number, []), kind)
            for number, name, kind in reader.execute("SELECT id, name, kind FROM trunkline_channel")
        }

    def _route(self, number: int, name: str, subscriptions: list[tuple[int, str]], kind: str) -> _Route:
        local = {stored: self._stored.get((name, stored)) for _, stored in subscriptions}
        route = _Route(number)
        if kind == "stream":
            route.readers = [reader for reader in local.values() if isinstance(reader, StreamReader)]
        else:
            for sub_number, sub in subscriptions:
                reader = local[sub]
                route.queues.append((sub_number, reader if isinstance(reader, QueueReader) else None))
        return route

    def _new_route(self, connection: apsw.Connection, channel: Channel) -> _Route:
        route = _Route(self._declare_channel(connection, channel))
        count_up(connection, "declared")
        subscriptions = "SELECT id FROM trunkline_subscription WHERE channel = ?"
        if not isinstance(channel, Stream):
            route.queues = [(row[0], None) for row in query(connection, subscriptions, (route.number,))]
        self._routes[channel.name] = route
        self._new_routes.append(channel.name)
        return route

    async def _keep_balance(self) -> None:
        while True:
            await self.clock.sleep(0.2)
            waiting = any(isinstance(r, StreamReader) and r.leaving for r in self._readers.values())
            if self._rebalance_due or waiting:
                try:
                    await self._rebalance()
                except TransportError as error:
                    self._rebalance_due = True
                    log.warning("sharing the partitions of %s failed: %s", self._path, error)

    async def _rebalance(self) -> None:
        """Share the partitions of each Stream among the processes that read it."""
        self._rebalance_due = False
        for reader in self._readers.values():
            if isinstance(reader, StreamReader) and reader.unbalanced():
                reader.rebalanced(*await self.engine.run(reader.rebalance))


class _Route:
    """Where messages of one channel go: readers of a Stream here, or a queue row per subscription.

    Attributes:
        position: of a Stream, the last one given; None if it is to be read from the file.
    """

    __slots__ = ("number", "position", "queues", "readers")

    def __init__(self, number: int) -> None:
        self.number = number
        self.position: int | None = None
        self.readers: list[StreamReader] = []
        self.queues: list[tuple[int, QueueReader | None]] = []


def _exclusive(subscription: Subscription) -> str:
    """What one App of a process has for itself: its subscription, of a Queue all of it, for that has one owner."""
    channel = subscription.channel
    return f"queue {channel.name!r}" if isinstance(channel, Queue) else subscription.label


def _stored_name(subscription: Subscription) -> str:
    """A Queue has one owner, known or not when the first message comes: its row carries the queue's name."""
    return subscription.channel.name if isinstance(subscription.channel, Queue) else subscription.name
