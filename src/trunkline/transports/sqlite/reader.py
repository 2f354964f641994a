"""What one process reads of one subscription in the file: queue rows it claimed, partitions it owns.

Invariant: a partition's committed position passes only what is settled; a partition leaves this process only
when nothing of it is under way. Never does: write messages (transport.py). Read next: ../../consumer.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

import apsw

from trunkline.channel import Stream
from trunkline.engine import query
from trunkline.transport import Delivery, Subscription
from trunkline.transports.sqlite.tables import claim, has_free, hold, queue_range, read_log

if TYPE_CHECKING:
    from trunkline.transports.sqlite.transport import SqliteTransport

BUFFER = 1000
"""Most messages one subscription holds in memory, handed out or not."""
KEEP_LOCAL = 500
"""Queue messages handed to a reader of the same process while it has fewer than these; the rest is for all."""


class Reader:
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
        self._told = 0
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
        """Return 1 to `limit` deliveries, or none when other partitions are read here than before."""
        while True:
            if self._told != self.assignment:
                self._told = self.assignment
                return []
            if not self.draining:
                if self.behind and not self.buffer and self.held < BUFFER:
                    self.behind = False
                    try:
                        await self.load(min(limit, BUFFER - self.held))
                    except BaseException:
                        self.behind = True
                        raise
                if self.buffer:
                    buffer = self.buffer
                    return [buffer.popleft() for _ in range(min(limit, len(buffer)))]
                if self.behind and self.held < BUFFER:
                    await self.transport.clock.sleep(0)  # others first; there is more to read
                    continue
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def load(self, limit: int) -> None:
        """Fill the buffer from the file."""
        raise NotImplementedError


class QueueReader(Reader):
    """Reader of a Queue or of one subscription of a Topic.

    Attributes:
        high: place up to which the file says that this process may hold rows.
    """

    def __init__(self, transport: SqliteTransport, subscription: Subscription, number: int, channel: int) -> None:
        super().__init__(transport, subscription, number, channel)
        self._ordered = not getattr(subscription.channel, "priority", False)
        self.look_again()

    def look_again(self) -> None:
        """Begin with the first row again: rows may have been given back, or what was noted was undone."""
        self.high = 0
        self._scan = queue_range(self.number)[0]

    def takes_fresh(self) -> bool:
        """Return whether a message being written now is handed over directly."""
        return not (self.behind or self.draining) and self.held < KEEP_LOCAL

    def take_fresh(self, delivery: Delivery) -> None:
        """Buffer what was just committed for this process."""
        self.buffer.append(delivery)
        self.wake()

    async def load(self, limit: int) -> None:
        """Claim up to `limit` waiting messages."""
        engine = self.transport.engine
        if not has_free(engine.reader, self.number, self._scan):
            # Where another process gives this queue priorities, rows come before those taken last.
            self.look_again()
            if not has_free(engine.reader, self.number, self._scan):
                return
        rows = await engine.run(lambda connection: self._claim(connection, limit))
        if len(rows) == limit:
            self.behind = True
        self.held += len(rows)
        for place, suspect, event in rows:
            self.buffer.append(Delivery(self.subscription, None, event, None, place, suspect=bool(suspect)))

    def _claim(self, connection: apsw.Connection, limit: int) -> list[tuple[int, int, bytes]]:
        process = self.transport.engine.process
        rows = claim(connection, self.number, self._scan, process, limit)
        if rows:
            last = rows[-1][0]
            if last > self.high:
                self.high = last
                hold(connection, process, self.number, last)
            if self._ordered:
                self._scan = last  # nothing free is left before it, and nothing comes there but what is given back
        return rows


class Partition:
    """One partition that this process reads.

    Attributes:
        pending: positions handed out and not yet passed by the committed position, in order.
        done: of these, the settled ones.
        read: up to where it was handed out.
        suspects: how many of the next messages may have been in a handler when a process died.
        last_suspect: position of the last one that was handed out.
    """

    __slots__ = ("done", "last_suspect", "number", "pending", "read", "subscription_number", "suspects")

    def __init__(self, subscription_number: int, number: int, position: int, suspects: int) -> None:
        self.subscription_number = subscription_number
        self.number = number
        self.pending: deque[int] = deque()
        self.done: set[int] = set()
        self.read = position
        self.suspects = suspects
        self.last_suspect = -1

    def has_suspects(self) -> bool:
        """Return whether suspects are still to come or not yet passed: whoever reads on must know."""
        return self.suspects > 0 or (bool(self.pending) and self.pending[0] <= self.last_suspect)


class StreamReader(Reader):
    """Reader of the partitions of a Stream that this process owns."""

    def __init__(self, transport: SqliteTransport, subscription: Subscription, number: int, channel: int) -> None:
        super().__init__(transport, subscription, number, channel)
        self.partitions: dict[int, Partition] = {}
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

    def _hand_out(self, state: Partition, delivery: Delivery) -> None:
        state.read = delivery.position
        state.pending.append(delivery.position)
        if state.suspects and not delivery.fresh:
            state.suspects -= 1
            state.last_suspect = delivery.position
            delivery.suspect = True
        self.held += 1
        self.buffer.append(delivery)

    async def load(self, limit: int) -> None:
        """Read on in the log; rows of partitions that others own are passed over."""
        rows = read_log(self.transport.engine.reader, self.channel, self._scan, limit)
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
            for row in query(
                connection,
                "SELECT owner FROM trunkline_member WHERE subscription = ? ORDER BY owner",
                (self.number,),
            )
        ]

    def unbalanced(self) -> bool:
        """Return whether partitions are to be taken or given up."""
        members = self._read_members(self.transport.engine.reader)
        target = self._target(members)
        return self.transport.engine.process not in members or target != set(self.partitions) or bool(self.leaving)

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
                "UPDATE trunkline_partition SET owner = NULL, suspect = ? WHERE subscription = ? AND partition = ?",
                (self.partitions[number].has_suspects(), self.number, number),
            )
        acquired = []
        for number in target - set(self.partitions):
            rows = query(
                connection,
                "SELECT position, suspect FROM trunkline_partition WHERE subscription = ? AND partition = ?"
                " AND (owner IS NULL OR owner = ?)",
                (self.number, number, mine),
            )
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
        staying = self.leaving - leaving
        self.leaving = leaving - set(released)
        for number in staying:
            # It was to leave and now does not: meanwhile its messages were passed over.
            self._scan = min(self._scan, self.partitions[number].read)
        for number, position, suspect in acquired:
            self.partitions[number] = Partition(self.number, number, position, BUFFER if suspect else 0)
            self._scan = min(self._scan, position)
        if acquired or released or staying:
            self.assignment += 1
            self.behind = True
            self.wake()

    def mark_suspects(self, connection: apsw.Connection) -> None:
        """Tell whoever reads on where suspects are still to be handled."""
        for state in self.partitions.values():
            if state.has_suspects():
                connection.execute(
                    "UPDATE trunkline_partition SET suspect = 1 WHERE subscription = ? AND partition = ?",
                    (self.number, state.number),
                )
