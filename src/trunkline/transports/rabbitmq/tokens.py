"""Who reads which partition of a Stream, and from where: one token for each partition of each subscription.

A token is a message in a quorum queue of its own with a single active consumer. Whoever consumes it reads the
partition; when that process dies, the broker gives the token to the next one. So no clock decides.
Invariant: a token names a position below which everything is finished; several of one partition are harmless, since
the highest of those that were committed counts, and of those from the start of the subscription the lowest. One of a
later log beats them all.
Never does: read the Stream (stream_reader.py). Read next: stream_reader.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Collection, Sequence

import msgspec

from trunkline.clock import Clock
from trunkline.errors import TransportError, TrunklineError
from trunkline.transports.rabbitmq.client import AmqpError, Arrived, Channel, Connection
from trunkline.transports.rabbitmq.publisher import Publisher, Route

log = logging.getLogger("trunkline.rabbitmq")

TRIMMED = -1
"""Of a log whose first message was gone when somebody looked."""
CLAIM_S = 2.0
"""How long a token is waited for before another process is taken for its holder."""
BEYOND = 5000
"""Messages handed out since the last commit that a process may have died of."""
SILENT_S = 10.0
"""After so long without seeing its own commit a process takes another one for the holder."""


class Token(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a token says.

    Attributes:
        offset: the first position that may be unfinished.
        high: one past the highest position that was handed out when it was written.
        first: whether it was written at the start of the subscription, not after something was finished.
        log: how many logs the subscription had before this one.
        origin: checksum of the log's first message, at position 0, or TRIMMED; None if nobody looked. A log that was
            made anew has another one.
    """

    offset: int
    high: int = 0
    first: bool = False
    log: int = 0
    origin: int | None = None

    def beats(self, other: Token) -> bool:
        """Return whether this one counts rather than `other`."""
        if self.log != other.log:
            return self.log > other.log
        if self.first != other.first:
            return other.first
        return self.offset < other.offset if self.first else self.offset >= other.offset


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Token).decode


class Held:
    """The tokens of one partition that this process holds.

    Attributes:
        token: the one that counts. again: whether it was with a process that did not give it back.
        awaited: offset of a commit that is to come by, and since when.
        unwritten: it knows of the log what no token says yet.
    """

    def __init__(self) -> None:
        self.token: Token | None = None
        self.again = False
        self.unwritten = False
        self.awaited: tuple[int, float] | None = None
        self.count = 0
        self.came: asyncio.Event = asyncio.Event()
        self._tag = 0

    def add(self, channel: Channel, arrived: Arrived, token: Token) -> None:
        """Keep the better one, remove the other."""
        self.count += 1
        if self.token is None or token.beats(self.token):
            worse, self._tag = self._tag, arrived.tag
            self.token, self.again = token, arrived.again
        else:
            worse = arrived.tag
        if worse:
            channel.ack(worse)
        if self.awaited is not None and not token.first and token.offset >= self.awaited[0]:
            self.awaited = None
        self.came.set()

    async def settled(self) -> None:
        """Wait for a commit that is to come by: else it may come to the next one as that of a process that died."""
        with contextlib.suppress(TimeoutError):  # then it is one that nobody is to wait for
            async with asyncio.timeout(CLAIM_S):
                while self.awaited is not None:
                    self.came.clear()
                    await self.came.wait()

    def remove(self, channel: Channel) -> None:
        """Remove the token: another one was written."""
        if self._tag:
            channel.ack(self._tag)

    def give_back(self, channel: Channel) -> None:
        """Leave the token to whoever comes next."""
        if self._tag:
            channel.give_back(self._tag)


class Tokens:
    """The tokens of one subscription; what Ownership needs.

    Args:
        queues: name of the queue of each partition's token.
        members: name of the queue whose consumers are the processes of this subscription; it is always empty.
    """

    def __init__(self, queues: Sequence[str], members: str, publisher: Publisher, clock: Clock) -> None:
        self.queues = queues
        self.members = members
        self._publisher = publisher
        self._clock = clock
        self._routes = [Route(queue, "", queue, mandatory=True) for queue in queues]
        self._channel: Channel | None = None
        self._held: dict[int, Held] = {}

    async def open(self, connection: Connection) -> None:
        """Be counted.

        Raises: AmqpError.
        """
        self._held.clear()
        channel = await connection.channel()
        channel.arrived = self._arrived
        await channel.consume(self.members, "m", 0)
        self._channel = channel

    def lost(self) -> None:
        """Forget everything: the broker gives the tokens to others."""
        self._channel = None
        self._held.clear()

    async def place(self, partition: int, token: Token) -> None:
        """Put the first token of a partition, or one for a token whose queue was deleted.

        Raises: TransportError.
        """
        await self._publisher.publish(self._routes[partition], _encode(token))

    def _arrived(self, batch: list[Arrived]) -> None:
        channel = self._channel
        if channel is None:
            return
        for arrived in batch:
            if not arrived.consumer.isdigit():
                channel.ack(arrived.tag)  # nothing belongs into the queue of members
                continue
            held = self._held.get(int(arrived.consumer))
            if held is None:
                channel.give_back(arrived.tag)
                continue
            try:
                token = _decode(arrived.body)
            except msgspec.DecodeError as error:
                log.warning("%r is no token of %s: %s", arrived.body[:80], self.members, error)
                channel.ack(arrived.tag)
                continue
            held.add(channel, arrived, token)

    def start(self, partition: int) -> tuple[Token, int]:
        """Return (the token that counts, up to where messages are suspect) for a partition that is held."""
        held = self._held[partition]
        token = held.token
        assert token is not None  # noqa: S101 - claimed
        return token, max(token.offset, token.high) + BEYOND if held.again else 0

    def learn(self, partition: int, origin: int) -> None:
        """Note what the log begins with."""
        held = self._held.get(partition)
        if held is not None and held.token is not None and held.token.origin != origin:
            held.token = msgspec.structs.replace(held.token, origin=origin)
            held.unwritten = True

    def renew(self, partition: int, offset: int, origin: int | None) -> Token | None:
        """Begin at `offset` of another log; return the token, or None if the partition is not held any more."""
        held = self._held.get(partition)
        if held is None or held.token is None:
            return None
        held.token = Token(offset, offset, log=held.token.log + 1, origin=origin)
        held.awaited, held.unwritten = None, True
        return held.token

    async def commit(self, partition: int, offset: int, high: int, *, last: bool = False) -> None:
        """Write how far a partition is finished; nothing is done if that is known or it is not held.

        Args:
            last: it is given up, so an earlier commit that is under way is not waited for.
        Raises: TrunklineError.
        """
        held = self._held.get(partition)
        if held is None or held.token is None or self._publisher.blocked is not None:
            return
        known = held.token.offset
        if held.awaited is not None:
            if not last:
                return
            known = held.awaited[0]
        if known < offset or held.unwritten:
            held.awaited, held.unwritten = (offset, math.inf), False
            token = Token(offset, high, log=held.token.log, origin=held.token.origin)
            try:
                await self._publisher.publish(self._routes[partition], _encode(token))
            except TrunklineError:
                held.awaited, held.unwritten = None, True
                raise
            if held.awaited is not None:
                held.awaited = (offset, self._clock.monotonic())

    # --- Leases ---

    async def keep(self, held: Collection[int]) -> tuple[int, set[int]]:
        """Count the processes, see which partitions are still ours; see Leases."""
        channel = self._open_channel()
        try:
            _, members = await channel.queue(self.members)
        except AmqpError as error:
            raise _unanswered(error) from error
        late = self._clock.monotonic() - SILENT_S
        for partition, state in list(self._held.items()):
            if state.awaited is not None and state.awaited[1] < late:
                # The commit went to another consumer: the broker took this process for dead.
                await self._cancel(channel, partition, state)
        return members, {partition for partition in held if partition in self._held}

    async def claim(self, free: Sequence[int], most: int) -> list[int]:
        """Take tokens that nobody consumes; see Leases."""
        channel = self._open_channel()
        taken: list[int] = []
        try:
            for partition in free:
                if len(taken) >= most:
                    break
                tokens, consumers = await channel.queue(self.queues[partition])
                if not consumers and await self._take(channel, partition, tokens):
                    taken.append(partition)
        except AmqpError as error:
            raise _unanswered(error) from error
        return taken

    async def _take(self, channel: Channel, partition: int, tokens: int) -> bool:
        """Consume a token; return whether it came, so that nobody else was faster."""
        held = self._held[partition] = Held()
        await channel.consume(self.queues[partition], str(partition), 0)
        try:
            async with asyncio.timeout(CLAIM_S):
                while not held.count or held.count < tokens:
                    held.came.clear()
                    await held.came.wait()
        except TimeoutError:
            if held.token is None:
                await self._cancel(channel, partition, held)
                return False
        return True

    async def _cancel(self, channel: Channel, partition: int, held: Held) -> None:
        await channel.cancel(str(partition))
        if self._held.get(partition) is held:
            del self._held[partition]
        held.give_back(channel)

    async def release(self, partitions: Collection[int]) -> None:
        """Leave tokens to others; see Leases."""
        channel = self._open_channel()
        await asyncio.gather(*(self._release(channel, partition) for partition in partitions))

    async def _release(self, channel: Channel, partition: int) -> None:
        held = self._held.get(partition)
        if held is None or held.token is None:
            return
        await held.settled()
        try:
            await channel.cancel(str(partition))
        except AmqpError as error:
            raise _unanswered(error) from error
        del self._held[partition]
        try:
            # Written anew: one that was only given back would look as if its holder had died.
            if self._publisher.blocked is not None:
                raise _unanswered(AmqpError(0, self._publisher.blocked))
            await self._publisher.publish(self._routes[partition], _encode(held.token))
        except TrunklineError as error:
            log.warning("%s: %s", self.queues[partition], error)
            held.give_back(channel)
        else:
            held.remove(channel)

    async def leave(self) -> None:
        """Be no longer counted; see Leases."""
        try:
            await self._open_channel().cancel("m")
        except AmqpError as error:
            raise _unanswered(error) from error

    def _open_channel(self) -> Channel:
        if self._channel is None:
            raise _unanswered(AmqpError(0, "not connected"))
        return self._channel


def _unanswered(error: AmqpError) -> TransportError:
    return TransportError("E520", f"the broker did not answer: {error.text}", "it is tried again")
