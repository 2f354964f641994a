"""Queue, Topic and Stream on NATS JetStream.

Invariant: `send` returns when JetStream has stored every message; one process reads a partition of a Stream.
Never does: inbox or dead letters (store.py). Read next: connection.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterable, Sequence

from trunkline.channel import Channel, Stream
from trunkline.clock import Clock
from trunkline.declaring import Declaring
from trunkline.errors import ConfigurationError
from trunkline.link import TIMEOUT_S, Options
from trunkline.message import partition_of
from trunkline.partitions import LEASE_S
from trunkline.transport import Address, Backlog, Capabilities, Delivery, Staged, Subscription
from trunkline.transports.nats.connection import Connection
from trunkline.transports.nats.layout import Layout, Names, durable
from trunkline.transports.nats.leases import BucketLeases
from trunkline.transports.nats.publisher import Publisher
from trunkline.transports.nats.queues import QueueReader
from trunkline.transports.nats.streams import StreamReader


class NatsTransport:
    """Channels on the server that `address` names."""

    capabilities = Capabilities(
        durable=True,
        processes=True,
        priority=False,
        ordered_streams=True,
        description="NATS JetStream, file storage; publishes confirmed, deduplicated for two minutes",
        foreign=True,
    )

    def __init__(self, address: Address, clock: Clock) -> None:
        options = Options(address)
        self._clock = clock
        self._timeout_s = options.seconds("timeout_s", TIMEOUT_S)
        prefix = options.text("prefix", "trunkline") or ""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", prefix):
            raise ConfigurationError(
                "E241", f"prefix={prefix!r} in the URL of {address.shown}", "letters, digits, - and _"
            )
        self._lease_s = options.lease(LEASE_S)
        replicas = options.number("replicas", 0, least=1) or None
        self._connection = Connection(
            address, options, clock, established=self._established, lost=self._lost, denied=self._denied
        )
        options.end()
        if address.path.strip("/"):
            raise ConfigurationError("E241", f"{address.shown} has a path", "NATS has none; write it as prefix")
        self._names = Names(prefix)
        self._layout = Layout(self._connection, self._names, replicas, self._lease_s)
        self._publisher = Publisher(self._connection, clock, self._timeout_s)
        self._declaring = Declaring(self._declare, self._send)
        self._subscriptions: list[Subscription] = []
        self._readers: dict[str, QueueReader | StreamReader] = {}
        self._subjects: dict[str, bytes | list[bytes]] = {}

    # --- the connection ---

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Connect, declare what is missing, begin to receive; see Transport."""
        self._subscriptions = list(subscriptions)
        self._declaring.start([*channels, *(subscription.channel for subscription in self._subscriptions)])
        for subscription in self._subscriptions:
            self._readers[subscription.label] = self._reader(subscription)
        try:
            await self._connection.link.start(self._timeout_s)
        except BaseException:
            await self.stop()
            raise

    def _reader(self, subscription: Subscription) -> QueueReader | StreamReader:
        channel = subscription.channel
        stream = self._names.stream(channel)
        if not isinstance(channel, Stream):
            return QueueReader(
                self._connection, self._layout, self._clock, subscription, stream, durable(subscription),
                self._lease_s,
            )  # fmt: skip
        leases = BucketLeases(
            self._connection, self._clock, self._names.bucket, self._names.cursors(subscription),
            channel.partitions, self._lease_s,
        )  # fmt: skip
        return StreamReader(
            self._connection, self._layout, self._clock, subscription, stream, self._names.subject(channel), leases,
            self._lease_s,
        )  # fmt: skip

    async def _established(self) -> None:
        """Make what a new connection needs."""
        await self._layout.check_server()
        await self._layout.declare(self._declaring.channels.values(), self._subscriptions)
        for reader in self._readers.values():
            await reader.connected()
        await self._publisher.connected()

    def _lost(self) -> None:
        self._publisher.lost()
        for reader in self._readers.values():
            reader.lost()

    def _denied(self, subject: str, error: ConfigurationError) -> None:
        self._publisher.denied(subject, error)

    # --- contract ---

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Publish `batch`; see Transport."""
        return self._declaring.send(batch)

    async def _declare(self, channels: Sequence[Channel]) -> None:
        await self._connection.link.up(self._timeout_s)
        await self._layout.declare(channels, ())

    def _send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        return self._publisher.send([(self._subject(staged), staged) for staged in batch])

    def _subject(self, staged: Staged) -> bytes:
        channel = staged.channel
        subject = self._subjects.get(channel.name)
        if subject is None:
            text = self._names.subject(channel)
            subject = (
                [f"{text}.{number}".encode() for number in range(channel.partitions)]
                if isinstance(channel, Stream)
                else text.encode()
            )
            self._subjects[channel.name] = subject
        return subject if isinstance(subject, bytes) else subject[partition_of(staged.message, len(subject))]

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what is ready for `subscription`; see Transport."""
        return await self._readers[subscription.label].receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge `deliveries`, or move their partitions' cursors; see Transport."""
        by_reader: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            by_reader.setdefault(delivery.subscription.label, []).append(delivery)
        for label, settled in by_reader.items():
            self._readers[label].settle(settled)

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process reads `partition`; see Transport."""
        reader = self._readers[subscription.label]
        return isinstance(reader, StreamReader) and partition in reader.partitions

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes with the partitions read here; see Transport."""
        return self._readers[subscription.label].inflow.assignment

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport."""
        return await self._readers[subscription.label].backlog()

    async def tidy(self) -> None:
        """Do nothing: JetStream removes what a Stream need not keep."""

    async def drain(self) -> None:
        """Stop receiving; see Transport."""
        await asyncio.gather(*(reader.drain() for reader in self._readers.values()))

    async def stop(self) -> None:
        """Give back what was not settled and disconnect; see Transport."""
        self._declaring.stop()
        await asyncio.gather(*(reader.stop() for reader in self._readers.values()))
        self._publisher.stop()
        await self._connection.close()
