"""What one process reads of one subscription of a Stream: the partitions whose tokens it holds.

Invariant: a token is moved only past what is settled; a partition whose token is gone is dropped at once.
Never does: decide who reads what (tokens.py, partitions.py). Read next: tokens.py.
Source: RabbitMQ, "Streams": x-stream-offset; acknowledgements give credit only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from zlib import crc32

from trunkline.channel import Stream
from trunkline.clock import Clock
from trunkline.errors import TransportError, TrunklineError
from trunkline.inflow import Inflow
from trunkline.partitions import CLOSE_S, Ownership, Watermark
from trunkline.transport import Delivery, Subscription
from trunkline.transports.rabbitmq.client import AmqpError, Arrived, Channel, Connection
from trunkline.transports.rabbitmq.queue_reader import read_message
from trunkline.transports.rabbitmq.tokens import TRIMMED, Token, Tokens

log = logging.getLogger("trunkline.rabbitmq")

PREFETCH = 4000
"""Messages of all partitions of a subscription that wait here or are under way."""
LEAST_PREFETCH = 250
"""Of one partition."""
WINDOW = 20_000
"""Messages settled behind one that is not, before a partition is read no further."""
COMMIT_S = 0.25
"""Between two commits of a partition."""
BALANCE_S, SOON_S, SOON_STEPS = 1.0, 0.3, 10
"""Between two looks at who reads what: usually, and the first ones of a connection."""
LOG_SHIFT = 40
"""Positions of the next log begin at the next multiple of 2 to this: what is late of an old one settles nothing new."""
_OFFSET = b"\x0fx-stream-offsetl"
_ONLY_OFFSET = b"\x00\x00\x00\x19" + _OFFSET


def offset_of(arrived: Arrived) -> int:
    """Return the position in the log of a message.

    Raises: ValueError if the broker did not say it.
    """
    properties = arrived.properties
    if properties.find(_ONLY_OFFSET, 0, 300) < 0:  # other programs' headers stand beside it
        try:
            offset = (arrived.decoded().headers or {}).get("x-stream-offset")
        except Exception as error:  # noqa: BLE001 - any bytes may be there
            log.debug("headers that cannot be read: %r", error)
            offset = None
        if isinstance(offset, int):
            return offset
    start = properties.rfind(_OFFSET)
    if start < 0:
        raise ValueError("a message of a stream has no x-stream-offset")
    start += len(_OFFSET)
    return int.from_bytes(properties[start : start + 8], "big")


def origin_of(arrived: Arrived) -> int:
    """Return what identifies a log by the first message that it still has; see Token.

    Only the body: how the broker words the properties depends on its version.
    """
    return TRIMMED if offset_of(arrived) else crc32(arrived.body)


def id_of(log_name: str, position: int, body: bytes) -> str:
    """Return the id of a message that has none: its place, and what is in it, for places begin again in a new log."""
    return f"{log_name}/{position}/{crc32(body):08x}"


class Part:
    """One partition that is read here.

    Attributes:
        suspect: positions below it may have been in a handler when a process died.
        high: one past the highest position that came.
        credit: messages that came and were not acknowledged.
        base: what is added to an offset of the broker to get a position.
    """

    def __init__(self, number: int, token: Token, suspect: int) -> None:
        self.number = number
        self.base = token.log << LOG_SHIFT
        self.start = self.base + token.offset
        self.watermark = Watermark(self.start)
        self.suspect = self.base + suspect
        self.high = self.start
        self.channel: Channel | None = None
        self.closing = False
        self.origin = token.origin
        self._came = 0
        self._settled = 0
        self._acked = 0

    def came(self, positions: list[int]) -> None:
        """Note what came."""
        self.watermark.take(positions)
        self.high = positions[-1] + 1
        self._came += len(positions)

    def settle(self, positions: list[int]) -> None:
        """Note what is finished; let the broker send as many more."""
        self._settled = min(self._settled + len(positions), self._came)
        self.watermark.done(position for position in positions if position >= self.watermark.low)
        if self.channel is not None and self._settled > self._acked and len(self.watermark) < WINDOW:
            self._acked = self._settled
            self.channel.ack(self._acked, below=True)

    def under_way(self) -> int:
        """Return how many messages are here and not settled."""
        return self._came - self._settled

    def token(self) -> Token:
        """Return a token that says how far it is."""
        base = self.base
        return Token(self.watermark.low - base, self.high - base, log=base >> LOG_SHIFT, origin=self.origin)


class StreamReader:
    """Reader of the partitions of a Stream that this process owns.

    Args:
        logs: name of the stream queue of each partition.

    Attributes:
        left: tokens of the partitions that were read here when the connection was lost, should they be gone.
    """

    def __init__(self, subscription: Subscription, logs: list[str], tokens: Tokens, clock: Clock) -> None:
        assert isinstance(subscription.channel, Stream)  # noqa: S101 - chosen by the caller
        self.subscription = subscription
        self.inflow = Inflow(subscription)
        self.logs = logs
        self.tokens = tokens
        self.parts: dict[int, Part] = {}
        self.left: dict[int, Token] = {}
        self._clock = clock
        self._prefetch = max(LEAST_PREFETCH, PREFETCH // len(logs))
        self._connection: Connection | None = None
        self._draining = False
        self._steps = 0
        self._looking: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.ownership = Ownership(
            subscription.label, len(logs), tokens, clock, opened=self._opened, closed=self._closed
        )

    async def open(self, connection: Connection) -> None:
        """Begin to share the partitions.

        Raises: AmqpError.
        """
        if self._draining:
            return
        await self.tokens.open(connection)
        self._connection = connection
        self._steps = 0
        if not self._tasks:
            self._tasks = [self.inflow.spawn(self._balance()), self.inflow.spawn(self._commit_often())]

    def lost(self) -> None:
        """Drop everything: the broker gives the tokens to others."""
        self._connection = None
        self.tokens.lost()
        self.ownership.held.clear()
        self.inflow.forget()
        if self.parts:
            self.left = {number: part.token() for number, part in self.parts.items()}
            self.parts.clear()
            self.inflow.reassigned()

    async def _balance(self) -> None:
        while True:
            if self._connection is not None:
                self._steps += 1
                try:
                    await self.ownership.step()
                except (TrunklineError, AmqpError) as error:
                    log.debug("%s: %s", self.subscription.label, error)
            await self._clock.sleep(SOON_S if self._steps < SOON_STEPS else BALANCE_S)

    async def _commit_often(self) -> None:
        while True:
            await self._clock.sleep(COMMIT_S)
            await self.commit(self.parts)

    async def commit(self, partitions: Collection[int], *, last: bool = False) -> None:
        """Write how far partitions are finished; what cannot be written is done again by whoever reads on."""
        await asyncio.gather(*(self._commit(number, last=last) for number in list(partitions)))

    async def _commit(self, number: int, *, last: bool) -> None:
        part = self.parts.get(number)
        if part is not None:
            try:
                await self.tokens.commit(number, part.watermark.low - part.base, part.high - part.base, last=last)
            except TrunklineError as error:
                log.warning("%s: how far it is was not noted: %s", self.subscription.label, error)

    # --- partitions come and go ---

    async def _opened(self, number: int) -> None:
        token, suspect = self.tokens.start(number)
        part = self.parts[number] = Part(number, token, suspect)
        self.inflow.reassigned()
        try:
            # From position 0 on nothing can be passed over, whichever log it is.
            await (self._look(part) if token.offset else self._read(part))
        except AmqpError as error:
            self.parts.pop(number, None)
            raise TransportError("E520", f"{self.logs[number]}: {error.text}", "it is tried again") from error

    async def _consume(self, part: Part, prefetch: int, offset: int | str) -> Channel:
        if self._connection is None:
            raise AmqpError(0, "not connected")
        part.channel = channel = await self._connection.channel()
        channel.arrived = lambda batch: self._arrived(part, batch)
        if offset == "first":
            channel.arrived = lambda batch: self._looked(part, batch)
        await channel.consume(self.logs[part.number], "s", prefetch, {"x-stream-offset": offset})
        return channel

    async def _read(self, part: Part) -> None:
        await self._consume(part, self._prefetch, part.start - part.base)

    async def _look(self, part: Part) -> None:
        """Have the first message of the log brought, to see whether the token is of this log.

        One that was deleted and made anew would be passed over up to the token's position. While it is empty nothing
        comes, and nothing is to be read.
        """
        await self._consume(part, 1, "first")

    def _looked(self, part: Part, batch: list[Arrived]) -> None:
        if not self._reads(part) or part.channel is None:
            return
        channel, origin = part.channel, origin_of(batch[0])
        channel.arrived = lambda _: None
        # A log only ever loses its beginning: one that was trimmed has no position 0 any more.
        if part.origin is None or origin in (part.origin, TRIMMED):
            self.tokens.learn(part.number, origin)
        else:
            renewed = self._begin_again(part, 0, origin, "its log was deleted and made anew")
            if renewed is None:
                return
            part = renewed
        task = self.inflow.spawn(self._go_on(part, channel))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _go_on(self, part: Part, channel: Channel) -> None:
        await channel.close()
        if not self._reads(part):
            return
        try:
            await self._read(part)
        except AmqpError as error:
            log.debug("%s: partition %d: %s", self.subscription.label, part.number, error.text)
        if not self._reads(part) and part.channel is not None:
            await part.channel.close()  # it was given up meanwhile

    def _reads(self, part: Part) -> bool:
        return self.parts.get(part.number) is part and not part.closing

    def _begin_again(self, part: Part, offset: int, origin: int | None, why: str) -> Part | None:
        """Read from `offset` on, below what the token says; nothing if the token is gone meanwhile."""
        token = self.tokens.renew(part.number, offset, origin)
        if token is None:
            return None
        log.warning(
            "%s: partition %d was handled up to %d, but %s: it is read from %d on",
            self.subscription.label, part.number, part.start - part.base, why, offset,
        )  # fmt: skip
        self.inflow.forget(part.number)
        renewed = self.parts[part.number] = Part(part.number, token, 0)
        renewed.channel = part.channel
        self.inflow.reassigned()
        return renewed

    async def _closed(self, number: int, planned: bool) -> None:  # noqa: FBT001 - as Ownership calls it
        part = self.parts.get(number)
        if part is None:
            return
        part.closing = True
        if part.channel is not None:
            await part.channel.close()
        part.watermark.give_back(len(self.inflow.forget(number)))
        if planned and not self._draining:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await part.watermark.idle()
            except TimeoutError:
                log.warning(
                    "%s: partition %d moves with %d messages unfinished here; they come again",
                    self.subscription.label, number, len(part.watermark),
                )  # fmt: skip
        if planned:
            await self.commit([number], last=True)
        self.parts.pop(number, None)
        self.inflow.reassigned()

    # --- messages ---

    def _arrived(self, part: Part, batch: list[Arrived]) -> None:
        if not self._reads(part):
            return
        first = offset_of(batch[0])
        if part.high == part.start and first < part.start - part.base:
            renewed = self._begin_again(part, first, part.origin, "its log lost its end")
            if renewed is None or part.channel is None:
                return
            part.channel.arrived = lambda later: self._arrived(renewed, later)
            part = renewed
        if not part.start - part.base and part.high == part.start:
            part.origin = origin_of(batch[0])
            self.tokens.learn(part.number, part.origin)
        subscription, number, suspect = self.subscription, part.number, part.suspect
        kind, log_name = subscription.channel.plain, self.logs[number]
        now = 0.0 if kind is None else self._clock.now()
        deliveries, positions = [], []
        for arrived in batch:
            position = part.base + offset_of(arrived)
            fallback = "" if kind is None else id_of(log_name, position, arrived.body)
            message, unread = read_message(arrived, kind, log_name, fallback, now)
            positions.append(position)
            deliveries.append(
                Delivery(
                    subscription,
                    message,
                    arrived.body if message is None else None,
                    None if message is None else message.partitionkey,
                    position,
                    number,
                    suspect=position < suspect,
                    unread=unread,
                )
            )
        part.came(positions)
        self.inflow.put(deliveries)

    def settle(self, number: int, positions: list[int]) -> None:
        """Note what is finished of a partition; nothing if it is not read here any more."""
        part = self.parts.get(number)
        if part is not None:
            part.settle([position for position in positions if position >= part.base])

    # --- the end ---

    async def drain(self) -> None:
        """Receive no more; keep the partitions until what is under way is settled."""
        self._draining = True
        for part in self.parts.values():
            part.closing = True
        for delivery in reversed(self.inflow.drain()):
            part_of = self.parts.get(delivery.partition)
            if part_of is not None:
                part_of.watermark.give_back(1)

    async def stop(self) -> None:
        """Give everything back."""
        ending = [*self._tasks, *self._looking]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        self._tasks.clear()
        if self._connection is not None:
            try:
                await self.ownership.leave()
            except (TrunklineError, AmqpError) as error:
                log.debug("%s: %s", self.subscription.label, error)
        self.lost()
