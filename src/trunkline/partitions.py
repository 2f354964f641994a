"""Partitions of a Stream: how far each was handled, and which of them this process reads.

Invariant: a watermark never passes a position that is unfinished; a partition is given up only when nothing of it
is under way here, or when its lease is lost. Never does: talk to a broker (transports/). Read next: inflow.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Protocol

from trunkline.clock import Clock
from trunkline.errors import TransportError

log = logging.getLogger("trunkline.partitions")

LEASE_S = 10.0
"""How long a partition stays with a process that shows no sign of life."""
CLOSE_S = 10.0
"""How long a partition that is to move waits for what is under way in it."""


class Watermark:
    """Positions handed out of one partition, in rising order, and those that are finished, in any order.

    Args:
        position: the first one not yet finished.
    """

    def __init__(self, position: int) -> None:
        self.low = position
        self._taken: deque[int] = deque()
        self._done: set[int] = set()
        self._idle: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, positions: Iterable[int]) -> None:
        """Note that `positions` are handed out."""
        self._taken.extend(positions)

    def unfinished(self) -> list[int]:
        """Return what was handed out and is not finished."""
        return [position for position in self._taken if position not in self._done]

    def done(self, positions: Iterable[int]) -> bool:
        """Note that `positions` are finished; return whether `low`, the first unfinished position, rose."""
        taken, done = self._taken, self._done
        done.update(positions)
        before = self.low
        while taken and taken[0] in done:
            position = taken.popleft()
            done.remove(position)
            self.low = position + 1
        if not taken:
            done.clear()
            if self._idle is not None and not self._idle.done():
                self._idle.set_result(None)
        return self.low != before

    def give_back(self, count: int) -> None:
        """Take back the last `count` positions handed out: nobody began with them."""
        for _ in range(count):
            self._done.discard(self._taken.pop())
        if not self._taken and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def abandon(self) -> None:
        """Wait for nothing more: what was handed out is another process's to finish."""
        self._taken.clear()
        self._done.clear()
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def idle(self) -> None:
        """Wait until everything that was handed out is finished, or abandoned."""
        if self._taken:
            if self._idle is None or self._idle.done():
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)


class Leases(Protocol):
    """What a broker offers so that each partition of one subscription has one reader."""

    async def keep(self, held: Collection[int]) -> tuple[int, set[int]]:
        """Show a sign of life, renew the leases on `held`.

        Returns: how many processes are alive, this one included; which of `held` are still this process's.
        """

    async def claim(self, free: Sequence[int], most: int) -> list[int]:
        """Take up to `most` of `free` that nobody has; return those taken."""

    async def release(self, partitions: Collection[int]) -> None:
        """Give partitions back, and with them how far they were handled."""

    async def leave(self) -> None:
        """Be no longer counted."""


class Ownership:
    """Sees that the partitions of one subscription are shared out evenly among its processes.

    A process holds no more than its share, the partitions divided by the processes, rounded up.

    Args:
        opened: begins to read a partition that was claimed.
        closed: ends reading it: waits for what is under way if it is to move, forgets it if it is lost, which can
            happen while it waits.
        lease_s: how long a partition stays with a silent process, in seconds.
    """

    def __init__(
        self,
        label: str,
        partitions: int,
        leases: Leases,
        clock: Clock,
        *,
        opened: Callable[[int], Awaitable[None]],
        closed: Callable[[int, bool], Awaitable[None]],
        lease_s: float = LEASE_S,
    ) -> None:
        self.held: set[int] = set()
        self._moving: set[int] = set()
        self._label = label
        self._partitions = partitions
        self._leases = leases
        self._clock = clock
        self._opened = opened
        self._closed = closed
        self._lease_s = lease_s
        self._renewed = -math.inf

    async def step(self) -> None:
        """Renew, take and give back: to be called about once a tenth of the lease.

        What was to be given back when the broker did not answer is given back first: it is no longer read here.

        Raises: TransportError if the broker does not answer; partitions whose lease has run out are lost then.
        """
        try:
            members, kept = await self._leases.keep(self.held)
        except TransportError:
            if self._clock.monotonic() - self._renewed > self._lease_s * 0.7:
                await self.lose(self.held)
            raise
        self._renewed = self._clock.monotonic()
        await self.lose(self.held - kept)
        self._moving &= self.held
        if self._moving:
            await self._give_back(sorted(self._moving))
        share = math.ceil(self._partitions / max(1, members))
        if len(self.held) > share:
            await self._give_back(sorted(self.held)[share:])
        elif len(self.held) < share:
            await self._take(share - len(self.held))

    async def _take(self, most: int) -> None:
        free = [number for number in range(self._partitions) if number not in self.held]
        # From a random place: processes that start together do not all ask for the same ones.
        start = int(self._clock.random() * len(free))
        for partition in await self._leases.claim(free[start:] + free[:start], most):
            await self._opened(partition)
            self.held.add(partition)

    async def _give_back(self, partitions: Sequence[int]) -> None:
        self._moving.update(partitions)
        closing = asyncio.gather(
            *(self._closed(partition, True) for partition in partitions),  # noqa: FBT003
            return_exceptions=True,
        )
        renewing = asyncio.create_task(self._renew())
        try:
            ends = await closing
        finally:
            renewing.cancel()
            (renewed,) = await asyncio.gather(renewing, return_exceptions=True)
        for end in (*ends, renewed):
            if isinstance(end, Exception):
                raise end
        # What was lost while it was waited for is not this process's to give.
        await self._leases.release([partition for partition in partitions if partition in self.held])
        self.held.difference_update(partitions)
        self._moving.difference_update(partitions)

    async def _renew(self) -> None:
        """Keep every lease while partitions are waited for; what is lost meanwhile the next step finds out."""
        while True:
            await self._clock.sleep(self._lease_s / 5)
            try:
                await self._leases.keep(self.held)
            except TransportError as error:
                log.warning("%s: leases not renewed: %s", self._label, error)

    async def lose(self, partitions: Collection[int]) -> None:
        """Stop reading partitions that are another process's now."""
        lost = sorted(partitions)
        if lost:
            numbers = ", ".join(map(str, lost))
            log.warning("%s lost partitions %s: another process may read them now", self._label, numbers)
        for partition in lost:
            self.held.discard(partition)
            await self._closed(partition, False)  # noqa: FBT003

    async def leave(self) -> None:
        """Give everything back and be no longer counted."""
        held = sorted(self.held)
        await self._give_back(held)
        await self._leases.leave()
