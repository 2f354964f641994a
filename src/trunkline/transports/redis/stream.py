"""Streams: one Redis stream per partition, each read by one process of a subscription.

Invariant: what a process hands out, it read while the partition was its own; the group's cursor moves only up to the
lowest unfinished message, and only by the hand of the partition's owner. Never does: compete (queue.py).

The group is used for its cursor alone. Reading through the group would list each entry as pending (a write to disk per
message, 70,000 a second against 480,000 here), and a process that lost its lease while its read was blocked would still
be given the next entry, behind the new owner's back.
Read next: ../../partitions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from typing import Any

from trunkline.channel import Stream
from trunkline.partitions import CLOSE_S, Ownership, Watermark
from trunkline.transport import LIVE, Backlog, Delivery
from trunkline.transports.redis.connection import Connection, Refusal, failure, pack
from trunkline.transports.redis.layout import Entry, Positions, read_entry
from trunkline.transports.redis.reader import BLOCK_MS, ROOM, Reader, count_after
from trunkline.transports.redis.scripts import CLAIM, COMMIT, KEEP, NOTE, RELEASE

FEWEST = 10
"""Entries read of each partition at once, when there are many partitions."""


class _Partition:
    """What this process knows of a partition that it reads.

    Attributes:
        last: id of the entry read last.
        given: id of the entry handed over last.
        mark: what is handed out and not finished.
        entries: how many entries stand before the mark since the stream began, or -1 if unknown.
        bound: position up to which its last reader may have handed out when it died.
        closing: nothing more of it is handed out.
    """

    __slots__ = ("bound", "closing", "entries", "given", "last", "mark", "number", "positions", "stream")

    def __init__(self, number: int, stream: bytes, cursor: bytes, entries: int, bound: bytes) -> None:
        self.number = number
        self.stream = stream
        self.last = self.given = cursor
        self.positions = Positions()
        self.mark = Watermark(self.positions.of(cursor) + 1)
        self.entries = entries
        self.bound = Positions().of(bound) if bound else -1
        self.closing = False


class StreamReader(Reader):
    """Reads its share of a Stream's partitions."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        assert isinstance(self.subscription.channel, Stream)  # noqa: S101 - for the type checker
        name = self.subscription.name
        self._members, self._owners = self.names.members(name), self.names.owners(name)
        self._bounds = self.names.bounds(name)
        self._partitions: dict[int, _Partition] = {}
        self._claimed: dict[int, _Partition] = {}
        self._some = asyncio.Event()
        self._leaving = False
        self._ownership = Ownership(
            self.subscription.label,
            self.subscription.channel.partitions,
            self,
            self._clock,
            opened=self._opened,
            closed=self._closed,
            lease_s=self._server.lease_s,
        )

    # --- reading ---

    def probes(self) -> list[bytes]:
        """Read a partition; see Reader."""
        return [pack(("XREAD", "COUNT", 1, "STREAMS", self.names.streams[0], "$"))]

    async def read(self, connection: Connection) -> None:
        """Read after what was read, of all partitions at once; see Reader."""
        found: list[tuple[_Partition, list[Entry]]] = []
        for state in self._partitions.values():
            state.last = state.given  # what was read before the connection ended and not noted is read again
        while not self._draining:
            noted = self._note(connection, found)
            await self.inflow.room()
            states = [state for state in self._partitions.values() if not state.closing]
            reading = self._ask(connection, states) if states else None
            if noted is not None:
                self._hand_over(found, await noted)
            found = []
            if reading is None:
                await self._until_some()
                continue
            found = self._found(states, await reading)

    async def _until_some(self) -> None:
        self._some.clear()
        if not any(not state.closing for state in self._partitions.values()):
            await self._some.wait()

    def _ask(self, connection: Connection, states: list[_Partition]) -> asyncio.Future[list[Any]]:
        count = max(FEWEST, ROOM // len(states))
        streams = [state.stream for state in states]
        last = [state.last for state in states]
        command = pack(("XREAD", "COUNT", count, "BLOCK", BLOCK_MS, "STREAMS", *streams, *last))
        return connection.request(command, 1, BLOCK_MS / 1000)

    def _found(self, states: list[_Partition], replies: list[Any]) -> list[tuple[_Partition, list[Entry]]]:
        (reply,) = replies
        if isinstance(reply, Refusal):
            raise failure(self._server.shown, reply)
        by_stream = {state.stream: state for state in states}
        found = []
        for stream, entries in reply or ():
            state = by_stream[stream]
            if self._partitions.get(state.number) is state and not state.closing:
                state.last = entries[-1][0]
                found.append((state, entries))
        return found

    def _note(
        self, connection: Connection, found: list[tuple[_Partition, list[Entry]]]
    ) -> asyncio.Future[list[Any]] | None:
        """Note on disk what is about to be handed out: should this process die, those are suspects."""
        if not found:
            return None
        bounds = [part for state, _ in found for part in (state.number, state.last)]
        return connection.request(NOTE.run((self._owners, self._bounds), self._token, *bounds))

    def _hand_over(self, found: list[tuple[_Partition, list[Entry]]], replies: list[Any]) -> None:
        (lost,) = replies
        if isinstance(lost, Refusal):
            raise failure(self._server.shown, lost)
        for state, entries in found:
            current = self._partitions.get(state.number) is state and not state.closing
            if current and state.number not in lost:
                self.inflow.put(self._deliveries(state, entries))
                state.given = entries[-1][0]

    def _deliveries(self, state: _Partition, entries: list[Entry]) -> list[Delivery]:
        subscription, plain = self.subscription, self.subscription.channel.plain
        stream, number, bound, position_of = state.stream, state.number, state.bound, state.positions.of
        deliveries = []
        for entry_id, fields in entries:
            message, raw, unread = read_entry(stream, entry_id, fields or (), plain)
            key = None if message is None else message.partitionkey
            position = position_of(entry_id)
            deliveries.append(
                Delivery(
                    subscription, message, raw, key, position, number,
                    0, LIVE, position <= bound, False, unread,  # noqa: FBT003 - positional for speed
                )
            )  # fmt: skip
        return deliveries

    async def receive(self, limit: int) -> list[Delivery]:
        """Hand out; see Transport."""
        deliveries = await self.inflow.receive(limit)
        partitions = self._partitions
        for delivery in deliveries:
            partitions[delivery.partition].mark.take((delivery.position,))
        return deliveries

    # --- settling ---

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Move the cursors as far as everything before is finished; what is another process's now is left alone."""
        done: dict[int, list[int]] = {}
        for delivery in deliveries:
            done.setdefault(delivery.partition, []).append(delivery.position)
        streams: list[bytes] = [self._owners]
        moved: list[int | bytes] = []
        for number, positions in done.items():
            state = self._partitions.get(number)
            if state is None:
                continue
            before = len(state.mark)
            if state.mark.done(positions):
                if state.entries >= 0:
                    state.entries += before - len(state.mark)
                streams.append(state.stream)
                moved += (number, state.positions.id_of(state.mark.low - 1), state.entries)
        if moved:
            command = COMMIT.run(tuple(streams), self._token, self.group, *moved)
            await self._commands.run_surely(command, 1)

    # --- ownership ---

    def owns(self, partition: int) -> bool:
        """See Transport."""
        return partition in self._partitions

    async def tend(self) -> None:
        """Renew, and while running take and give back; see Reader."""
        if self._draining:
            await self.keep(self._ownership.held)
        else:
            await self._ownership.step()

    async def keep(self, held: Collection[int]) -> tuple[int, set[int]]:
        """See Leases."""
        members, *kept = await self._commands.run(
            KEEP.run((self._members, self._owners), self._token, self._lease_ms, *held)
        )
        return members, set(kept)

    async def claim(self, free: Sequence[int], most: int) -> list[int]:
        """See Leases."""
        streams = self.names.streams
        keys = (self._owners, self._bounds, *(streams[number] for number in free))
        taken = await self._commands.run(CLAIM.run(keys, self._token, self._lease_ms, most, self.group, *free))
        for number, cursor, entries, bound in taken:
            self._claimed[number] = _Partition(number, streams[number], cursor, entries, bound)
        return [number for number, *_ in taken]

    async def release(self, partitions: Collection[int]) -> None:
        """See Leases."""
        if partitions:
            await self._commands.run(RELEASE.run((self._owners, self._bounds), self._token, *partitions))

    async def _opened(self, partition: int) -> None:
        self._partitions[partition] = self._claimed.pop(partition)
        self.inflow.reassigned()
        self._some.set()
        self.wake()

    async def _closed(self, partition: int, planned: bool) -> None:  # noqa: FBT001 - as Ownership calls it
        state = self._partitions.get(partition)
        if state is None:
            return
        self.inflow.forget(partition)
        if planned and not self._leaving:
            state.closing = True
            with contextlib.suppress(TimeoutError):  # what is unfinished then is the next owner's too
                async with asyncio.timeout(CLOSE_S):
                    await state.mark.idle()
        self._partitions.pop(partition, None)
        self.inflow.forget(partition)
        self.inflow.reassigned()

    async def drain(self) -> None:
        """Stop reading; the partitions stay here until what is under way is settled."""
        await super().drain()
        self.inflow.drain()

    async def leave(self) -> None:
        """Give the partitions back and be no longer counted; see Reader, and Leases, which calls it at the end."""
        if not self._leaving:
            self._leaving = True
            await self._ownership.leave()
        else:
            await self._commands.run(pack(("ZREM", self._members, self._token)))

    async def backlog(self) -> Backlog:
        """Count what stands after the cursors; see Transport."""
        waiting = 0
        for stream in self.names.streams:
            waiting += await self._after_cursor(stream)
        return Backlog(waiting, sum(len(state.mark) for state in self._partitions.values()))

    async def _after_cursor(self, stream: bytes) -> int:
        info = _facts(await self._commands.run(pack(("XINFO", "STREAM", stream))))
        for flat in await self._commands.run(pack(("XINFO", "GROUPS", stream))):
            group = _facts(flat)
            if group[b"name"].decode() != self.group:
                continue
            if group[b"last-delivered-id"] == info[b"last-generated-id"]:
                return 0
            if group.get(b"lag") is not None:
                return min(int(group[b"lag"]), int(info[b"length"]))
            return await count_after(self._commands.run, stream, group[b"last-delivered-id"])
        return 0


def _facts(flat: list[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
