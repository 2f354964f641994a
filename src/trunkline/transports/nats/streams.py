"""What one process reads of a Stream.

Invariant: a partition is read in the order of its log by one process, from its cursor on; the cursor never passes
what is unfinished. Never does: leases (leases.py). Read next: transport.py.

Messages are read without acknowledgement, for a redelivered one would come after its successors. The cursor is ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError
from trunkline.inflow import Inflow
from trunkline.partitions import CLOSE_S, Ownership, Watermark
from trunkline.transport import Backlog, Delivery, Subscription
from trunkline.transports.nats.connection import Connection
from trunkline.transports.nats.layout import Layout
from trunkline.transports.nats.leases import BucketLeases, Lost
from trunkline.transports.nats.received import delivery
from trunkline.transports.nats.source import Source

log = logging.getLogger("trunkline.transport.nats")

WINDOW = 2000
"""Messages on their way or waiting here, of all partitions together."""
COMMIT_S = 0.05
"""Least time between two commits of cursors."""
SUSPECTS = 10_000
"""Of a partition taken over from a dead process, how many may have been in a handler when it died: more than a
process has under way, and than it settles between two commits."""


class Partition:
    """One partition that this process reads.

    Attributes:
        next: position from which the server is asked.
        serial: number of the next message that the current consumer brings.
        unfinished: how many came and were not settled.
        suspects: how many of the next messages may have been in a handler when a process died.
    """

    def __init__(self, number: int, cursor: int, suspects: int) -> None:
        self.number = number
        self.watermark = Watermark(cursor)
        self.next = cursor
        self.serial = 1
        self.suspects = suspects
        self.unfinished = 0
        self.closing = False
        self.source: Source | None = None
        self.opening: asyncio.Task[None] | None = None


class StreamReader:
    """The partitions of `subscription` that are this process's.

    Args:
        subject: of the Stream; a partition's number follows it.
    """

    def __init__(
        self, connection: Connection, layout: Layout, clock: Clock, subscription: Subscription, stream: str,
        subject: str, leases: BucketLeases, lease_s: float,
    ) -> None:  # fmt: skip
        self.inflow = Inflow(subscription)
        self.partitions: dict[int, Partition] = {}
        self._connection = connection
        self._layout = layout
        self._clock = clock
        self._subscription = subscription
        self._stream = stream
        self._subject = subject
        self._leases = leases
        self._count = leases.partitions
        self._lease_s = lease_s
        self._ownership = Ownership(
            subscription.label,
            leases.partitions,
            leases,
            clock,
            opened=self._opened,
            closed=self._closed,
            lease_s=lease_s,
        )
        self._came: list[Delivery] = []
        self._dirty: set[int] = set()
        self._refused: set[int] = set()
        self._committing: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self._stopping = False
        self._known = False

    # --- the connection ---

    async def connected(self) -> None:
        """Go on where it was; the first time, take partitions."""
        if not self._known:
            await self._begin()
            self._known = True
        await self._check_log()
        await asyncio.gather(*(self._open(partition) for partition in self.partitions.values()))
        if self._task is None:
            await self._ownership.step()
            self._task = self.inflow.spawn(self._keep())

    async def _begin(self) -> None:
        if await self._leases.known():
            return
        made, last = await self._log()
        await self._leases.begin(await self._first(last), made)

    async def _first(self, last: int) -> int:
        """Return where a new subscription begins."""
        moment_s = self._subscription.since_s
        if moment_s is None:
            return last + 1 if self._subscription.start == "latest" else 1
        name = self._clock.new_id().replace("-", "")
        return await self._layout.first_since(self._stream, name, f"{self._subject}.*", moment_s)

    async def _log(self) -> tuple[str, int]:
        """Return when the log was made, and its last position."""
        found = await self._connection.ask(f"STREAM.INFO.{self._stream}")
        return str(found["created"]), int(found["state"]["last_seq"])

    async def _check_log(self) -> None:
        """Give up partitions that were read further than their log goes now: they are taken again, from its cursor."""
        if self.partitions:
            made, last = await self._log()
            records = self._leases.records
            await self._ownership.lose(
                [n for n, one in self.partitions.items() if one.next > last + 1 or records[n].log != made]
            )

    async def _cursor(self, number: int) -> int:
        """Return where a partition is gone on with.

        A log that was made anew, or that lost its end with the power, would otherwise be passed over up to the old
        position.
        """
        record = self._leases.records[number]
        made, last = await self._log()
        cursor = 1 if record.log != made else min(record.cursor, last + 1)
        if cursor != record.cursor or record.log != made:
            log.warning(
                "%s: partition %d was handled up to %d, and its log made at %s ends at %d: read from %d",
                self._subscription.label, number, record.cursor, made, last, cursor,
            )  # fmt: skip
            try:
                await self._leases.rewind(number, cursor, made)
            except Lost as error:
                raise TransportError("E521", f"partition {number} was taken by another process meanwhile") from error
        return cursor

    def lost(self) -> None:
        """Keep what is here: the lease decides whether it may be gone on with."""
        for partition in self.partitions.values():
            if partition.source is not None:
                partition.source.cut()

    async def _keep(self) -> None:
        while True:
            await self._clock.sleep(self._lease_s / 10)
            for partition in list(self.partitions.values()):
                if partition.source is not None:
                    partition.source.check()
            try:
                await self._ownership.step()
            except TransportError as error:
                level = logging.WARNING if self._connection.link.is_up else logging.DEBUG
                log.log(level, "%s: leases not renewed: %s", self._subscription.label, error)
                await self._restore()
            else:
                # What is still this process's was refused for another reason, such as a bucket that was made anew.
                self._dirty |= self._refused.intersection(self.partitions)
                self._refused.clear()
            self._commit_soon()

    async def _restore(self) -> None:
        """Make the bucket of cursors again where it was removed."""
        if self._connection.link.is_up:
            try:
                await self._layout.declare([], [self._subscription])
            except (TransportError, ConfigurationError) as error:
                log.warning("%s: %s", self._subscription.label, error)

    # --- partitions come and go ---

    async def _opened(self, number: int) -> None:
        suspects = SUSPECTS if number in self._leases.dead else 0
        partition = Partition(number, await self._cursor(number), suspects)
        await self._open(partition)
        self._leases.dead.discard(number)
        self.partitions[number] = partition
        self.inflow.reassigned()
        self._refill()

    async def _open(self, partition: Partition) -> None:
        """Read on from `partition.next`, in order, with a new consumer."""
        old = partition.source
        if old is not None:
            await self._shut(old)
        name = self._clock.new_id().replace("-", "")
        number = partition.number
        source = Source(
            self._connection, self._clock, self._stream, name,
            take=lambda place, _, data, headers: self._take(partition, source, place, data, headers),
            refill=self._refill, broken=lambda: self._reopen(partition, source),
            batch=self._batch(),
        )  # fmt: skip
        await self._layout.open_reader(self._stream, name, f"{self._subject}.{number}", partition.next)
        await source.open()
        # Counted from here on: meanwhile another source may have brought something, or shown a gap.
        partition.source, partition.serial = source, 1
        self._refill()

    async def _shut(self, source: Source) -> None:
        try:
            await source.close()
            await self._layout.close_reader(self._stream, source.consumer)
        except TransportError as error:
            log.debug("%s: consumer left to its end: %s", self._subscription.label, error)

    def _reopen(self, partition: Partition, source: Source) -> None:
        if partition.source is source and (partition.opening is None or partition.opening.done()):
            partition.opening = self.inflow.spawn(self._open_again(partition))

    async def _open_again(self, partition: Partition) -> None:
        number = partition.number
        while self.partitions.get(number) is partition and not partition.closing:
            try:
                await self._layout.declare([self._subscription.channel], [])
                await self._check_log()
                if number not in self.partitions:
                    return
                await self._open(partition)
            except (TransportError, ConfigurationError) as error:
                log.warning("%s: partition %d: %s", self._subscription.label, partition.number, error)
                await self._clock.sleep(1.0)
            else:
                return

    async def _closed(self, number: int, planned: bool) -> None:  # noqa: FBT001 - as Ownership calls it
        partition = self.partitions.get(number)
        if partition is None:
            return
        partition.closing = True
        self.inflow.forget(number)
        self._came = [one for one in self._came if one.partition != number]
        if planned:
            await self._finish(partition)
        self.partitions.pop(number, None)
        if partition.opening is not None and partition.opening is not asyncio.current_task():
            partition.opening.cancel()
        self.inflow.reassigned()
        if partition.source is not None:
            await self._shut(partition.source)

    async def _finish(self, partition: Partition) -> None:
        """Let what is under way end, and note how far it got."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await partition.watermark.idle()
        except TimeoutError:
            log.warning(
                "%s: partition %d moves with messages under way: they may run again elsewhere",
                self._subscription.label, partition.number,
            )  # fmt: skip
        try:
            await self._leases.commit(partition.number, partition.watermark.low)
        except Lost:
            log.debug("%s: partition %d was taken meanwhile", self._subscription.label, partition.number)

    # --- receiving ---

    def _take(
        self, partition: Partition, source: Source, place: list[bytes], data: bytes, headers: bytes | None
    ) -> None:
        if partition.source is not source or partition.closing or self._draining:
            return
        position = int(place[1])
        if int(place[2]) != partition.serial:
            log.warning("%s: partition %d has a gap: read again", self._subscription.label, partition.number)
            partition.serial = -1
            self._reopen(partition, source)
            return
        partition.serial += 1
        if position < partition.next:
            return  # another source brought it while this one was opened
        partition.next = position + 1
        partition.unfinished += 1
        suspect = partition.suspects > 0
        if suspect:
            partition.suspects -= 1
        if not self._came:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._came.append(
            delivery(self._subscription, position, partition.number, place[3], data, headers, suspect=suspect)
        )

    def _hand_over(self) -> None:
        came, self._came = self._came, []
        self.inflow.put(came)
        self._refill()

    def _batch(self) -> int:
        return max(20, WINDOW // (2 * max(1, len(self.partitions))))

    def _refill(self) -> None:
        if self._draining or len(self.inflow) >= WINDOW // 2:
            return
        batch = self._batch()
        for partition in self.partitions.values():
            if partition.source is not None and not partition.closing and partition.serial > 0:
                partition.source.batch = batch
                partition.source.pull()

    async def receive(self, limit: int) -> list[Delivery]:
        """Return what came; see Transport."""
        taken = await self.inflow.receive(limit)
        for one in taken:
            self.partitions[one.partition].watermark.take((one.position,))
        self._refill()
        return taken

    # --- settling ---

    def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Note what is finished; the cursors are committed a little later, all of that time at once."""
        for one in deliveries:
            partition = self.partitions.get(one.partition)
            if partition is None:
                continue  # another process reads it now, and gets this message again
            partition.unfinished = max(0, partition.unfinished - 1)
            if partition.watermark.done((one.position,)):
                self._dirty.add(one.partition)
        self._commit_soon()

    def _commit_soon(self) -> None:
        if self._dirty and (self._committing is None or self._committing.done()):
            self._committing = self.inflow.spawn(self._commit())

    async def _commit(self) -> None:
        while self._dirty and self._connection.link.is_up:
            dirty, self._dirty = self._dirty, set()
            await asyncio.gather(*(self._commit_one(number) for number in dirty))
            await self._clock.sleep(COMMIT_S)

    async def _commit_one(self, number: int) -> None:
        partition = self.partitions.get(number)
        if partition is None or partition.closing:
            return
        try:
            await self._leases.commit(number, partition.watermark.low)
        except Lost:
            # Either another process has it, or our own last write was stored and its answer lost:
            # the next step reads the record and tells.
            log.debug("%s: partition %d: commit refused", self._subscription.label, number)
            self._refused.add(number)
        except TransportError as error:
            log.debug("%s: partition %d: commit again later: %s", self._subscription.label, number, error)
            if not self._stopping:
                self._dirty.add(number)

    async def backlog(self) -> Backlog:
        """Count what waits behind the cursors; see Transport."""
        counts = await asyncio.gather(*(self._behind(number) for number in range(self._count)))
        in_flight = sum(partition.unfinished for partition in self.partitions.values())
        return Backlog(sum(counts), in_flight)

    async def _behind(self, number: int) -> int:
        """Count one partition: what is not yet here as its consumer says, what is here as we know."""
        partition = self.partitions.get(number)
        if partition is not None and partition.source is not None:
            name = partition.source.consumer
            found = await self._connection.ask(f"CONSUMER.INFO.{self._stream}.{name}")
            return int(found["num_pending"]) + partition.unfinished
        cursor = self._leases.records[number].cursor
        name = self._clock.new_id().replace("-", "")
        waiting = await self._layout.open_reader(self._stream, name, f"{self._subject}.{number}", cursor, 1.0)
        await self._layout.close_reader(self._stream, name)
        return waiting

    # --- the end ---

    async def drain(self) -> None:
        """Hand out nothing more; see Transport."""
        self._draining = True
        self.inflow.drain()

    async def stop(self) -> None:
        """Give the partitions back."""
        self._stopping = True
        await self.drain()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._committing is not None:
            # Not cancelled: whether a commit was stored must be known for the last one to follow it.
            await asyncio.gather(self._committing, return_exceptions=True)
        if self._connection.link.is_up:
            for partition in self.partitions.values():
                # What is not settled by now comes again, to whoever reads on.
                partition.watermark = Watermark(partition.watermark.low)
            try:
                await self._ownership.leave()
            except TransportError as error:
                log.warning("%s: partitions not given back: %s", self._subscription.label, error)
