"""Queue, Topic and Stream on Redis Streams.

Invariant: a message is confirmed when the server has answered; what a process that died held comes again elsewhere.
Never does: store anything of handlers. Read next: publisher.py, queue.py, stream.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.declaring import Declaring
from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.link import Link
from trunkline.transport import Address, Backlog, Capabilities, Delivery, Staged, Subscription
from trunkline.transports.redis.connection import Connection, Refusal, failure, pack
from trunkline.transports.redis.layout import QUEUE_GROUP, Names, before_ms
from trunkline.transports.redis.publisher import Publisher
from trunkline.transports.redis.queue import QueueReader
from trunkline.transports.redis.reader import Reader
from trunkline.transports.redis.scripts import ALL, DECLARE, GROUP, TRIM
from trunkline.transports.redis.server import Server
from trunkline.transports.redis.stream import StreamReader

log = logging.getLogger("trunkline.transport.redis")

WATCH_S = 0.5
"""How often requests are looked at that wait too long."""
COUNTS = (7, 0)
"""From this version on a stream counts its entries, so that what waits need not be read to be counted."""


class RedisTransport:
    """Channels on the server that `address` names.

    Options: `timeout_s`, `prefix`, `lease_s` (how long a silent process keeps what it holds), `replicas` (how many must
    have a message before it is confirmed); with TLS `ca`, `cert` and `key`.
    """

    capabilities = Capabilities(
        durable=True,
        processes=True,
        priority=False,
        ordered_streams=True,
        description="Redis Streams; what is confirmed is as safe as appendfsync says (always: on disk) on one server;"
        " a failover can lose what was confirmed and had not reached the replica",
        foreign=True,
    )

    def __init__(self, address: Address, clock: Clock) -> None:
        self._server = Server(address, clock)
        self._clock = clock
        self._link = Link(address.shown, clock, self._connect)
        self._publisher = Publisher(self._server, self._link, self.failed)
        self._token = f"{socket.gethostname()}:{os.getpid()}:{clock.new_id()}"
        self._connection: Connection | None = None
        self._declaring = Declaring(self._declare_late, self._publisher.send)
        self._readers: dict[str, Reader] = {}
        self._watching: asyncio.Task[None] | None = None
        self._latest = "$"

    # --- contract ---

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Connect, declare what is missing, begin to read; see Transport."""
        wanted = list(subscriptions)
        self._declaring.start([*channels, *(subscription.channel for subscription in wanted)])
        for subscription in wanted:
            kind = StreamReader if isinstance(subscription.channel, Stream) else QueueReader
            self._readers[subscription.label] = kind(
                subscription, server=self._server, commands=self, clock=self._clock, token=self._token
            )
        self._watching = asyncio.get_running_loop().create_task(self._watch())
        try:
            await self._link.start(self._server.timeout_s)
            for doubt in self._server.doubts():
                log.warning("%s: %s", self._server.shown, doubt)
            for reader in self._readers.values():
                for probe in reader.probes():
                    await self.run(probe)
                await reader.tend()
                reader.begin()
        except BaseException:
            await self.stop()
            raise

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Publish `batch`; see Transport."""
        return self._declaring.send(batch)

    async def _declare_late(self, channels: Sequence[Channel]) -> None:
        await self._link.up(self._server.timeout_s)
        await self._declare(channels)

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what was read for `subscription`; see Transport."""
        return await self._readers[subscription.label].receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge; see Transport."""
        by_reader: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            by_reader.setdefault(delivery.subscription.label, []).append(delivery)
        for label, found in by_reader.items():
            reader = self._readers.get(label)
            if reader is not None:
                await reader.settle(found)

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process reads `partition`; see Transport."""
        return self._readers[subscription.label].owns(partition)

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes with the partitions read here; see Transport."""
        return self._readers[subscription.label].inflow.assignment

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport."""
        return await self._readers[subscription.label].backlog()

    async def tidy(self) -> None:
        """Remove what is over: retention of Streams, what every reader of a Topic has, consumers that ended."""
        seconds, _ = await self.run(pack(("TIME",)))
        for channel in self._declaring.channels.values():
            streams = Names(self._server.prefix, channel).streams
            if not isinstance(channel, Stream):
                await self.run(TRIM.run((streams[0],)))
            elif channel.retention_s is not None:
                oldest = max(0, int((int(seconds) - channel.retention_s) * 1000))
                for stream in streams:
                    await self.run(pack(("XTRIM", stream, "MINID", oldest)))
        for reader in self._readers.values():
            if isinstance(reader, QueueReader):
                await reader.sweep()

    async def drain(self) -> None:
        """Stop reading; see Transport."""
        for reader in self._readers.values():
            try:
                await reader.drain()
            except TransportError as error:
                log.warning("%s: what it holds comes again later: %s", reader.subscription.label, error)

    async def stop(self) -> None:
        """Give back what was not settled and disconnect; see Transport."""
        self._declaring.stop()
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            await reader.stop()
        if self._link.is_up:
            for reader in readers.values():
                try:
                    await reader.leave()
                except TrunklineError as error:
                    log.warning("%s: what it holds comes again later: %s", reader.subscription.label, error)
        await self._link.stop()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        connection, self._connection, self._publisher.connection = self._connection, None, None
        if connection is not None:
            await connection.close()

    # --- connection for everything that does not block ---

    async def _connect(self) -> None:
        connection = await self._server.connect(self._lost)
        try:
            await self._server.learn(connection)
            self._connection = connection
            for reply in await connection.request(b"".join(script.load for script in ALL), len(ALL)):
                if isinstance(reply, Refusal):
                    raise failure(self._server.shown, reply)  # noqa: TRY301 - closed below
            await self._declare(self._declaring.channels.values())
            await self._declare_groups()
        except BaseException:
            self._connection = None
            await connection.close()
            raise
        self._publisher.connection = connection

    def _lost(self, connection: Connection) -> None:
        if connection is self._connection:
            self._connection = self._publisher.connection = None
            self._link.lost(ConnectionError(connection.reason))

    async def _declare(self, channels: Iterable[Channel]) -> None:
        """Declare what is missing of `channels`. Raises: ConfigurationError E207 for what exists otherwise."""
        counts = int(self._server.version >= COUNTS)
        for channel in channels:
            names = Names(self._server.prefix, channel)
            partitions = len(names.streams) if isinstance(channel, Stream) else 0
            kind, existing = await self.run(DECLARE.run((names.settings,), channel.kind, partitions))
            if (kind.decode(), int(existing)) != (channel.kind, partitions):
                raise ConfigurationError(
                    "E207",
                    f"{channel.kind} {channel.name!r} with {partitions} partitions exists as {kind.decode()}"
                    f" with {existing.decode()} on {self._server.shown}",
                    "declare it as it exists, or use another name or prefix",
                )
            if isinstance(channel, Queue):
                await self.run(GROUP.run((names.streams[0],), QUEUE_GROUP, "0", counts))
        self._publisher.declare(channels)

    async def _declare_groups(self) -> None:
        counts = int(self._server.version >= COUNTS)
        for reader in self._readers.values():
            if not isinstance(reader.subscription.channel, Queue):
                begin = self._begin(reader.subscription)
                await self.run(GROUP.run(tuple(reader.names.streams), reader.group, begin, counts))
        if self._latest == "$":
            # Where a group is deleted later, what came since then is not passed over.
            seconds, _ = await self.run(pack(("TIME",)))
            self._latest = f"{seconds.decode()}000-0"

    def _begin(self, subscription: Subscription) -> str:
        """Return the id after which a new group begins."""
        if not isinstance(subscription.channel, Stream) or subscription.start == "latest":
            return self._latest
        return "0" if subscription.since_s is None else before_ms(subscription.since_s * 1000)

    async def run(self, command: bytes) -> Any:
        """Send one packed command, return its reply.

        Raises: what `failure` says of an error; TransportError E522 without a connection.
        """
        connection = self._connection
        if connection is None:
            raise TransportError("E522", f"{self._server.shown} is not connected", "it is tried again")
        (reply,) = await connection.request(command)
        if isinstance(reply, Refusal):
            raise failure(self._server.shown, reply)
        return reply

    async def run_surely(self, commands: bytes, count: int) -> None:
        """Send packed commands; again when the connection ends before they are answered."""
        while True:
            connection = self._connection
            if connection is None:
                await self.until_up()
                continue
            try:
                replies = await connection.request(commands, count)
            except TransportError as error:
                log.info("%s: settled again on the next connection: %s", self._server.shown, error)
                continue
            for reply in replies:
                if isinstance(reply, Refusal):
                    raise failure(self._server.shown, reply)
            return

    @property
    def is_up(self) -> bool:
        """Return whether there is a connection, as far as is known."""
        return self._connection is not None

    async def until_up(self) -> None:
        """Wait until there is a connection.

        Raises: TransportError E520 when the transport stops.
        """
        while self._connection is None:
            try:
                await self._link.up(self._server.timeout_s)
            except TransportError as error:
                if self._link.has_stopped:
                    raise
                log.debug("%s", error)  # the link says it

    def failed(self, error: TrunklineError) -> None:
        """Connect anew where scripts, streams or groups were deleted: connecting declares them."""
        if self._connection is not None and any(word in error.message for word in ("NOSCRIPT", "NOGROUP", "READONLY")):
            self._connection.abort(error.message)

    def interrupt(self, connection: Connection) -> None:
        """End a read that blocks, where the server allows that."""
        if self._connection is not None and connection.number:
            self._connection.request(pack(("CLIENT", "UNBLOCK", connection.number)))

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(WATCH_S)
            now = self._clock.monotonic()
            for connection in (self._connection, *(reader.connection for reader in self._readers.values())):
                if connection is not None and connection.overdue(now):
                    connection.abort(f"no answer within {self._server.timeout_s:g} s")
