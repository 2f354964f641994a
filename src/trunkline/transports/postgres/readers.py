"""What one process reads of one subscription in PostgreSQL: queue rows it claimed, partitions it owns.

Invariant: a partition's cursor passes only what is settled; a planned move of a partition waits for what is under way.
Never does: write messages (transport.py). Read next: ../../partitions.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from trunkline.channel import Stream
from trunkline.errors import TransportError
from trunkline.inflow import Inflow
from trunkline.partitions import CLOSE_S, Ownership, Watermark
from trunkline.transport import Delivery, Subscription
from trunkline.transports.postgres.tables import (
    CLAIM,
    FREE_OWN,
    FREE_PARTITIONS,
    GIVE_BACK,
    GIVE_BACK_OTHERS,
    OWN_PARTITIONS,
    READ_LOG,
    queue_range,
)

if TYPE_CHECKING:
    from trunkline.postgres import Engine

log = logging.getLogger("trunkline.transport.postgres")

BATCH = 1000
"""Most messages that one statement claims or reads."""
ROOM = 500
"""Messages that wait for their consumer before no more are claimed."""
POLL_S = 1.0
"""How often is looked without having been woken."""
RESCAN_S = 1.0
"""How often is looked from the first row on: numbers are given before the commit, so earlier ones may come later."""
SUSPECTS = 1000
"""Messages after the cursor that may have been in a handler when the process that read a partition died."""


class Reader:
    """What both kinds share: a task that fills an Inflow.

    Attributes:
        number: of the subscription, channel: of its channel, in the tables.
        word: of the channel, as processes tell each other of new messages.
    """

    def __init__(self, engine: Engine, subscription: Subscription, number: int, channel: int) -> None:
        self.engine = engine
        self.subscription = subscription
        self.number = number
        self.channel = channel
        self.word = f"c{channel}"
        self.inflow = Inflow(subscription, ROOM)
        self.draining = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to read."""
        self._task = self.engine.spawn(self._pump())

    def look(self) -> None:
        """Look now: there may be something."""
        self._wake.set()

    async def _pump(self) -> None:
        while not self.draining:
            await self.inflow.room()
            self._wake.clear()
            try:
                if await self.load():
                    continue
            except TransportError as error:
                log.warning("%s cannot read, again in %.0f s: %s", self.subscription.label, POLL_S, error)
            timer = self.engine.clock.call_later(POLL_S, self._wake.set)
            await self._wake.wait()
            timer.cancel()

    async def load(self) -> bool:
        """Fill the Inflow; return whether there may be more at once."""
        raise NotImplementedError

    async def drain(self) -> None:
        """Hand out nothing more."""
        self.draining = True
        self.inflow.drain()

    async def stop(self) -> None:
        """End the task, give back what is left."""
        await self.end()

    async def end(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class QueueReader(Reader):
    """Reader of a Queue or of one subscription of a Topic.

    Attributes:
        held: places of the rows that this process has and has not settled.

    `_high` is the last place it has claimed; `_certain` is False while it does not know what it has claimed.
    """

    def __init__(self, engine: Engine, subscription: Subscription, number: int, channel: int) -> None:
        super().__init__(engine, subscription, number, channel)
        self.held: set[int] = set()
        self._ordered = not getattr(subscription.channel, "priority", False)
        self._first, self._end = queue_range(number)
        self._scan = self._first
        self._scanned = engine.clock.monotonic()
        self._high = self._first
        self._certain = True
        self._claiming = asyncio.Lock()
        self._claim_sql = engine.sql(CLAIM)

    async def load(self) -> bool:
        """Claim waiting messages."""
        engine = self.engine
        now = engine.clock.monotonic()
        if not self._ordered or now - self._scanned > RESCAN_S:
            self._scan = self._first
            self._scanned = now
        async with self._claiming:
            if self.draining:
                return False
            begin = self._scan
            self._certain = False
            rows = await engine.fetch(self._claim_sql, engine.process, begin, self._end, BATCH)
            rows.sort()
            self._high = max(self._high, rows[-1][0] if rows else 0)
            self._certain = True
            fresh = [row for row in rows if row[0] not in self.held]
            self.held.update([row[0] for row in fresh])
        subscription = self.subscription
        self.inflow.put(
            [Delivery(subscription, None, event, None, place, suspect=suspect) for place, suspect, event in fresh]
        )
        if self._is_draining():
            await self.drain()
        if rows:
            self._scan = rows[-1][0]
        if len(rows) < BATCH:
            self._scan = self._first
        return len(rows) == BATCH or (bool(rows) and begin != self._first)

    def _is_draining(self) -> bool:
        """Return whether it began to drain while the rows were claimed."""
        return self.draining

    async def drain(self) -> None:
        """Hand out nothing more; give back what nobody has asked for."""
        self.draining = True
        places = [delivery.position for delivery in self.inflow.drain()]
        self.held.difference_update(places)
        if places:
            await self.engine.fetch(self.engine.sql(GIVE_BACK), places, self.engine.process)

    async def stop(self) -> None:
        """Give back everything, also what was claimed by a statement whose answer nobody heard."""
        async with self._claiming:
            await self.end()
        await self.give_back_others(())

    async def give_back_others(self, but: Collection[int]) -> None:
        """Give back what this process has according to the table and does not know of."""
        async with self._claiming:
            # Rows behind the last one it heard of are looked through only if an answer went missing.
            end = self._high + 1 if self._certain else self._end
            await self.engine.fetch(self.engine.sql(GIVE_BACK_OTHERS), self._first, end, self.engine.process, list(but))
            self._certain = True

    async def reconnected(self, *, anew: bool) -> None:
        """Forget what others have now, or give back what was claimed while the connection went."""
        if anew:
            self.held.clear()
            self.inflow.forget()
        else:
            await self.give_back_others(self.held)
        self._scan = self._first
        self.look()


class Partition:
    """One partition that this process reads.

    Attributes:
        read: position to be read next. written: where the cursor stands in the table.
        watermark: what was handed out and is not finished.
        suspects: how many of the next messages may have been in a handler when a process died.
        leaving: it moves to another process, so nothing more of it is handed out.
    """

    def __init__(self, number: int, position: int, suspects: int) -> None:
        self.number = number
        self.read = position
        self.written = position
        self.watermark = Watermark(position)
        self.suspects = suspects
        self.last_suspect = -1
        self.leaving = False

    def has_suspects(self) -> bool:
        """Return whether suspects are still to come or not yet passed: whoever reads on must know."""
        return self.suspects > 0 or self.watermark.low <= self.last_suspect


class StreamReader(Reader):
    """Reader of the partitions of a Stream that this process owns."""

    def __init__(self, engine: Engine, subscription: Subscription, number: int, channel: int) -> None:
        super().__init__(engine, subscription, number, channel)
        assert isinstance(subscription.channel, Stream)  # noqa: S101 - for the type checker
        self.partitions: dict[int, Partition] = {}
        self._read_sql = engine.sql(READ_LOG)
        self._leases = TableLeases(self)
        self.ownership = Ownership(
            subscription.label,
            subscription.channel.partitions,
            self._leases,
            engine.clock,
            opened=self._open,
            closed=self._close,
            lease_s=engine.settings.lease_s,
        )

    async def load(self) -> bool:
        """Read on in each partition."""
        states = [state for state in self.partitions.values() if not state.leaving]
        if not states or self.draining:
            return False
        limit = max(BATCH // len(states), 20)
        rows = await self.engine.fetch(
            self._read_sql, self.channel, [s.number for s in states], [s.read for s in states], limit
        )
        subscription = self.subscription
        found: list[Delivery] = []
        for number, position, event in rows:
            state = self.partitions.get(number)
            if state is None or state.leaving or position < state.read:
                continue  # given up meanwhile
            state.read = position + 1
            suspect = state.suspects > 0
            if suspect:
                state.suspects -= 1
                state.last_suspect = position
            found.append(Delivery(subscription, None, event, None, position, number, suspect=suspect))
        self.inflow.put(found)
        return len(rows) >= limit

    def handed_out(self, deliveries: Sequence[Delivery]) -> None:
        """Note what its consumer has now."""
        for delivery in deliveries:
            state = self.partitions.get(delivery.partition)
            if state is not None:
                state.watermark.take((delivery.position,))

    async def _open(self, number: int) -> None:
        position, suspect = self._leases.claimed.pop(number)
        self.partitions[number] = Partition(number, position, SUSPECTS if suspect else 0)
        self.inflow.reassigned()
        self.look()

    async def _close(self, number: int, planned: bool) -> None:  # noqa: FBT001 - as Ownership calls it
        state = self.partitions.get(number)
        if state is None:
            return
        state.leaving = True
        self.inflow.forget(number)
        if planned and not self.draining:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await state.watermark.idle()
            except TimeoutError:
                log.warning("%s gives partition %d up unfinished", self.subscription.label, number)
        if self.partitions.get(number) is not state:
            return  # lost while it was waited for
        self._leases.closing[number] = state
        del self.partitions[number]
        if not planned:
            state.watermark.abandon()
        self.inflow.reassigned()

    async def reconnected(self, *, anew: bool) -> None:
        """Forget partitions that others read now."""
        if anew:
            self._leases.joined = False
            await self.ownership.lose(set(self.ownership.held))
        self.look()


class TableLeases:
    """Which process reads which partition of one subscription, in the cursor table; see partitions.Leases.

    A process is alive while the engine says so, so a lease is renewed with the process.

    Attributes:
        claimed: partition → cursor and whether suspects follow it, of those just claimed.
        closing: partition → its state, of those that are being given up, and of those that were lost.
    """

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader
        self._engine = reader.engine
        self.joined = False
        self.claimed: dict[int, tuple[int, bool]] = {}
        self.closing: dict[int, Partition] = {}

    async def keep(self, held: Collection[int]) -> tuple[int, set[int]]:
        """Count processes; free what is this process's by name only; return which of `held` are still its own.

        Such a partition was lost while the server was away, or the answer to its claim was: others leave it alone, for
        its owner is alive, and this process, which may have its share already, does not read it.
        """
        engine = self._engine
        if not self.joined:
            await engine.run(self._join)
            self.joined = True
        process = engine.process
        rows = await engine.fetch(
            engine.sql(
                "SELECT (SELECT count(*) FROM @member m JOIN @process p ON p.id = m.process AND NOT p.dead"
                " WHERE m.subscription = $1),"
                " array(SELECT partition FROM @cursor WHERE subscription = $1 AND owner = $2)"
            ),
            self._reader.number, process,
        )  # fmt: skip
        members, named = rows[0]
        for partition in self.closing.keys() - set(named):
            del self.closing[partition]  # another's by now, or free
        if loose := set(named).difference(held):
            await self._free(sorted(loose), process)
        return members, set(named).intersection(held)

    async def _free(self, partitions: Sequence[int], process: int) -> None:
        # How far they were handled stands there already: nobody else has read them since. Nobody died, so what was
        # under way is suspect only if it was before, or if that is not known.
        suspects = [n not in self.closing or self.closing[n].has_suspects() for n in partitions]

        async def free(connection: asyncpg.Connection) -> None:
            await connection.execute(
                self._engine.sql(FREE_OWN), self._reader.number, process, list(partitions), suspects
            )
            self._engine.tell({"members"})

        await self._engine.run(free)
        log.warning("%s gives back partitions %s, which nobody read", self._reader.subscription.label, partitions)

    async def _join(self, connection: asyncpg.Connection) -> None:
        await connection.execute(
            self._engine.sql("INSERT INTO @member VALUES ($1, $2) ON CONFLICT DO NOTHING"),
            self._reader.number, self._engine.process,
        )  # fmt: skip
        self._engine.tell({"members"})

    async def claim(self, free: Sequence[int], most: int) -> list[int]:
        """Take partitions that nobody has."""
        engine, number = self._engine, self._reader.number

        async def take(connection: asyncpg.Connection) -> list[Any]:
            rows = await connection.fetch(engine.sql(FREE_PARTITIONS), number, list(free), most)
            taken = [row["partition"] for row in rows]
            await connection.execute(engine.sql(OWN_PARTITIONS), engine.process, number, taken)
            return list(rows)

        rows = await engine.run(take)
        for partition, position, suspect in rows:
            self.closing.pop(partition, None)
            self.claimed[partition] = (position, suspect)
        return [row[0] for row in rows]

    async def release(self, partitions: Collection[int]) -> None:
        """Give partitions back, with how far they were handled."""
        engine, number = self._engine, self._reader.number
        states = [self.closing[partition] for partition in partitions if partition in self.closing]

        async def give_back(connection: asyncpg.Connection) -> None:
            await connection.execute(
                engine.sql(
                    "UPDATE @cursor c SET position = u.position, owner = 0, suspect = u.suspect"
                    " FROM unnest($3::integer[], $4::bigint[], $5::boolean[]) AS u(partition, position, suspect)"
                    " WHERE c.subscription = $1 AND c.owner = $2 AND c.partition = u.partition"
                ),
                number, engine.process, [s.number for s in states], [s.watermark.low for s in states],
                [s.has_suspects() for s in states],
            )  # fmt: skip
            engine.tell({"members"})

        if states:
            await engine.run(give_back)
        for state in states:
            self.closing.pop(state.number, None)

    async def leave(self) -> None:
        """Be no longer counted."""
        engine, number = self._engine, self._reader.number

        async def remove(connection: asyncpg.Connection) -> None:
            await connection.execute(
                engine.sql("DELETE FROM @member WHERE subscription = $1 AND process = $2"), number, engine.process
            )
            engine.tell({"members"})

        await engine.run(remove)
