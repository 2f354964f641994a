"""A RabbitMQ broker as an operator sees it, as far as AMQP 0-9-1 tells: queues, their kinds, what is ready.

Invariant: only queues that exist are asked about, by declaring them as they should be, which changes nothing; no
message is taken from a queue of ours. What only `rabbitmqctl` or the management plugin knows is said to be unknown.
Read next: names.py, judgement.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence

from pamqp import commands, frame, header

from trunkline.channel import Channel, Queue, Stream, Topic
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError
from trunkline.inspection import Finding, Lag, Seen
from trunkline.transport import Address, Subscription
from trunkline.transports.rabbitmq.client import NOT_FOUND, AmqpError, Arrived, Connection, ignore
from trunkline.transports.rabbitmq.judgement import judge_alarm, judge_channel, judge_server
from trunkline.transports.rabbitmq.names import Declarer, Names, explained
from trunkline.transports.rabbitmq.queue_reader import read_message
from trunkline.transports.rabbitmq.stream_reader import id_of, offset_of
from trunkline.transports.rabbitmq.transport import RabbitmqTransport

ALARM_S = 0.5
"""How long the broker has to say that it takes no messages now."""
QUIET_S = 1.0
"""So long nothing more comes of a stream, then that was all."""
PREFETCH = 500


class Door(RabbitmqTransport):
    """Signs in as the transport does, and declares and reads nothing."""

    async def enter(self) -> Connection:
        """Return a connection.

        Raises: as `_connect`.
        """
        await self._connect()
        assert self._receiving is not None  # noqa: S101 - connected
        return self._receiving

    async def leave(self) -> None:
        """Disconnect."""
        await self._disconnect()

    async def alarm(self) -> str | None:
        """Return why the broker takes no messages now, or None.

        It tells a connection that publishes, and reads no more from it. So this one publishes to nobody, and is left.
        """
        connection = await self.enter()
        try:
            channel = await connection.channel()
            nowhere = commands.Basic.Publish(exchange="", routing_key=f"trunkline.nowhere.{self._clock.new_id()}")
            parts = frame.marshal(nowhere, channel.number), frame.marshal(header.ContentHeader(), channel.number)
            connection.write(b"".join(parts))
            await self._clock.sleep(ALARM_S)
        except AmqpError as error:
            raise explained(error, "looking for alarms") from error
        finally:
            reason = self._publisher.blocked
            self._drop(AmqpError(0, "the connection is closed"))
        return reason

    async def _connect_to(self, host: str, port: int) -> None:
        self._receiving = await self._sign_in(host, port, publishes=True)

    @property
    def names(self) -> Names:
        """Return the names of what is on the broker."""
        return self._names

    @property
    def shown(self) -> str:
        """Return the URL without secrets."""
        return self._address.shown


class RabbitmqInspector:
    """Looks at the broker that `address` names."""

    def __init__(self, address: Address, clock: Clock) -> None:
        self._door = Door(address, clock)
        self._bell = Door(address, clock)
        self._connection: Connection | None = None

    @property
    def _there(self) -> Connection:
        assert self._connection is not None  # noqa: S101 - opened
        return self._connection

    async def open(self) -> None:
        """Connect; see Inspector."""
        try:
            self._connection = await self._door.enter()
        except TransportError as error:
            raise TransportError(
                "E520", f"{self._door.shown}: {error.message}", error.hint or "check that it runs"
            ) from error

    async def close(self) -> None:
        """Disconnect; see Inspector."""
        await self._door.leave()

    # --- settings ---

    async def examine(
        self, channels: Sequence[Channel], subscriptions: Sequence[Subscription], held_s: float
    ) -> list[Finding]:
        """Return what can be told; see Inspector."""
        found = [*judge_server(self._there.version, held_s), judge_alarm(await self._bell.alarm())]
        declarer = Declarer(self._there, self._door.names)
        for channel in channels:
            found += await self._channel(declarer, channel)
        for subscription in subscriptions:
            found += await self._subscription(declarer, subscription)
        await declarer.close()
        return found

    async def _channel(self, declarer: Declarer, channel: Channel) -> list[Finding]:
        names = self._door.names
        first = names.partition(channel.name, 0) if isinstance(channel, Stream) else names.channel(channel.name)
        if isinstance(channel, Topic) or not await declarer.exists(first):
            return []
        return await self._compared(channel, declarer.channel(channel))

    async def _subscription(self, declarer: Declarer, subscription: Subscription) -> list[Finding]:
        if not isinstance(subscription.channel, Topic):
            return []
        if not await declarer.exists(self._door.names.subscription(subscription)):
            return []
        return await self._compared(subscription.channel, declarer.subscription(subscription))

    async def _compared(self, channel: Channel, declaring: Awaitable[object]) -> list[Finding]:
        try:
            await declaring
        except ConfigurationError as error:
            if error.code != "E207":
                raise
            return [
                Finding(
                    f"{channel.kind} {channel.name}", "declared as", "another", "broken",
                    f"{error.message}; the system does not start", error.hint, channel=channel.name,
                )
            ]  # fmt: skip
        return judge_channel(channel)

    # --- what waits ---

    async def look(self, subscriptions: Sequence[Subscription]) -> list[Lag | None]:
        """Count what is ready; see Inspector. How far readers of a Stream are, only they know."""
        return [await self._lag(subscription) for subscription in subscriptions]

    async def _lag(self, subscription: Subscription) -> Lag | None:
        channel = subscription.channel
        if isinstance(channel, Stream):
            return Lag(None)
        names = self._door.names
        queue = names.channel(channel.name) if isinstance(channel, Queue) else names.subscription(subscription)
        try:
            asking = await self._there.channel()
            asking.closed = ignore  # a refusal is the answer to a call
            ready, _ = await asking.queue(queue)
            await asking.close()
        except AmqpError as error:
            if error.code == NOT_FOUND:
                return None
            raise explained(error, subscription.label) from error
        return Lag(ready)

    # --- messages ---

    async def read(self, channel: Channel, *, from_start: bool, follow: bool) -> AsyncIterator[Seen]:
        """Yield what a Stream holds, or copies of what comes to a Topic; see Inspector.

        Raises: ConfigurationError E230 for a Queue: RabbitMQ hands its messages to whoever looks at them.
        """
        if isinstance(channel, Queue) or (isinstance(channel, Topic) and not follow):
            raise ConfigurationError(
                "E230",
                f"{self._door.shown} hands out what waits in {channel.kind} {channel.name!r} only by taking it",
                '"trunkline backlog" counts it, a handler takes it; where there is a store "trunkline dead list" shows'
                " what failed",
            )
        came: asyncio.Queue[list[Arrived]] = asyncio.Queue()
        try:
            reading = await self._there.channel()
            reading.closed = ignore
            reading.arrived = came.put_nowait
            if isinstance(channel, Stream):
                offset = "first" if from_start or not follow else "next"
                for number in range(channel.partitions):
                    queue = self._door.names.partition(channel.name, number)
                    await reading.consume(queue, str(number), PREFETCH, {"x-stream-offset": offset})
            else:
                asked = commands.Queue.Declare(queue="", exclusive=True, auto_delete=True)
                made = await reading.call(asked, commands.Queue.DeclareOk)
                bind = commands.Queue.Bind(queue=str(made.queue), exchange=self._door.names.channel(channel.name))
                await reading.call(bind, commands.Queue.BindOk)
                await reading.consume(str(made.queue), "look", PREFETCH)
        except AmqpError as error:
            if error.code == NOT_FOUND:
                raise ConfigurationError(
                    "E233", f"no {channel.kind} {channel.name!r} on {self._door.shown}", "start a service first"
                ) from error
            raise explained(error, channel.name) from error
        while True:
            try:
                async with asyncio.timeout(None if follow else QUIET_S):
                    batch = await came.get()
            except TimeoutError:
                return
            for arrived in batch:
                yield _seen(arrived, channel)
            reading.ack(batch[-1].tag, below=True)


def _seen(arrived: Arrived, channel: Channel) -> Seen:
    position = offset_of(arrived) if isinstance(channel, Stream) else arrived.tag
    message, _ = read_message(arrived, channel.plain, channel.name, id_of(channel.name, position, arrived.body), 0.0)
    return Seen(position, message, arrived.body if message is None else b"")
