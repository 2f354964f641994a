"""Queue, Topic and Stream in the memory of one process, for tests.

Invariant: the same order, redelivery and sharing rules as the embedded engine, without a disk.
Never does: survive the process. Read next: transport.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from heapq import heappop, heappush

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError
from trunkline.transport import LIVE, Address, Backlog, Capabilities, Delivery, Staged, Subscription


class MemoryTransport:
    """Channels of one App."""

    capabilities = Capabilities(
        durable=False,
        processes=False,
        priority=True,
        ordered_streams=True,
        description="memory of one process; everything is gone when it ends",
    )

    def __init__(self, address: Address, clock: Clock) -> None:
        if address.path or address.options:
            raise ConfigurationError("E206", f"{address.shown} says more than memory: can use", "write memory:")
        self._clock = clock
        self.readers: dict[str, Reader] = {}
        self._routes: dict[str, list[Reader]] = {}
        self._position = 0

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Make the buffers; see Transport."""
        self._confirmed = asyncio.get_running_loop().create_future()
        self._confirmed.set_result(None)
        for channel in channels:
            self._routes.setdefault(channel.name, [])
        for subscription in subscriptions:
            channel = subscription.channel
            priority = isinstance(channel, Queue) and channel.priority
            reader = self.readers[subscription.label] = (PriorityReader if priority else Reader)(subscription)
            self._routes.setdefault(channel.name, []).append(reader)

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Put `batch` into the buffers of those who read its channels; see Transport."""
        for staged in batch:
            message = staged.message
            position = self._position = self._position + 1
            for reader in self._routes.get(staged.channel.name, ()):
                reader.append(
                    Delivery(
                        reader.subscription, message, None, message.partitionkey, position, reader.partition,
                        0, LIVE, False, staged.fresh,  # noqa: FBT003 - positional for speed
                    )
                )  # fmt: skip
                if reader.waiter is not None:
                    reader.wake()
        return self._confirmed

    place = send
    """For a store in memory, which sends what a unit staged in the moment it is applied."""

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what is there; see Transport."""
        return await self.readers[subscription.label].receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Forget `deliveries`; see Transport."""
        for delivery in deliveries:
            self.readers[delivery.subscription.label].under_way -= 1

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return True: there is one process."""
        return subscription.label in self.readers and partition >= 0

    def assignment(self, subscription: Subscription) -> int:
        """Return a constant: there is one process."""
        return 0 if subscription.label in self.readers else -1

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport."""
        reader = self.readers[subscription.label]
        return Backlog(reader.waiting() + reader.under_way, reader.under_way)

    async def tidy(self) -> None:
        """Do nothing: what was handed out is gone already."""

    async def drain(self) -> None:
        """Stop handing out; see Transport."""
        for reader in self.readers.values():
            reader.draining = True

    async def stop(self) -> None:
        """Forget everything."""
        self.readers.clear()
        self._routes.clear()


class Reader:
    """Messages of one subscription, oldest first.

    Attributes:
        append: adds one message.
        waiter: of whoever waits for the next one; `wake` ends it.
        under_way: handed out and not settled; a store in memory counts it down itself.
    """

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.partition = 0 if isinstance(subscription.channel, Stream) else -1
        self.under_way = 0
        self.draining = False
        self._buffer: deque[Delivery] = deque()
        self.append: Callable[[Delivery], None] = self._buffer.append
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let `receive` look again."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._buffer)

    def take(self, limit: int) -> list[Delivery]:
        """Remove the next messages."""
        buffer = self._buffer
        if len(buffer) <= limit:
            taken = list(buffer)
            buffer.clear()
            return taken
        return [buffer.popleft() for _ in range(limit)]

    async def receive(self, limit: int) -> list[Delivery]:
        """Return 1 to `limit` messages."""
        while self.draining or not self.waiting():
            waiter = self.waiter = asyncio.get_running_loop().create_future()
            await waiter
        taken = self.take(limit)
        self.under_way += len(taken)
        return taken


class PriorityReader(Reader):
    """Messages of one Queue, the most urgent first."""

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(subscription)
        self._heap: list[tuple[int, int, Delivery]] = []
        self.append = self._insert

    def _insert(self, delivery: Delivery) -> None:
        assert delivery.message is not None  # noqa: S101 - placed with its message
        heappush(self._heap, (-min(max(delivery.message.priority, 0), 9), delivery.position, delivery))

    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._heap)

    def take(self, limit: int) -> list[Delivery]:
        """Remove the most urgent messages."""
        return [heappop(self._heap)[2] for _ in range(min(limit, len(self._heap)))]
