"""Queues and Topics: one stream, a group per subscription, whose processes compete.

Invariant: an entry is acknowledged only when its delivery is settled; what this process holds keeps its lease, what a
silent process holds is taken over when its lease is over. Never does: partitions (stream.py).

Source: redis.io/docs, Redis Streams, consumer groups and their pending entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from trunkline.channel import Queue
from trunkline.transport import LIVE, Backlog, Delivery
from trunkline.transports.redis.connection import Connection, pack
from trunkline.transports.redis.layout import FREE, MAX_POSITION, Entry, position_of, read_entry
from trunkline.transports.redis.reader import BLOCK_MS, ROOM, Reader, count_after
from trunkline.transports.redis.scripts import GIVE_BACK, LEAVE, RECLAIM, RENEW, SWEEP, TRIM

COUNT = 200
"""Most entries taken in one read."""
MOST_IDS = 500
"""Most entries named in one command of a script."""
RENEW_EVERY = 3
"""Rounds of a tenth of the lease: what was held since the last time is renewed, at 0.6 of its lease at the latest."""
FORGET_MS = 3_600_000
"""After this silence a consumer that holds nothing is forgotten."""


class QueueReader(Reader):
    """Reads a Queue, or a Topic for one subscription."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._stream = self.names.streams[0]
        self._deletes = isinstance(self.subscription.channel, Queue)
        self._group_read = ("XREADGROUP", "GROUP", self.group, self._token)
        self._under_way: dict[int, bytes] = {}
        self._old: list[int] = []
        self._cursor: bytes = b"0-0"
        self._round = 0
        self._untrimmed = False

    def probes(self) -> list[bytes]:
        """Read what this process holds, which is nothing yet, and acknowledge nothing; see Reader."""
        nothing = [("XACK", self._stream, self.group, "0-0"), ("XDEL", self._stream, "0-0")]
        read = (*self._group_read, "COUNT", 1, "STREAMS", self._stream, "0")
        return [pack(command) for command in (read, *nothing[: 1 + self._deletes])]

    async def read(self, connection: Connection) -> None:
        """Take new entries; see Reader."""
        command = pack((*self._group_read, "COUNT", COUNT, "BLOCK", BLOCK_MS, "STREAMS", self._stream, ">"))
        while not self._draining:
            await self.inflow.room()
            reply = await self._blocking(connection, command)
            if reply:
                await self._take(reply[0][1], suspect=False)

    async def _take(self, entries: Iterable[Entry | None], *, suspect: bool) -> int:
        """Put entries into the inflow; return how many there were."""
        under_way = self._under_way
        subscription, stream, plain = self.subscription, self._stream, self.subscription.channel.plain
        deliveries = []
        deleted = []
        for entry in entries:
            if entry is None:
                continue  # deleted by somebody; version 6.2 says so like this
            entry_id, fields = entry
            if fields is None:
                deleted.append(entry_id)
                continue
            position = position_of(entry_id)
            if under_way.get(position) == entry_id:
                continue  # it never left this process
            while position in under_way:
                position = (position + 1) & MAX_POSITION  # an id of another program's making
            message, raw, unread = read_entry(stream, entry_id, fields, plain)
            key = None if message is None else message.partitionkey
            under_way[position] = entry_id
            deliveries.append(
                Delivery(
                    subscription, message, raw, key, position, -1,
                    0, LIVE, suspect, False, unread,  # noqa: FBT003 - positional for speed
                )
            )  # fmt: skip
        if deleted:
            await self._commands.run(pack(("XACK", stream, self.group, *deleted)))
        if self._draining:
            await self._give_back(deliveries)
        else:
            self.inflow.put(deliveries)
        return len(deliveries)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge, and delete where nobody else reads; what others have by now is theirs."""
        pop = self._under_way.pop
        ids = [entry_id for delivery in deliveries if (entry_id := pop(delivery.position, None)) is not None]
        if not ids:
            return
        self._untrimmed = True
        commands = [pack(("XACK", self._stream, self.group, *ids))]
        if self._deletes:
            commands.append(pack(("XDEL", self._stream, *ids)))
        await self._commands.run_surely(b"".join(commands), len(commands))

    # --- leases ---

    async def tend(self) -> None:
        """Renew, reclaim, trim; see Reader."""
        self._round += 1
        if self._round % RENEW_EVERY == 0:
            await self._renew()
        if not self._draining:
            await self._reclaim()
        if self._untrimmed and not self._deletes:
            self._untrimmed = False
            await self.trim()

    async def _renew(self) -> None:
        """Show that what was held already a turn ago is still worked on."""
        under_way = self._under_way
        held = [under_way[position] for position in self._old if position in under_way]
        self._old = list(under_way)
        for at in range(0, len(held), MOST_IDS):
            ids = held[at : at + MOST_IDS]
            for lost in await self._commands.run(RENEW.run((self._stream,), self.group, self._token, *ids)):
                under_way.pop(position_of(lost), None)

    async def _reclaim(self) -> None:
        """Take what was given back, and what silent processes hold."""
        while len(self.inflow) < ROOM:
            self._cursor, left, given = await self._commands.run(
                RECLAIM.run(
                    (self._stream,), self.group, self._token, FREE, self._lease_ms, self._cursor, COUNT,
                )
            )  # fmt: skip
            count = await self._take(given, suspect=False) + await self._take(left, suspect=True)
            if self._cursor == b"0-0" and count < COUNT:
                return

    async def trim(self) -> None:
        """Remove what every group has acknowledged."""
        await self._commands.run(TRIM.run((self._stream,)))

    async def sweep(self) -> None:
        """Forget consumers that ended long ago."""
        await self._commands.run(SWEEP.run((self._stream,), self.group, FORGET_MS, FREE))

    async def backlog(self) -> Backlog:
        """Count; see Transport."""
        length = await self._commands.run(pack(("XLEN", self._stream)))
        if self._deletes:
            (pending, *_) = await self._commands.run(pack(("XPENDING", self._stream, self.group)))
            return Backlog(length, pending)
        groups = await self._commands.run(pack(("XINFO", "GROUPS", self._stream)))
        for flat in groups:
            facts = dict(zip(flat[::2], flat[1::2], strict=True))
            if facts[b"name"].decode() == self.group:
                pending, lag = facts[b"pending"], facts.get(b"lag")
                if lag is None:
                    lag = await count_after(self._commands.run, self._stream, facts[b"last-delivered-id"])
                return Backlog(pending + lag, pending)
        return Backlog(0)

    async def drain(self) -> None:
        """Stop reading, give back what nobody began."""
        await super().drain()
        await self._give_back(self.inflow.drain())

    async def _give_back(self, deliveries: Iterable[Delivery]) -> None:
        waiting = iter(deliveries)
        while taken := list(islice(waiting, MOST_IDS)):
            found = [self._under_way.pop(delivery.position, None) for delivery in taken]
            ids = [entry_id for entry_id in found if entry_id is not None]
            await self._commands.run(GIVE_BACK.run((self._stream,), self.group, self._token, FREE, *ids))

    async def leave(self) -> None:
        """Give back everything; see Reader."""
        await self._commands.run(LEAVE.run((self._stream,), self.group, self._token, FREE))
