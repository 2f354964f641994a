"""What one process reads of one queue: of a Queue, or of one subscription of a Topic.

Invariant: a delivery is acknowledged only when it was settled, and only on the channel that brought it; what a broken
channel brought comes again. Never does: connect. Read next: stream_reader.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from trunkline.clock import Clock
from trunkline.errors import DecodeError
from trunkline.inflow import Inflow
from trunkline.message import Message
from trunkline.transport import Delivery, Subscription
from trunkline.transports.rabbitmq.client import Arrived, Channel, Connection
from trunkline.wire import Plain, decode, header_text, why_unread

log = logging.getLogger("trunkline.rabbitmq")

PREFETCH = 2000
"""Messages that wait here or are under way: what a consumer has in flight, and as many for what comes next."""
STRAGGLERS = 250
"""Settled messages behind one that is not, before each is acknowledged by itself."""
_CHANNEL_BITS = 40
"""Of a position: the lower ones are the delivery tag, the upper ones count the channels."""


def _headers(properties: Any) -> dict[str, str]:
    """Return the headers and the content type as text."""
    found = {name: _text(value) for name, value in (properties.headers or {}).items()}
    if properties.content_type:
        found["content-type"] = properties.content_type
    return found


def _text(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        return header_text(bytes(value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _plain(properties: Any, kind: str, source: str, fallback: str, now: float) -> Plain:
    at = properties.timestamp
    seconds = at.timestamp() if isinstance(at, datetime) else now
    return Plain(kind, source, properties.message_id or fallback, seconds)


def read_message(
    arrived: Arrived, kind: str | None, source: str, fallback: str, now: float
) -> tuple[Message | None, tuple[str, str] | None]:
    """Return the message that came, or None and why it is none.

    Args:
        kind: type of what is no CloudEvent, or None to refuse it. fallback: id of such a message if it has none.
    """
    try:
        plain = None if kind is None else _plain(arrived.decoded(), kind, source, fallback, now)
        return decode(arrived.body, lambda: _headers(arrived.decoded()), plain), None
    except DecodeError as error:
        return None, why_unread(error)
    except Exception as error:  # noqa: BLE001 - any bytes may be in the properties, and none may end the connection
        log.warning("a message of %s has properties that cannot be read: %r", source, error)
        return None, ("E400", f"not an envelope: its properties cannot be read: {error!r}")


class Unacked:
    """Delivery tags of one channel: which are handed out, which are settled and not yet acknowledged."""

    def __init__(self) -> None:
        self._taken: deque[int] = deque()
        self._done: set[int] = set()

    def __len__(self) -> int:
        return len(self._taken) - len(self._done)

    def take(self, tags: Iterable[int]) -> None:
        """Note what was handed out, in rising order."""
        self._taken.extend(tags)

    def done(self, tags: Iterable[int]) -> int:
        """Note what is settled; return the tag up to which everything is, 0 if that is as it was."""
        taken, done = self._taken, self._done
        done.update(tags)
        low = 0
        while taken and taken[0] in done:
            low = taken.popleft()
            done.remove(low)
        return low

    def stragglers(self, least: int) -> list[int]:
        """Return what is settled behind something that is not, if they are `least` or more; they count as done."""
        done = self._done
        if len(done) < least or not done:
            return []
        singles = sorted(done)
        self._taken = deque(tag for tag in self._taken if tag not in done)
        done.clear()
        return singles


class QueueReader:
    """Reader of one queue.

    Args:
        queue: its name on the broker.
    """

    def __init__(self, subscription: Subscription, queue: str, clock: Clock) -> None:
        self.subscription = subscription
        self.inflow = Inflow(subscription)
        self.queue = queue
        self._clock = clock
        self._channel: Channel | None = None
        self._unacked = Unacked()
        self._base = 0
        self._draining = False

    async def open(self, connection: Connection) -> None:
        """Begin to receive.

        Raises: AmqpError.
        """
        if self._draining:
            return
        self._base += 1 << _CHANNEL_BITS
        self._unacked = Unacked()
        self._channel = channel = await connection.channel()
        channel.arrived = self._arrived
        await channel.consume(self.queue, "q", PREFETCH)

    def lost(self) -> None:
        """Forget what the broken connection brought: it comes again."""
        self._channel = None
        self.inflow.forget()

    def _arrived(self, batch: list[Arrived]) -> None:
        if self._draining:
            self._give_back([arrived.tag for arrived in batch])
            return
        subscription, base = self.subscription, self._base
        kind = subscription.channel.plain
        now = 0.0 if kind is None else self._clock.now()
        deliveries = []
        for arrived in batch:
            # Without an id of its own nothing tells a second delivery from another message: it is taken for one.
            fallback = "" if kind is None else self._clock.new_id()
            message, unread = read_message(arrived, kind, self.queue, fallback, now)
            deliveries.append(
                Delivery(
                    subscription,
                    message,
                    arrived.body if message is None else None,
                    None if message is None else message.partitionkey,
                    base + arrived.tag,
                    suspect=arrived.again,
                    unread=unread,
                )
            )
        self._unacked.take(arrived.tag for arrived in batch)
        self.inflow.put(deliveries)

    def settle(self, positions: Iterable[int]) -> None:
        """Acknowledge what the present channel brought."""
        channel, base = self._channel, self._base
        if channel is None:
            return
        low = self._unacked.done([position - base for position in positions if position > base])
        if low:
            channel.ack(low, below=True)
        self.flush(STRAGGLERS)

    def flush(self, least: int = 1) -> None:
        """Acknowledge what is settled behind something that is not, if it is `least` messages or more."""
        if self._channel is not None:
            for tag in self._unacked.stragglers(least):
                self._channel.ack(tag)

    def under_way(self) -> int:
        """Return how many messages are here and not settled."""
        return len(self._unacked)

    async def drain(self) -> None:
        """Receive no more, give back what nobody asked for."""
        self._draining = True
        dropped = self.inflow.drain()
        if self._channel is not None:
            self._give_back([delivery.position - self._base for delivery in dropped])
            if self._channel.error is None:
                await self._channel.cancel("q")

    def _give_back(self, tags: Iterable[int]) -> None:
        if self._channel is not None:
            for tag in tags:
                self._channel.give_back(tag)


def per_partition(deliveries: Iterable[Delivery]) -> Iterator[tuple[int, list[int]]]:
    """Return (partition, positions) of deliveries."""
    found: dict[int, list[int]] = {}
    for delivery in deliveries:
        found.setdefault(delivery.partition, []).append(delivery.position)
    return iter(found.items())
