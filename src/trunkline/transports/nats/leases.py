"""Who reads which partition, and how far it got: records in a bucket of JetStream.

Invariant: a record changes only by a write that names the revision it follows, so of two processes that think a
partition theirs one is refused, and a cursor never goes back. Never does: read messages. Read next: streams.py.

A process is alive while its own record is young by the server's clock; nobody's own clock is compared with another's.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Sequence
from datetime import datetime

import msgspec

from trunkline.clock import Clock
from trunkline.errors import TransportError
from trunkline.transports.nats.connection import ApiError, Connection

log = logging.getLogger("trunkline.transport.nats")

WRONG_REVISION = {10071, 10164}
"""Codes of nats-server's errors.json: the last sequence of the subject is another."""


class Record(msgspec.Struct, omit_defaults=True):
    """One partition of one subscription.

    Attributes:
        cursor: position of the first message not yet handled.
        holder: who reads it, or None.
        log: when the log was made that the cursor belongs to.
        revision: which write this is; 0 if there was none.
    """

    cursor: int
    holder: str | None = None
    log: str | None = None
    revision: int = 0


class Lost(Exception):  # noqa: N818 - a fact, not a fault
    """Another process has written the record."""


class BucketLeases:
    """The records of one subscription. Implements `partitions.Leases`.

    Args:
        bucket: name of the stream. root: what the subjects of the records begin with.
        lease_s: after how long a silent process counts as dead.
    """

    def __init__(
        self, connection: Connection, clock: Clock, bucket: str, root: str, partitions: int, lease_s: float
    ) -> None:
        self.records: dict[int, Record] = {}
        self.dead: set[int] = set()
        self._connection = connection
        self._bucket = bucket
        self._root = root
        self.partitions = partitions
        self._lease_s = lease_s
        self._process = clock.new_id()
        self._alive: set[str] = set()
        self._made: str | None = None
        self._ttl = max(2, math.ceil(lease_s * 2))

    async def begin(self, first: int, log: str) -> None:
        """Make the records that are missing, to begin at position `first`."""
        await self._read()
        missing = [number for number in range(self.partitions) if number not in self.records]
        await self._make({number: Record(first, None, log) for number in missing})

    async def _make(self, records: dict[int, Record]) -> None:
        """Write the first records of partitions, unless another process was faster."""
        results = await asyncio.gather(
            *(self._write(number, record) for number, record in records.items()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Lost):
                raise result

    async def known(self) -> bool:
        """Return whether the subscription existed before."""
        await self._read()
        return len(self.records) == self.partitions

    async def _read(self) -> None:
        """Learn all records and who is alive; write those again that went with their bucket."""
        made = str((await self._connection.ask(f"STREAM.INFO.{self._bucket}"))["created"])
        anew = self._made is not None and made != self._made
        if anew:
            log.warning("%s: the bucket of cursors was made anew: what is known here is written again", self._root)
            # Its revisions count from 1. Who reads a partition goes on, with what it has handled and not yet noted.
            for record in self.records.values():
                record.revision = 0
        self._made = made
        found = await self._connection.ask_many(f"DIRECT.GET.{self._bucket}", {"multi_last": [f"{self._root}.>"]})
        ages: dict[str, float] = {}
        for body, headers in found:
            name = headers["Nats-Subject"].removeprefix(self._root + ".")
            revision = int(headers["Nats-Sequence"])
            if name.isdecimal():
                known = self.records.get(int(name))
                if known is None or known.revision < revision:
                    record = self.records[int(name)] = self._record(name, body)
                    record.revision = revision
            elif body:
                ages[name.removeprefix("member.")] = _seconds(headers["Nats-Time-Stamp"])
        now = max(ages.values(), default=0.0)
        # In a new bucket the others have until the next look to show a sign of life.
        before = self._alive if anew else set()
        self._alive = before | {name for name, seen in ages.items() if now - seen <= self._lease_s}
        await self._make({number: record for number, record in self.records.items() if not record.revision})

    def _record(self, name: str, body: bytes) -> Record:
        try:
            return msgspec.json.decode(body, type=Record)
        except msgspec.DecodeError as error:
            raise TransportError(
                "E522", f"record {self._root}.{name} cannot be read: {error}", "another program wrote it: remove it"
            ) from error

    async def _write(self, partition: int, record: Record) -> None:
        """Write what follows the revision that `record` names.

        Raises: Lost if another revision is there.
        """
        headers = f"Nats-Expected-Last-Subject-Sequence: {record.revision}\r\n".encode()
        body = msgspec.json.encode({"cursor": record.cursor, "holder": record.holder, "log": record.log})
        try:
            revision = await self._connection.write(f"{self._root}.{partition}", headers, body)
        except ApiError as error:
            if error.err_code in WRONG_REVISION:
                known = self.records.get(partition)
                if known is not None and known.revision == record.revision:
                    known.revision = 0  # whatever the next look finds there counts
                raise Lost from None
            raise
        known = self.records.get(partition)
        if known is None or known.revision < revision:
            self.records[partition] = Record(record.cursor, record.holder, record.log, revision)

    async def commit(self, partition: int, cursor: int) -> None:
        """Note how far a partition of this process was handled.

        Raises: Lost if it is another process's; TransportError if that is not known.
        """
        record = self.records[partition]
        if record.holder != self._process:
            raise Lost
        if cursor > record.cursor:
            await self._write(partition, Record(cursor, self._process, record.log, record.revision))

    async def rewind(self, partition: int, cursor: int, log: str) -> None:
        """Set the cursor of a partition of this process for a log that is another, or lost its end.

        Raises: Lost if it is another process's.
        """
        record = self.records[partition]
        if record.holder != self._process:
            raise Lost
        await self._write(partition, Record(cursor, self._process, log, record.revision))

    # --- Leases ---

    async def keep(self, held: Collection[int]) -> tuple[int, set[int]]:
        """Show a sign of life, read who has what, free what is this process's by name only; see Leases.

        Such a partition was lost while the server was away, or the answer to its claim was: others leave it alone, for
        its holder is alive, and this process, which may have its share already, does not read it.
        """
        headers = f"Nats-TTL: {self._ttl}s\r\n".encode()
        await self._connection.write(f"{self._root}.member.{self._process}", headers, b"{}")
        await self._read()
        self._alive.add(self._process)
        mine = {number for number, record in self.records.items() if record.holder == self._process}
        await self.release(mine.difference(held))
        return len(self._alive), {number for number in held if self.records[number].holder == self._process}

    async def claim(self, free: Sequence[int], most: int) -> list[int]:
        """Take what nobody has, or somebody who is dead; see Leases."""
        taken: list[int] = []
        for number in free:
            if len(taken) == most:
                break
            record = self.records[number]
            if record.holder is not None and record.holder != self._process and record.holder in self._alive:
                continue
            try:
                await self._write(number, Record(record.cursor, self._process, record.log, record.revision))
            except Lost:
                continue
            if record.holder not in {None, self._process}:
                self.dead.add(number)
                log.warning("partition %d of %s is taken over: its process is silent", number, self._root)
            taken.append(number)
        return taken

    async def release(self, partitions: Collection[int]) -> None:
        """Let others take `partitions`; how far they were handled was committed before. See Leases."""
        for number in partitions:
            record = self.records[number]
            try:
                if record.holder == self._process:
                    await self._write(number, Record(record.cursor, None, record.log, record.revision))
            except Lost:
                log.debug("partition %d of %s was taken meanwhile", number, self._root)

    async def leave(self) -> None:
        """Be no longer counted; see Leases."""
        try:
            await self._connection.write(f"{self._root}.member.{self._process}", b"Nats-TTL: 1s\r\n", b"")
        except TransportError as error:
            log.debug("%s: not signed off, others wait for it: %s", self._root, error)


def _seconds(moment: str) -> float:
    """Read a time of the server, which has nine digits of a second or fewer."""
    whole, _, rest = moment.rstrip("Z").partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{rest or 0}")
