"""Queue, Topic and Stream as topics of Apache Kafka.

Invariant: each subscription of a channel is one consumer group; what exists on the cluster is checked, never changed.
A Queue or Topic has as many partitions as the URL says, a Stream exactly its own. Read next: reader.py, publisher.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from trunkline.channel import Channel, Stream
from trunkline.clock import Clock, offload
from trunkline.declaring import Declaring
from trunkline.errors import ConfigurationError, TransportError
from trunkline.link import Link
from trunkline.tasks import spawn
from trunkline.transport import Address, Backlog, Capabilities, Delivery, Staged, Subscription
from trunkline.transports.kafka.cluster import Cluster
from trunkline.transports.kafka.publisher import Publisher
from trunkline.transports.kafka.reader import Reader
from trunkline.transports.kafka.settings import read_settings

log = logging.getLogger("trunkline.kafka")

WATCH_S = 2.0
"""How often it is looked whether a topic that is read was made anew."""
AGAIN_S = 1.0
"""Between two tries to make a topic again."""


class KafkaTransport:
    """Channels on one cluster."""

    capabilities = Capabilities(
        durable=True,
        processes=True,
        priority=False,
        ordered_streams=True,
        description="Apache Kafka: topics and consumer groups, acknowledged by all replicas in step",
        foreign=True,
    )

    def __init__(self, address: Address, clock: Clock) -> None:
        self._settings = read_settings(address)
        self._clock = clock
        self._cluster = Cluster(self._settings, clock)
        self._link = Link(self._settings.shown, clock, self._connect)
        self._readers: dict[str, Reader] = {}
        self._partitions: dict[str, int] = {}
        self._publisher = Publisher(self._settings, self._gone, self._too_large)
        self._declaring = Declaring(self._declare, self._publisher.send)
        self._stopping = False
        self._restoring: dict[str, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._limiting: dict[str, asyncio.Task[None]] = {}

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Reach the cluster, make the topics, join the groups; see Transport."""
        try:
            await self._link.start(self._settings.timeout_s)
            subscriptions = list(subscriptions)
            self._declaring.start([*channels, *(subscription.channel for subscription in subscriptions)])
            await self._declare(list(self._declaring.channels.values()))
            self._publisher.start()
            reading = [self._read(subscription) for subscription in subscriptions]
            await _all(reading)
            if self._readers:
                self._watching = spawn(self._watch(), _failed)
        except BaseException:
            await self.stop()
            raise

    async def _declare(self, channels: Sequence[Channel]) -> None:
        self._partitions |= await offload(self._cluster.declare, channels)
        await self._keep_within(channels)

    async def _keep_within(self, channels: Sequence[Channel]) -> None:
        """Have batches fit the topics of some channels."""
        await self._publisher.keep_within(await offload(self._cluster.least_limit, channels))

    def _too_large(self, channel: Channel) -> None:
        """Look whether a topic takes less than it did: a batch can be too large where each of its messages is not."""
        self._once(self._limiting, channel, self._look_at_limit)

    async def _look_at_limit(self, channel: Channel) -> None:
        try:
            await self._keep_within([channel])
        except (TransportError, ConfigurationError) as error:
            log.debug("the limit of %r is not known: %s", channel.name, error)

    def _gone(self, channel: Channel) -> None:
        """Declare a channel again whose topic is not there any more."""
        self._once(self._restoring, channel, self._restore)

    def _once(
        self,
        running: dict[str, asyncio.Task[None]],
        channel: Channel,
        work: Callable[[Channel], Coroutine[Any, Any, None]],
    ) -> None:
        """Run `work(channel)` unless it runs already, or the transport stops."""
        if channel.name not in running and not self._stopping:
            running[channel.name] = task = spawn(work(channel), _failed)
            task.add_done_callback(lambda _: running.pop(channel.name, None))

    async def _restore(self, channel: Channel) -> None:
        topic = self._settings.topic(channel.name)
        told = False
        while True:
            try:
                if not told and await offload(self._cluster.exists, topic):
                    return
                if not told:
                    told = True
                    log.warning(
                        "%s: topic %s was deleted, and what was in it is lost; it is made again: keep it from being "
                        "deleted while services run", self._settings.shown, topic,
                    )  # fmt: skip
                await self._declare([channel])
                await offload(self._publisher.look, topic)
            except (TransportError, ConfigurationError) as error:
                log.warning("topic %s is not made again: %s", topic, error)
                if isinstance(error, ConfigurationError):
                    return
                await self._clock.sleep(AGAIN_S)
            else:
                return

    async def _watch(self) -> None:
        """Tell readers which topic has the name of theirs, until cancelled."""
        readers = list(self._readers.values())
        topics = sorted({reader.topic for reader in readers})
        while True:
            await self._clock.sleep(WATCH_S)
            try:
                found = await offload(self._cluster.topic_ids, topics)
            except (TransportError, ConfigurationError) as error:
                log.debug("whether topics were made anew is not known: %s", error)
                continue
            for reader in readers:
                if reader.topic in found:
                    reader.look_at(found[reader.topic])

    async def _connect(self) -> None:
        await offload(self._cluster.connect)

    async def _read(self, subscription: Subscription) -> None:
        reader = Reader(subscription, self._settings, self._clock, self._gone)

        def prepare() -> None:
            reader.prepare(self._cluster, self._begins(subscription, reader.topic))

        self._readers[subscription.label] = reader
        await offload(prepare)
        reader.start()

    def _begins(self, subscription: Subscription, topic: str) -> dict[int, int]:
        """Return where a new group begins, per partition; blocks."""
        channel, moment_s = subscription.channel, subscription.since_s
        partitions = self._partitions[channel.name]
        if isinstance(channel, Stream) and moment_s is not None:
            return self._cluster.since(topic, partitions, moment_s)
        from_oldest = channel.kind == "queue" or (isinstance(channel, Stream) and subscription.start == "earliest")
        return self._cluster.ends(topic, partitions, earliest=from_oldest)

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Send `batch`; see Transport."""
        return self._declaring.send(batch)

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what is there; see Transport."""
        return await self._readers[subscription.label].receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Note what need not come again; it is committed within a tenth of a second."""
        subscriptions = {delivery.subscription for delivery in deliveries}
        for subscription in subscriptions:
            reader = self._readers.get(subscription.label)
            if reader is not None:
                one = len(subscriptions) == 1
                reader.settle(deliveries if one else [d for d in deliveries if d.subscription is subscription])

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process reads `partition`; see Transport."""
        reader = self._readers.get(subscription.label)
        return reader is not None and partition in reader.held

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes with the partitions read here; see Transport."""
        reader = self._readers.get(subscription.label)
        return -1 if reader is None else reader.inflow.assignment

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Ask how far the group is behind the end; see Transport."""
        reader = self._readers[subscription.label]
        partitions = self._partitions[subscription.channel.name]
        ends = await offload(self._cluster.ends, reader.topic, partitions)
        known = await offload(self._cluster.committed, reader.group, reader.topic, partitions)
        known |= reader.settled_offsets()
        if missing := [number for number in ends if number not in known]:
            begins = await offload(lambda: self._cluster.ends(reader.topic, partitions, earliest=True))
            known |= {number: begins[number] for number in missing}
        waiting = sum(max(0, end - known[number]) for number, end in ends.items())
        return Backlog(waiting, sum(map(len, reader.held.values())))

    async def tidy(self) -> None:
        """Delete what every group of a Queue or Topic read here has handled: Kafka keeps it otherwise for ever."""
        names = {reader.subscription.channel.name for reader in self._readers.values() if reader.deletes}
        for name in names:
            try:
                await offload(self._cluster.delete_handled, name, self._partitions[name])
            except (ConfigurationError, TransportError) as error:
                log.warning("handled messages of %r stay on the disk: %s", name, error)

    async def drain(self) -> None:
        """Stop reading; see Transport."""
        for reader in self._readers.values():
            reader.drain()

    async def stop(self) -> None:
        """Commit, leave the groups, disconnect."""
        self._declaring.stop()
        self._stopping = True
        restoring = [*self._restoring.values(), *self._limiting.values()]
        if self._watching is not None:
            restoring.append(self._watching)
        for task in restoring:
            task.cancel()
        await asyncio.gather(*restoring, return_exceptions=True)
        await self._link.stop()
        await asyncio.gather(*(reader.stop() for reader in self._readers.values()))
        self._readers.clear()
        await self._publisher.stop()
        await offload(self._cluster.close)


async def _all(acts: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Await all of `acts` to their end, then raise what the first of them raised that failed.

    To their end when cancelled too: a thread cannot be interrupted, and a client must not be closed under it.
    """
    done = asyncio.gather(*acts, return_exceptions=True)
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await done
        raise
    for failed in done.result():
        if failed is not None:
            raise failed


def _failed(error: BaseException) -> None:
    """Tell what ended a task of which only refusals and lost connections are expected."""
    log.error("a task of the Kafka transport has ended", exc_info=error)
