"""One process's reading of one subscription: what Queues, Topics and Streams share.

Invariant: blocking reads have a connection of their own, which is made again by itself.
Read next: queue.py, stream.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from trunkline.clock import Clock
from trunkline.errors import TrunklineError
from trunkline.inflow import Inflow
from trunkline.transport import Backlog, Delivery, Subscription
from trunkline.transports.redis.connection import Connection, Refusal, failure, pack
from trunkline.transports.redis.layout import Names, group_of
from trunkline.transports.redis.server import Server

log = logging.getLogger("trunkline.transport.redis")

ROOM = 1000
"""Deliveries that wait for the consumer; what a process holds of a Queue others cannot have."""
BLOCK_MS = 1000
"""How long a read waits for something new before it is asked for again."""
PAGE = 1000
AGAIN_S = 0.5
"""Wait before a reader that failed begins again."""


class Commands(Protocol):
    """The connection for everything that does not block."""

    async def run(self, command: bytes) -> Any:
        """Send one packed command, return its reply. Raises: TransportError or ConfigurationError."""

    async def run_surely(self, commands: bytes, count: int) -> None:
        """Send packed commands; again when the connection ends before they are answered."""

    @property
    def is_up(self) -> bool:
        """Return whether there is a connection, as far as is known."""

    async def until_up(self) -> None:
        """Wait until there is a connection."""

    def failed(self, error: TrunklineError) -> None:
        """Say what went wrong: what is missing is declared again."""

    def interrupt(self, connection: Connection) -> None:
        """End a read that blocks, where the server allows that."""


class Reader:
    """Reads one subscription.

    Args:
        token: names this process.
    """

    def __init__(
        self, subscription: Subscription, *, server: Server, commands: Commands, clock: Clock, token: str
    ) -> None:
        self.subscription = subscription
        self.inflow = Inflow(subscription, ROOM)
        self.names = Names(server.prefix, subscription.channel)
        self.group = group_of(subscription)
        self._server = server
        self._commands = commands
        self._clock = clock
        self._token = token
        self._lease_ms = int(server.lease_s * 1000)
        self._draining = False
        self.connection: Connection | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # --- what each kind does its own way ---

    def probes(self) -> list[bytes]:
        """Return commands that change nothing and show whether reading and settling are allowed."""
        raise NotImplementedError

    async def read(self, connection: Connection) -> None:
        """Bring what is there into the inflow, until drained."""
        raise NotImplementedError

    async def tend(self) -> None:
        """Renew what is held and look for what others left."""
        raise NotImplementedError

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """See Transport."""
        raise NotImplementedError

    async def backlog(self) -> Backlog:
        """See Transport."""
        raise NotImplementedError

    async def leave(self) -> None:
        """Give back everything and be no longer known."""
        raise NotImplementedError

    async def receive(self, limit: int) -> list[Delivery]:
        """See Transport."""
        return await self.inflow.receive(limit)

    def owns(self, partition: int) -> bool:  # noqa: ARG002
        """Return False: there are no partitions."""
        return False

    # --- running ---

    def begin(self) -> None:
        """Read and tend from now on."""
        self._tasks = [self.inflow.spawn(self._read_always()), self.inflow.spawn(self._tend_always())]

    async def drain(self) -> None:
        """Read nothing more; what is held stays so until `stop`."""
        self._draining = True
        self.wake()

    def wake(self) -> None:
        """End a read that waits; where that is not allowed it ends by itself within `BLOCK_MS`."""
        if self.connection is not None:
            self._commands.interrupt(self.connection)

    async def stop(self) -> None:
        """End reading and tending."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _read_always(self) -> None:
        while not self._draining:
            await self._commands.until_up()
            try:
                self.connection = connection = await self._server.connect(lambda _: None)
                try:
                    await self.read(connection)
                finally:
                    self.connection = None
                    await connection.close()
            except TrunklineError as error:
                self._commands.failed(error)
                await self._clock.sleep(AGAIN_S)
                self._tell("%s: reading is begun again: %s", error)

    async def _tend_always(self) -> None:
        pause_s = min(1.0, self._server.lease_s / 10)
        while True:
            await self._clock.sleep(pause_s)
            try:
                await self.tend()
            except TrunklineError as error:
                self._tell("%s: %s", error)
                self._commands.failed(error)

    def _tell(self, text: str, error: TrunklineError) -> None:
        """Log what went wrong; while there is no connection the link says so, for all subscriptions."""
        log.log(logging.WARNING if self._commands.is_up else logging.DEBUG, text, self.subscription.label, error)

    async def _blocking(self, connection: Connection, command: bytes) -> Any:
        (reply,) = await connection.request(command, 1, BLOCK_MS / 1000)
        if isinstance(reply, Refusal):
            raise failure(self._server.shown, reply)
        return reply


async def count_after(run: Callable[[bytes], Awaitable[Any]], stream: bytes, last: bytes) -> int:
    """Return how many entries come after `last`, where the server does not count them itself."""
    count = 0
    while found := await run(pack(("XRANGE", stream, b"(" + last, "+", "COUNT", PAGE))):
        count += len(found)
        last = found[-1][0]
    return count
