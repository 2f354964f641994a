"""Queue, Topic and Stream in one SQLite file.

Invariant: positions rise in commit order; what this process just committed is handed to its own readers
without reading it back; what another process holds is never touched while that process lives.
Never does: inbox or dead letters (stores/sqlite.py). Read next: engine.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from zlib import crc32

import apsw

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.engine import Engine, close_engine, open_engine
from trunkline.errors import ConfigurationError, TransportError
from trunkline.message import pack
from trunkline.outcome import ACK
from trunkline.store import Unit
from trunkline.transport import (
    LIVE,
    Address,
    Backlog,
    Capabilities,
    Delivery,
    Staged,
    Subscription,
)

log = logging.getLogger("trunkline.transport.sqlite")

BUFFER = 1000
"""Most messages one subscription holds in memory, handed out or not."""
KEEP_LOCAL = 256
"""Queue messages handed to a reader of the same process while it has fewer than these; the rest is for all."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trunkline_channel (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, partitions INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS trunkline_subscription (
    id INTEGER PRIMARY KEY, channel INTEGER NOT NULL, name TEXT NOT NULL, UNIQUE (channel, name)
);
CREATE TABLE IF NOT EXISTS trunkline_log (
    position INTEGER PRIMARY KEY, channel INTEGER NOT NULL, partition INTEGER NOT NULL, at INTEGER NOT NULL,
    event BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS trunkline_log_channel ON trunkline_log (channel, position);
CREATE TABLE IF NOT EXISTS trunkline_queue (
    position INTEGER PRIMARY KEY, subscription INTEGER NOT NULL, priority INTEGER NOT NULL, owner INTEGER,
    suspect INTEGER NOT NULL, event BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS trunkline_queue_ready
    ON trunkline_queue (subscription, priority DESC, position) WHERE owner IS NULL;
CREATE INDEX IF NOT EXISTS trunkline_queue_owned ON trunkline_queue (owner) WHERE owner IS NOT NULL;
CREATE TABLE IF NOT EXISTS trunkline_partition (
    subscription INTEGER NOT NULL, partition INTEGER NOT NULL, position INTEGER NOT NULL, owner INTEGER,
    suspect INTEGER NOT NULL, PRIMARY KEY (subscription, partition)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS trunkline_member (
    subscription INTEGER NOT NULL, process INTEGER NOT NULL, PRIMARY KEY (subscription, process)
) WITHOUT ROWID;
"""


class SqliteTransport:
    """Channels in the file that `address` names."""

    schema = _SCHEMA
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
        self._vfs = address.options.get("vfs")
        self._clock = clock
        self._routes: dict[str, _Route] = {}
        self._readers: dict[str, _QueueReader | _StreamReader] = {}
        self._stored: dict[tuple[str, str], _QueueReader | _StreamReader] = {}
        self._next = 0
        self._now = 0
        self._stale = True
        self._fresh: list[tuple[_QueueReader | _StreamReader, Delivery]] = []
        self._advanced: list[tuple[_Partition, list[int]]] = []
        self._rebalance_due = True
        self._task: asyncio.Task[None] | None = None
        self.engine: Engine

    # --- contract ---

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Open the file, declare what is missing; see Transport."""
        self.engine = await open_engine(self._path, self._clock, self._vfs)
        await self.engine.add_stage(self)
        wanted = list(subscriptions)
        listed = list(channels)
        numbers = await self.engine.run(lambda connection: self._declare(connection, listed, wanted))
        for subscription in wanted:
            kind = _StreamReader if isinstance(subscription.channel, Stream) else _QueueReader
            reader = kind(self, subscription, *numbers[subscription.label])
            self._readers[subscription.label] = reader
            self._stored[subscription.channel.name, _stored_name(subscription)] = reader
        self._reload_routes()
        await self.engine.sweep()
        await self._rebalance()
        self._task = asyncio.create_task(self._keep_balance())

    def _declare(
        self, connection: apsw.Connection, channels: list[Channel], subscriptions: list[Subscription]
    ) -> dict[str, tuple[int, int]]:
        for channel in channels:
            self._declare_channel(connection, channel)
        numbers = {}
        for subscription in subscriptions:
            channel_number = self._declare_channel(connection, subscription.channel)
            connection.execute(
                "INSERT INTO trunkline_subscription (channel, name) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (channel_number, _stored_name(subscription)),
            )
            number = connection.execute(
                "SELECT id FROM trunkline_subscription WHERE channel = ? AND name = ?",
                (channel_number, _stored_name(subscription)),
            ).fetchall()[0][0]
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
        number, kind, existing = connection.execute(
            "SELECT id, kind, partitions FROM trunkline_channel WHERE name = ?", (channel.name,)
        ).fetchall()[0]
        if kind != channel.kind or existing != partitions:
            raise ConfigurationError(
                "E207",
                f"{channel.kind} {channel.name!r} with {partitions} partitions exists as {kind} with {existing}",
                "declare it as it exists, or use another name",
            )
        return int(number)

    def _declare_partitions(self, connection: apsw.Connection, number: int, subscription: Subscription) -> None:
        channel = subscription.channel
        assert isinstance(channel, Stream)  # noqa: S101 - for the type checker
        begin = 0
        if subscription.start == "latest":
            begin = connection.execute("SELECT value FROM trunkline_counter WHERE name = 'position'").fetchall()[0][0]
        for partition in range(channel.partitions):
            connection.execute(
                "INSERT INTO trunkline_partition VALUES (?, ?, ?, NULL, 0) ON CONFLICT DO NOTHING",
                (number, partition, begin),
            )

    async def send(self, batch: Sequence[Staged]) -> None:
        """Commit `batch`; see Transport."""
        await self._commit(Unit((), _ignore), batch)

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what is ready for `subscription`; see Transport."""
        return await self._readers[subscription.label].receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge `deliveries`, for a Store in another database; see Transport."""
        await self._commit(Unit(deliveries, _ignore), ())

    def _commit(self, unit: Unit, batch: Sequence[Staged]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(_unit: Unit, error: BaseException | None) -> None:
            if future.done():
                return  # whoever waited was cancelled
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        unit.done = done
        unit.staged = batch
        self.engine.submit(unit)
        return future

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process reads `partition`; see Transport."""
        reader = self._readers[subscription.label]
        return isinstance(reader, _StreamReader) and partition in reader.partitions

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes with the partitions read here; see Transport."""
        return self._readers[subscription.label].assignment

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport."""
        reader = self._readers[subscription.label]
        return count_backlog(self.engine.reader, reader.number, stream=isinstance(reader, _StreamReader))

    async def drain(self) -> None:
        """Stop handing out; see Transport."""
        for reader in self._readers.values():
            reader.drain()

    async def stop(self) -> None:
        """Give back what is held and close; see Transport."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        process = self.engine.process
        if self.engine.failure is None:
            await self.engine.run(lambda connection: self._give_back(connection, process, suspect=False))
        self.engine.stages.remove(self)
        await close_engine(self.engine)

    # --- stage of the engine's group ---

    def apply(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        """Write the messages that `units` send and remove those that they settle."""
        if self._stale:
            self._next = connection.execute("SELECT value FROM trunkline_counter WHERE name = 'position'").fetchall()[0][0]
            self._stale = False
        self._now = int(self._clock.now())
        first = self._next
        log_rows: list[tuple[int, int, int, int, bytes]] = []
        queue_rows: list[tuple[int, int, int, int | None, bytes]] = []
        gone: list[tuple[int]] = []
        touched: set[_Partition] = set()
        for unit in units:
            for staged in unit.staged:
                if staged.due is None:
                    self._place(connection, staged, log_rows, queue_rows)
            for delivery in unit.deliveries:
                if delivery.row != LIVE:
                    continue
                reader = self._readers.get(delivery.subscription.label)
                if isinstance(reader, _StreamReader):
                    state = reader.partitions.get(delivery.partition)
                    if state is not None:
                        state.done.add(delivery.position)
                        touched.add(state)
                else:
                    gone.append((delivery.position,))
        if log_rows:
            connection.executemany("INSERT INTO trunkline_log VALUES (?, ?, ?, ?, ?)", log_rows)
        if queue_rows:
            connection.executemany("INSERT INTO trunkline_queue VALUES (?, ?, ?, ?, 0, ?)", queue_rows)
        if gone:
            connection.executemany("DELETE FROM trunkline_queue WHERE position = ?", gone)
        if touched:
            self._advance(connection, touched)
        if self._next != first:
            connection.execute("UPDATE trunkline_counter SET value = ? WHERE name = 'position'", (self._next,))

    def _place(
        self,
        connection: apsw.Connection,
        staged: Staged,
        log_rows: list[tuple[int, int, int, int, bytes]],
        queue_rows: list[tuple[int, int, int, int | None, bytes]],
    ) -> None:
        channel, message = staged.channel, staged.message
        route = self._routes.get(channel.name)
        if route is None:
            route = self._new_route(connection, channel)
        event = pack(message)
        key = message.partitionkey
        if isinstance(channel, Stream):
            position = self._next = self._next + 1
            partition = crc32((key or message.id).encode()) % channel.partitions
            log_rows.append((position, route.number, partition, self._now, event))
            for reader in route.readers:
                self._fresh.append((reader, Delivery(reader.subscription, message, None, key, position, partition)))
            return
        priority = min(max(message.priority, 0), 9) if isinstance(channel, Queue) and channel.priority else 0
        for number, reader in route.queues:
            position = self._next = self._next + 1
            owner = None
            if reader is not None and reader.takes_fresh():
                owner = self.engine.process
                reader.held += 1
                self._fresh.append((reader, Delivery(reader.subscription, message, None, key, position)))
            elif reader is not None:
                reader.behind = True
            queue_rows.append((position, number, priority, owner, event))

    def _advance(self, connection: apsw.Connection, touched: set[_Partition]) -> None:
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
        self._advanced.clear()
        fresh, self._fresh = self._fresh, []
        for reader, delivery in fresh:
            reader.take_fresh(delivery)
        for unit in units:
            for delivery in unit.deliveries:
                if delivery.row == LIVE:
                    self._readers[delivery.subscription.label].settled()

    def aborted(self) -> None:
        """Take back what `apply` noted: the group was undone."""
        self._stale = True
        for reader, _ in self._fresh:
            if isinstance(reader, _QueueReader):
                reader.held -= 1
        self._fresh.clear()
        for state, passed in reversed(self._advanced):
            state.pending.extendleft(reversed(passed))
        self._advanced.clear()
        for reader in self._readers.values():
            if isinstance(reader, _StreamReader):
                for state in reader.partitions.values():
                    state.done.clear()

    def foreign_change(self) -> None:
        """Another process committed: there may be messages, subscriptions, members."""
        self._stale = True
        self._rebalance_due = True
        self._reload_routes()
        for reader in self._readers.values():
            reader.behind = True
            reader.wake()

    def release(self, connection: apsw.Connection, process: int) -> None:
        """Give back what a dead process held, as suspect."""
        self._give_back(connection, process, suspect=True)

    def _give_back(self, connection: apsw.Connection, process: int, *, suspect: bool) -> None:
        connection.execute(
            "UPDATE trunkline_queue SET owner = NULL, suspect = max(suspect, ?) WHERE owner = ?", (suspect, process)
        )
        connection.execute(
            "UPDATE trunkline_partition SET owner = NULL, suspect = max(suspect, ?) WHERE owner = ?", (suspect, process)
        )
        connection.execute("DELETE FROM trunkline_member WHERE process = ?", (process,))

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
            route.readers = [reader for reader in local.values() if isinstance(reader, _StreamReader)]
        else:
            for sub_number, sub in subscriptions:
                reader = local[sub]
                route.queues.append((sub_number, reader if isinstance(reader, _QueueReader) else None))
        return route

    def _new_route(self, connection: apsw.Connection, channel: Channel) -> _Route:
        route = _Route(self._declare_channel(connection, channel))
        if isinstance(channel, Queue):
            # A queue keeps what was sent before its owner ever ran: the owner's number is made now.
            connection.execute(
                "INSERT INTO trunkline_subscription (channel, name) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (route.number, channel.name),
            )
            route.queues = [
                (row[0], None)
                for row in connection.execute(
                    "SELECT id FROM trunkline_subscription WHERE channel = ?", (route.number,)
                ).fetchall()
            ]
        self._routes[channel.name] = route
        return route

    async def _keep_balance(self) -> None:
        while True:
            await self._clock.sleep(0.2)
            waiting = any(isinstance(r, _StreamReader) and r.leaving for r in self._readers.values())
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
            if isinstance(reader, _StreamReader) and reader.unbalanced():
                reader.rebalanced(*await self.engine.run(reader.rebalance))


class _Route:
    """Where messages of one channel go: readers of a Stream here, or a queue row per subscription."""

    __slots__ = ("number", "queues", "readers")

    def __init__(self, number: int) -> None:
        self.number = number
        self.readers: list[_StreamReader] = []
        self.queues: list[tuple[int, _QueueReader | None]] = []


class _Reader:
    """What the readers of this process share: a buffer and someone who may be waiting for it."""

    def __init__(self, transport: SqliteTransport, subscription: Subscription, number: int, channel: int) -> None:
        self.transport = transport
        self.subscription = subscription
        self.number = number
        self.channel = channel
        self.buffer: deque[Delivery] = deque()
        self.held = 0
        self.behind = True
        self.draining = False
        self.assignment = 0
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let `receive` look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def drain(self) -> None:
        """Hand out nothing more."""
        self.draining = True

    def settled(self) -> None:
        """One delivery is done."""
        self.held -= 1
        if self.behind:
            self.wake()

    async def receive(self, limit: int) -> list[Delivery]:
        """Return 1 to `limit` deliveries."""
        while True:
            if not self.draining:
                if self.behind and not self.buffer and self.held < BUFFER:
                    await self.load(min(limit, BUFFER - self.held))
                if self.buffer:
                    buffer = self.buffer
                    return [buffer.popleft() for _ in range(min(limit, len(buffer)))]
                if self.behind and self.held < BUFFER:
                    await asyncio.sleep(0)  # others first; there is more to read
                    continue
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def load(self, limit: int) -> None:
        """Fill the buffer from the file."""
        raise NotImplementedError


class _QueueReader(_Reader):
    """Reader of a Queue or of one subscription of a Topic."""

    def takes_fresh(self) -> bool:
        """Return whether a message being written now is handed over directly."""
        return not (self.behind or self.draining) and self.held < KEEP_LOCAL

    def take_fresh(self, delivery: Delivery) -> None:
        """Buffer what was just committed for this process."""
        self.buffer.append(delivery)
        self.wake()

    async def load(self, limit: int) -> None:
        """Claim up to `limit` waiting messages."""
        self.behind = False
        engine = self.transport.engine
        if not engine.reader.execute(
            "SELECT 1 FROM trunkline_queue WHERE subscription = ? AND owner IS NULL LIMIT 1", (self.number,)
        ).fetchall():
            return
        rows = await engine.run(lambda connection: self._claim(connection, limit))
        if len(rows) == limit:
            self.behind = True
        self.held += len(rows)
        for _, position, suspect, event in sorted(rows):
            self.buffer.append(
                Delivery(self.subscription, None, event, None, position, suspect=bool(suspect))
            )

    def _claim(self, connection: apsw.Connection, limit: int) -> list[tuple[int, int, int, bytes]]:
        return connection.execute(
            "UPDATE trunkline_queue SET owner = ? WHERE position IN (SELECT position FROM trunkline_queue"
            " WHERE subscription = ? AND owner IS NULL ORDER BY priority DESC, position LIMIT ?)"
            " RETURNING -priority, position, suspect, event",
            (self.transport.engine.process, self.number, limit),
        ).fetchall()  # type: ignore[return-value]


class _Partition:
    """One partition that this process reads.

    Attributes:
        pending: positions handed out and not yet passed by the committed position, in order.
        done: of these, the settled ones.
        read: up to where it was handed out.
        suspects: how many of the next messages may have been in a handler when a process died.
    """

    __slots__ = ("done", "number", "pending", "read", "subscription_number", "suspects")

    def __init__(self, subscription_number: int, number: int, position: int, suspects: int) -> None:
        self.subscription_number = subscription_number
        self.number = number
        self.pending: deque[int] = deque()
        self.done: set[int] = set()
        self.read = position
        self.suspects = suspects


class _StreamReader(_Reader):
    """Reader of the partitions of a Stream that this process owns."""

    def __init__(self, transport: SqliteTransport, subscription: Subscription, number: int, channel: int) -> None:
        super().__init__(transport, subscription, number, channel)
        self.partitions: dict[int, _Partition] = {}
        self.leaving: set[int] = set()
        self._scan = 0
        self._members: list[int] = []

    def take_fresh(self, delivery: Delivery) -> None:
        """Buffer what was just committed, if everything before it was handed out."""
        if self.behind or self.draining:
            return
        state = self.partitions.get(delivery.partition)
        if state is None or delivery.partition in self.leaving:
            self._scan = delivery.position
        elif self.held >= BUFFER:
            self.behind = True
        elif delivery.position > state.read:
            self._scan = delivery.position
            self._hand_out(state, delivery)
            self.wake()

    def _hand_out(self, state: _Partition, delivery: Delivery) -> None:
        state.read = delivery.position
        state.pending.append(delivery.position)
        if state.suspects:
            state.suspects -= 1
            delivery.suspect = True
        self.held += 1
        self.buffer.append(delivery)

    async def load(self, limit: int) -> None:
        """Read on in the log; rows of partitions that others own are passed over."""
        self.behind = False
        rows = self.transport.engine.reader.execute(
            "SELECT position, partition, event FROM trunkline_log WHERE channel = ? AND position > ?"
            " ORDER BY position LIMIT ?",
            (self.channel, self._scan, limit),
        ).fetchall()
        if len(rows) == limit:
            self.behind = True
        for position, partition, event in rows:
            self._scan = position
            state = self.partitions.get(partition)
            if state is not None and partition not in self.leaving and position > state.read:
                self._hand_out(state, Delivery(self.subscription, None, event, None, position, partition))

    # --- sharing partitions with other processes ---

    def _target(self, members: list[int]) -> set[int]:
        assert isinstance(self.subscription.channel, Stream)  # noqa: S101 - for the type checker
        mine = self.transport.engine.process
        if mine not in members:
            return set()
        place = members.index(mine)
        return {n for n in range(self.subscription.channel.partitions) if n % len(members) == place}

    def _read_members(self, connection: apsw.Connection) -> list[int]:
        return [
            row[0]
            for row in connection.execute(
                "SELECT process FROM trunkline_member WHERE subscription = ? ORDER BY process", (self.number,)
            )
        ]

    def unbalanced(self) -> bool:
        """Return whether partitions are to be taken or given up."""
        members = self._read_members(self.transport.engine.reader)
        target = self._target(members)
        return self.transport.engine.process not in members or target != set(self.partitions)

    def rebalance(self, connection: apsw.Connection) -> tuple[list[tuple[int, int, int]], list[int], set[int]]:
        """Take free partitions of our share, give up those of others that are finished."""
        mine = self.transport.engine.process
        connection.execute("INSERT OR IGNORE INTO trunkline_member VALUES (?, ?)", (self.number, mine))
        target = self._target(self._read_members(connection))
        leaving = set(self.partitions) - target
        # Only those that were already leaving: what is still being handed out cannot be in them.
        released = [n for n in leaving & self.leaving if not self.partitions[n].pending]
        for number in released:
            connection.execute(
                "UPDATE trunkline_partition SET owner = NULL WHERE subscription = ? AND partition = ?",
                (self.number, number),
            )
        acquired = []
        for number in target - set(self.partitions):
            rows = connection.execute(
                "SELECT position, suspect FROM trunkline_partition WHERE subscription = ? AND partition = ?"
                " AND (owner IS NULL OR owner = ?)",
                (self.number, number, mine),
            ).fetchall()
            for position, suspect in rows:
                acquired.append((number, position, suspect))
                connection.execute(
                    "UPDATE trunkline_partition SET owner = ?, suspect = 0 WHERE subscription = ? AND partition = ?",
                    (mine, self.number, number),
                )
        return acquired, released, leaving

    def rebalanced(self, acquired: list[tuple[int, int, int]], released: list[int], leaving: set[int]) -> None:
        """Note what was committed."""
        for number in released:
            del self.partitions[number]
        self.leaving = leaving - set(released)
        for number, position, suspect in acquired:
            self.partitions[number] = _Partition(self.number, number, position, BUFFER if suspect else 0)
            self._scan = min(self._scan, position)
        if acquired or released:
            self.assignment += 1
            self.behind = True
            self.wake()


def _stored_name(subscription: Subscription) -> str:
    """A Queue has one owner, known or not when the first message comes: its row carries the queue's name."""
    return subscription.channel.name if isinstance(subscription.channel, Queue) else subscription.name


def _ignore(_unit: Unit, _error: BaseException | None) -> None:
    """Stand in until the future is there."""


def count_backlog(connection: apsw.Connection, number: int, *, stream: bool) -> Backlog:
    """Count what waits for the subscription of that number."""
    if stream:
        waiting = connection.execute(
            "SELECT count(*) FROM trunkline_partition p JOIN trunkline_subscription s ON s.id = p.subscription"
            " JOIN trunkline_log l ON l.channel = s.channel AND l.partition = p.partition AND l.position > p.position"
            " WHERE s.id = ?",
            (number,),
        ).fetchall()[0][0]
        return Backlog(waiting)
    waiting, free = connection.execute(
        "SELECT count(*), count(*) FILTER (WHERE owner IS NULL) FROM trunkline_queue WHERE subscription = ?",
        (number,),
    ).fetchall()[0]
    return Backlog(waiting, waiting - free)
