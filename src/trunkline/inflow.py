"""What a broker has brought for one subscription and its consumer has not yet asked for.

Invariant: `receive` gives deliveries in the order they were put, and nothing at once after the assignment changed.
Bounded: who fills it waits for room, until messages were taken or forgotten. A task without which nothing comes does
not end unseen. Never does: talk to a broker.
Read next: partitions.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any

from trunkline.tasks import spawn
from trunkline.transport import Delivery, Subscription

ROOM = 2000
"""Deliveries that wait here before whoever fills it has to wait."""


class Inflow:
    """The deliveries of `subscription` on their way to its consumer.

    Attributes:
        assignment: changes whenever this process gets or gives up a partition; see `Transport.assignment`.
    """

    def __init__(self, subscription: Subscription, room: int = ROOM) -> None:
        self.subscription = subscription
        self.assignment = 0
        self._told = 0
        self._room = room
        self._buffer: deque[Delivery] = deque()
        self._draining = False
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._failure: BaseException | None = None

    def __len__(self) -> int:
        return len(self._buffer)

    def put(self, deliveries: Iterable[Delivery]) -> None:
        """Add deliveries; after `drain` they are dropped, for the broker brings them again."""
        if not self._draining:
            self._buffer.extend(deliveries)
            self._wake()

    async def room(self) -> None:
        """Wait until there is room for more."""
        while len(self._buffer) >= self._room:
            waiter = asyncio.get_running_loop().create_future()
            self._writers.append(waiter)
            await waiter

    async def receive(self, limit: int) -> list[Delivery]:
        """Return 1 to `limit` deliveries, or none at once after the assignment changed; see Transport.

        Raises: what `fail` was told, such as what ended a task of `spawn`.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            if self._told != self.assignment:
                self._told = self.assignment
                if not self._buffer:
                    return []
            if self._buffer and not self._draining:
                return self._take(limit)
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def _take(self, limit: int) -> list[Delivery]:
        buffer = self._buffer
        if len(buffer) <= limit:
            taken = list(buffer)
            buffer.clear()
        else:
            taken = [buffer.popleft() for _ in range(limit)]
        if self._writers:
            self._give_room()
        return taken

    def _give_room(self) -> None:
        if self._draining or len(self._buffer) >= self._room:
            return
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():  # else whoever waited was cancelled
                writer.set_result(None)

    def reassigned(self) -> None:
        """Say that a partition came or went; `owns` must already tell the new state."""
        self.assignment += 1
        self._wake()

    def forget(self, partition: int | None = None) -> list[Delivery]:
        """Drop what was not yet asked for, of one partition or all; return it."""
        dropped = [d for d in self._buffer if partition is None or d.partition == partition]
        self._buffer = deque(d for d in self._buffer if partition is not None and d.partition != partition)
        # Nobody takes what is gone: whoever waits for room would wait for good.
        self._give_room()
        return dropped

    def drain(self) -> list[Delivery]:
        """Hand out nothing more; return what was not asked for.

        Whoever waits for room goes on waiting: there is nothing more to be brought.
        """
        self._draining = True
        return self.forget()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task without which nothing comes: an error that ends it ends `receive`, and with it the App."""
        return spawn(coroutine, self.fail)

    def fail(self, error: BaseException) -> None:
        """Have `receive` raise `error`: nothing comes any more."""
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)
