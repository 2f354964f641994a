"""What one process reads of a Queue or a Topic.

Invariant: a message stays this process's while it is under way here, however long its handler takes; a copy that
comes meanwhile is not handed out. Never does: order by key (streams.py). Read next: streams.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError
from trunkline.inflow import Inflow
from trunkline.transport import Backlog, Delivery, Subscription
from trunkline.transports.nats.connection import Connection
from trunkline.transports.nats.layout import Layout
from trunkline.transports.nats.received import delivery
from trunkline.transports.nats.source import Source

log = logging.getLogger("trunkline.transport.nats")

BATCH = 500
"""Messages asked for at once; up to one and a half times as many can be on their way."""
ENOUGH = 250
"""Messages that wait here above which no more are asked for."""
LOG_SHIFT = 40
"""Positions of a stream that was made anew begin at the next multiple of 2 to this: they are other messages'."""


class QueueReader:
    """Competes with other processes for the messages of `subscription`.

    Args:
        stream, consumer: where they are on the server.
        lease_s: how long the server leaves a message with a silent process.
    """

    def __init__(
        self, connection: Connection, layout: Layout, clock: Clock, subscription: Subscription, stream: str,
        consumer: str, lease_s: float,
    ) -> None:  # fmt: skip
        self.inflow = Inflow(subscription)
        self._connection = connection
        self._layout = layout
        self._clock = clock
        self._subscription = subscription
        self._stream = stream
        self._place = f"{stream}.{consumer}"
        self._made = ""
        self._base = 0
        self._lease_s = lease_s
        self._held: dict[int, bytes] = {}
        self._old: list[int] = []
        self._owed: list[bytes] = []
        self._came: list[Delivery] = []
        self._draining = False
        self._up = False
        self._task: asyncio.Task[None] | None = None
        self._source = Source(
            connection, clock, stream, consumer, take=self._take, refill=self._refill, broken=self._reopen, batch=BATCH
        )
        self._opening: asyncio.Task[None] | None = None

    async def connected(self) -> None:
        """Begin to receive on a new connection; acknowledge what could not be on the old one."""
        await self._check_stream()
        await self._source.open()
        self._go_on()
        if self._task is None:
            self._task = self.inflow.spawn(self._keep())

    def _go_on(self) -> None:
        self._up = True
        self._post(self._owed)
        self._owed = []
        self._refill()

    async def _check_stream(self) -> None:
        """Forget what is held of a stream that was deleted: the one made anew counts its messages from 1 again.

        An acknowledgement names a message by its position only, and would be taken for that of another one.
        """
        found = await self._connection.ask(f"STREAM.INFO.{self._stream}")
        known, self._made = self._made, str(found["created"])
        if known and known != self._made:
            log.warning("%s: its stream was deleted and made anew, it is read on there", self._subscription.label)
            self._held.clear()
            self._owed.clear()
            self._base += 1 << LOG_SHIFT

    def lost(self) -> None:
        """Go on with what is here; see `connected`."""
        self._up = False
        self._source.cut()

    def _reopen(self) -> None:
        """Ask again; the consumer may have been removed, or its stream, then it is made again."""
        self._up = False  # what is settled meanwhile is owed until it is known for which stream
        if self._opening is None or self._opening.done():
            self._opening = self.inflow.spawn(self._open_again())

    async def _open_again(self) -> None:
        while self._connection.link.is_up and not self._draining:
            await self._clock.sleep(1.0)
            try:
                await self._layout.declare([self._subscription.channel], [self._subscription])
                await self._check_stream()
            except (TransportError, ConfigurationError) as error:
                log.warning("%s cannot receive: %s", self._subscription.label, error)
            else:
                self._go_on()
                return

    # --- receiving ---

    def _take(self, place: list[bytes], reply: bytes, data: bytes, headers: bytes | None) -> None:
        position = self._base + int(place[1])
        if self._draining:
            self._post([b"PUB %b 4\r\n-NAK\r\n" % reply])
            return
        known = position in self._held
        self._held[position] = reply
        if known:
            return  # it is under way here: only its lease had run out
        if not self._came:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._came.append(delivery(self._subscription, position, -1, place[3], data, headers, suspect=place[0] != b"1"))

    def _hand_over(self) -> None:
        came, self._came = self._came, []
        self.inflow.put(came)
        if self._draining:
            self._give_back([one.position for one in came])
        else:
            self._refill()

    def _refill(self) -> None:
        if self._up and not self._draining and len(self.inflow) < ENOUGH:
            self._source.pull()

    async def receive(self, limit: int) -> list[Delivery]:
        """Return what came; see Transport."""
        taken = await self.inflow.receive(limit)
        self._refill()
        return taken

    # --- settling ---

    def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge, now or on the next connection."""
        held = self._held
        replies = [held.pop(one.position, None) for one in deliveries]
        acks = [b"PUB %b 0\r\n\r\n" % reply for reply in replies if reply is not None]
        if self._up:
            self._post(acks)
        else:
            self._owed += acks

    def _post(self, commands: Sequence[bytes]) -> None:
        if commands:
            self._connection.post(b"".join(commands))

    def _give_back(self, positions: Sequence[int]) -> None:
        replies = [self._held.pop(position, None) for position in positions]
        self._post([b"PUB %b 4\r\n-NAK\r\n" % reply for reply in replies if reply is not None])

    async def _keep(self) -> None:
        """Renew the lease of what has been here for longer than one round: it is over at 0.7 of it at the latest."""
        while True:
            await self._clock.sleep(self._lease_s * 0.35)
            self._post([b"PUB %b 4\r\n+WPI\r\n" % self._held[one] for one in self._old if one in self._held])
            self._old = list(self._held)
            self._source.check()
            await self._read_lease()

    async def _read_lease(self) -> None:
        """Learn how long the lease is: a process that started later may have set another."""
        if not self._up:
            return
        try:
            found = await self._connection.ask(f"CONSUMER.INFO.{self._place}")
        except TransportError as error:
            log.debug("%s: %s", self._subscription.label, error)
        else:
            self._lease_s = found["config"]["ack_wait"] / 1e9

    async def backlog(self) -> Backlog:
        """Ask the server; see Transport."""
        found = await self._connection.ask(f"CONSUMER.INFO.{self._place}")
        in_flight = int(found["num_ack_pending"])
        return Backlog(int(found["num_pending"]) + in_flight, in_flight)

    async def drain(self) -> None:
        """Give back what nobody has asked for; see Transport."""
        self._draining = True
        waiting = self.inflow.drain()
        # First no more is asked for: the server would send what is given back to the requests of this process.
        await self._source.close()
        self._give_back([one.position for one in waiting])

    async def stop(self) -> None:
        """Give back the rest."""
        if not self._draining:
            await self.drain()
        for task in (self._task, self._opening):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._give_back(list(self._held))
