"""RabbitMQ carries the channels: quorum queues for Queues and Topics, stream queues for Streams.

Invariant: two connections, one that publishes and one that receives, live and die together: the broker blocks what
publishes when it is short of memory, and what receives must go on then.
Never does: frames (client.py). Read next: names.py, publisher.py, queue_reader.py, stream_reader.py, client.py.
Source: RabbitMQ, "Alarms": blocked connections.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.declaring import Declaring
from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.link import TIMEOUT_S, Link, Options
from trunkline.message import partition_of
from trunkline.tasks import spawn
from trunkline.transport import Address, Backlog, Capabilities, Delivery, Staged, Subscription
from trunkline.transports.rabbitmq.client import (
    ACCESS_REFUSED,
    NOT_ALLOWED,
    AmqpError,
    Arrived,
    Connection,
    connect,
    ignore,
    speaks_tls,
)
from trunkline.transports.rabbitmq.names import Declarer, Names, explained
from trunkline.transports.rabbitmq.publisher import Group, Outgoing, Publisher, Route, outgoing
from trunkline.transports.rabbitmq.queue_reader import QueueReader, per_partition
from trunkline.transports.rabbitmq.stream_reader import StreamReader, offset_of
from trunkline.transports.rabbitmq.tokens import Token, Tokens
from trunkline.wire import encode

log = logging.getLogger("trunkline.rabbitmq")

HEARTBEAT_S = 10
MOST_HEARTBEAT_S = 65_535
"""AMQP 0-9-1, connection.tune-ok: a short."""
CONNECT_S = 60.0
"""How long one host may take for signing in and declaring, on a later connection; the first one has `timeout_s`."""
ANSWER_S = 15.0
"""How long one queue may take to answer, such as to elect a leader, before it is named in the log."""
FLUSH_S = 1.0
"""How long settled messages wait to be acknowledged together with an earlier one."""
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_QUIET_S = 0.1
"""So long nothing more comes of the end of a stream, then that was it."""
_FIRST_S = 0.4
"""How long the first message of the end of a stream is waited for before it is taken to be empty."""


class RabbitmqTransport:
    """Channels on RabbitMQ."""

    capabilities = Capabilities(
        durable=True,
        processes=True,
        priority=True,
        ordered_streams=True,
        description="RabbitMQ: quorum queues, and a stream queue for each partition",
        foreign=True,
    )

    def __init__(self, address: Address, clock: Clock) -> None:
        options = Options(address)
        self._address = address
        self._clock = clock
        self._timeout_s = options.seconds("timeout_s", TIMEOUT_S)
        self._heartbeat_s = options.number("heartbeat", HEARTBEAT_S, most=MOST_HEARTBEAT_S)
        prefix = options.text("prefix", "trunkline") or ""
        files = [options.text(name) for name in ("ca", "cert", "key")]
        options.end()
        if address.scheme != "amqps" and any(files):
            raise ConfigurationError(
                "E241", f"{address.shown} has ca, cert or key without TLS", "write amqps:// in place of amqp://"
            )
        if not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                "E241", f"prefix={prefix!r} in the URL of {address.shown}", "letters, digits and '-', '_', '.'"
            )
        self._tls = _context(address, *files) if address.scheme == "amqps" else None
        self._names = Names(prefix)
        self._link = Link(address.shown, clock, self._connect)
        self._publisher = Publisher(clock, self._timeout_s, self._unreachable, self._reopen)
        self._routes: dict[str, list[Route]] = {}
        self._declaring = Declaring(self._declare_late, self._send)
        self._readers: dict[str, QueueReader | StreamReader] = {}
        self._sending: Connection | None = None
        self._receiving: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushing: asyncio.Task[None] | None = None

    # --- start ---

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Connect, declare, receive; see Transport."""
        wanted = list(subscriptions)
        self._declaring.start([*channels, *(subscription.channel for subscription in wanted)])
        for subscription in wanted:
            self._readers[subscription.label] = self._reader(subscription)
        try:
            await self._link.start(self._timeout_s)
        except BaseException:
            await self.stop()
            raise
        self._flushing = spawn(self._flush_acks(), self._failed)

    def _failed(self, error: BaseException) -> None:
        for reader in self._readers.values():
            reader.inflow.fail(error)

    def _reader(self, subscription: Subscription) -> QueueReader | StreamReader:
        channel = subscription.channel
        if isinstance(channel, Stream):
            numbers = range(channel.partitions)
            tokens = Tokens(
                [self._names.subscription(subscription, number) for number in numbers],
                self._names.subscription(subscription, "members"),
                self._publisher,
                self._clock,
            )
            logs = [self._names.partition(channel.name, number) for number in numbers]
            return StreamReader(subscription, logs, tokens, self._clock)
        if isinstance(channel, Queue):
            return QueueReader(subscription, self._names.channel(channel.name), self._clock)
        return QueueReader(subscription, self._names.subscription(subscription), self._clock)

    async def _connect(self) -> None:
        """Connect to the first host that answers, declare, receive.

        Raises: ConfigurationError E207, E244 to E246, E248; TransportError.
        """
        refused: TrunklineError | None = None
        for host, port in self._address.hosts or (("localhost", None),):
            place = host, port or (5672 if self._tls is None else 5671)
            try:
                async with asyncio.timeout(CONNECT_S):
                    await self._connect_to(*place)
            except AmqpError as error:
                refused = await self._refused(error, *place)
            except TimeoutError:
                refused = refused or TransportError("E520", f"{host} did not answer within {CONNECT_S:g} s", "")
            except ssl.SSLError as error:
                refused = self._tls_refused(error, host)
            except OSError as error:
                refused = refused or TransportError("E520", f"{host}: {error.strerror or error}", "")
            except TrunklineError as error:
                refused = error
            else:
                return
        assert refused is not None  # noqa: S101 - there is at least one host
        raise refused

    async def _connect_to(self, host: str, port: int) -> None:
        try:
            self._receiving = receiving = await self._sign_in(host, port)
            self._sending = sending = await self._sign_in(host, port, publishes=True)
            declarer = Declarer(receiving, self._names, self._routes)
            for channel in self._declaring.channels.values():
                await self._declare(declarer, channel)
            new = [await declarer.subscription(reader.subscription) for reader in self._readers.values()]
            await declarer.save(self._clock)
            await declarer.close()
            # Only now: what waits to be sent would find no queue where the broker has none yet, or none any more.
            await self._publisher.attach(await sending.channel())
            for reader, numbers in zip(self._readers.values(), new, strict=True):
                if isinstance(reader, StreamReader):
                    await self._place_tokens(reader, numbers)
            for reader in self._readers.values():
                queue = reader.queue if isinstance(reader, QueueReader) else reader.tokens.members
                await self._answered(queue, reader.open(receiving))
            # One that breaks while the other is being made: the link is not up yet and takes no notice.
            receiving.check()
            sending.check()
        except BaseException:
            await self._disconnect()
            raise

    async def _sign_in(self, host: str, port: int, *, publishes: bool = False) -> Connection:
        blocked = self._publisher.set_blocked if publishes else None
        connection = await connect(host, port, self._tls, self._clock, lost=self._lost, blocked=blocked)
        path = self._address.path
        user, password = self._address.user or "guest", self._address.password
        if password is None:
            password = "guest" if self._address.user is None else ""
        try:
            await connection.handshake(user, password, path[1:] if len(path) > 1 else "/", self._heartbeat_s)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _refused(self, error: AmqpError, host: str, port: int) -> TrunklineError:
        shown = self._address.shown
        if error.code == ACCESS_REFUSED:
            return ConfigurationError(
                "E244", f"{shown} refuses user {self._address.user or 'guest'!r}: {error.text}", "check the password"
            )
        if error.code == NOT_ALLOWED and "not found" in error.text:
            return ConfigurationError(
                "E246", f"{shown}: {error.text}", "the path of the URL names a virtual host; create it or name another"
            )
        if error.code == NOT_ALLOWED:
            return ConfigurationError("E246", f"{shown}: {error.text}", "give the user access to the virtual host")
        if "speaks TLS" in error.text or (error.early and self._tls is None and await speaks_tls(host, port)):
            return ConfigurationError("E245", f"{shown}: the port speaks TLS", "write amqps:// in place of amqp://")
        if error.early and "AMQP" in error.text:
            return ConfigurationError("E248", f"{shown}: {error.text}", "a RabbitMQ server is needed")
        return TransportError("E520", f"{host}: {error.text}", "")

    def _tls_refused(self, error: ssl.SSLError, host: str) -> ConfigurationError:
        if isinstance(error, ssl.SSLCertVerificationError):
            hint = "say ?ca=FILE if its issuer is not one that this machine knows"
        else:
            hint = "amqp:// is for a port without TLS"
        return ConfigurationError("E245", f"{self._address.shown}, host {host}: {error.reason or error}", hint)

    async def _declare(self, declarer: Declarer, channel: Channel) -> None:
        await declarer.channel(channel)
        name = self._names.channel(channel.name)
        if isinstance(channel, Stream):
            queues = [self._names.partition(channel.name, number) for number in range(channel.partitions)]
            self._routes[channel.name] = [
                Route(f"stream {channel.name!r}", "", queue, mandatory=True) for queue in queues
            ]
        elif isinstance(channel, Queue):
            self._routes[channel.name] = [Route(f"queue {channel.name!r}", "", name, mandatory=True)]
        else:
            # A Topic without any subscription takes messages all the same.
            self._routes[channel.name] = [Route(f"topic {channel.name!r}", name, "", mandatory=False)]

    async def _place_tokens(self, reader: StreamReader, numbers: Sequence[int]) -> None:
        logs, offsets = [reader.logs[number] for number in numbers], [0] * len(numbers)
        moment_s = reader.subscription.since_s
        if moment_s is not None:
            offsets = await asyncio.gather(*(self._first_since(name, moment_s) for name in logs))
        elif reader.subscription.start == "latest":
            offsets = await asyncio.gather(*(self._end_of(name) for name in logs))
        # One by one: a dead queue holds up the confirms of the others.
        for number, offset in zip(numbers, offsets, strict=True):
            token = reader.left.get(number) or Token(offset, first=True)
            await self._answered(reader.tokens.queues[number], reader.tokens.place(number, token))

    async def _answered(self, queue: str, asking: Awaitable[Any]) -> None:
        """Wait for what a queue has to answer: one without a leader never does.

        Raises: TransportError E520 that names it; whatever `asking` raises.
        """
        try:
            async with asyncio.timeout(min(ANSWER_S, self._timeout_s / 2)):
                await asking
        except TimeoutError:
            raise TransportError(
                "E520",
                f"queue {queue!r} does not answer",
                "it has no leader: start the nodes that hold it; if all run and it stays so, the broker lost it when "
                f"it was killed: rabbitmqctl delete_queue {queue!r}, and it is declared anew",
            ) from None

    async def _end_of(self, log_name: str) -> int:
        """Return the position that the next message of a stream gets: what comes of its end tells it.

        The broker's own count of messages is up to 5 s old.
        """
        assert self._receiving is not None  # noqa: S101 - called while connected
        channel = await self._receiving.channel()
        end = 0
        came = asyncio.Event()

        def arrived(batch: list[Arrived]) -> None:
            nonlocal end
            end = offset_of(batch[-1]) + 1
            channel.ack(batch[-1].tag, below=True)
            came.set()

        channel.arrived = arrived
        messages, _ = await channel.queue(log_name)
        await channel.consume(log_name, "e", 1000, {"x-stream-offset": "last"})
        wait_s = self._timeout_s if messages else _FIRST_S
        while True:
            try:
                async with asyncio.timeout(wait_s):
                    await came.wait()
            except TimeoutError:
                break
            came.clear()
            wait_s = _QUIET_S
        await channel.close()
        return end

    async def _first_since(self, log_name: str, moment_s: int) -> int:
        """Return the position of the first message of a stream that was stored at a moment or later, or of the next.

        The broker finds the first chunk that was written then or later. Where there is none it says nothing: what it
        brings to a second consumer, of the last chunk, comes after anything for the first.
        """
        end = await self._end_of(log_name)
        if not end:
            return 0
        assert self._receiving is not None  # noqa: S101 - called while connected
        channel = await self._receiving.channel()
        came = asyncio.Event()
        found = [end]

        def arrived(batch: list[Arrived]) -> None:
            found.extend(offset_of(one) for one in batch if one.consumer == b"since")
            if any(one.consumer == b"last" for one in batch):
                came.set()

        channel.arrived = arrived
        await channel.consume(log_name, "since", 1, {"x-stream-offset": datetime.fromtimestamp(moment_s, UTC)})
        await channel.consume(log_name, "last", 1, {"x-stream-offset": "last"})
        await self._answered(log_name, came.wait())
        await channel.queue(log_name)  # answered after what was brought with it
        await channel.close()
        return min(found)

    # --- the connections ---

    def _lost(self, error: AmqpError) -> None:
        """One of the connections is gone: the other goes too."""
        self._drop(error)
        self._link.lost(error)

    def _drop(self, error: AmqpError) -> None:
        for connection in self._detach():
            connection.drop(error)

    async def _disconnect(self) -> None:
        found = self._detach()
        try:
            for connection in found:
                await connection.close()
        finally:
            for connection in found:  # also where the time of a start is over in the middle of this
                connection.drop(AmqpError(0, "the connection is closed"))

    def _detach(self) -> list[Connection]:
        """Forget the connections, and what they brought; return them."""
        found = [connection for connection in (self._sending, self._receiving) if connection is not None]
        self._sending = self._receiving = None
        self._publisher.detach()
        for reader in self._readers.values():
            reader.lost()
        return found

    def _reopen(self) -> None:
        """Open a new channel to publish on, after the broker closed the last one."""
        connection = self._sending
        if connection is None:
            return
        task = asyncio.get_running_loop().create_task(self._attach_again(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attach_again(self, connection: Connection) -> None:
        try:
            await self._publisher.attach(await connection.channel())
        except AmqpError as error:
            connection.drop(error)

    def _unreachable(self) -> TransportError:
        return self._link.unreachable(self._timeout_s)

    # --- sending ---

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Publish `batch`; see Transport."""
        return self._declaring.send(batch)

    def _send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        group = self._publisher.group(len(batch))
        self._publisher.send([self._outgoing(staged, group) for staged in batch])
        return group.done

    def _outgoing(self, staged: Staged, group: Group) -> Outgoing:
        channel, message = staged.channel, staged.message
        routes = self._routes[channel.name]
        partition = partition_of(message, len(routes)) if len(routes) > 1 else 0
        priority = message.priority if isinstance(channel, Queue) and channel.priority else None
        return outgoing(routes[partition], encode(message), group, staged, priority)

    async def _declare_late(self, channels: Sequence[Channel]) -> None:
        await self._link.up(self._timeout_s)
        if self._receiving is None:
            raise self._unreachable()
        declarer = Declarer(self._receiving, self._names, self._routes)
        for channel in channels:
            try:
                await self._declare(declarer, channel)
            except AmqpError as error:
                raise explained(error, channel.name) from error
        await declarer.save(self._clock)
        await declarer.close()

    # --- receiving ---

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what the broker has brought; see Transport."""
        return await self._readers[subscription.label].inflow.receive(limit)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge `deliveries`; what an earlier connection brought is left: it comes again."""
        by_label: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            by_label.setdefault(delivery.subscription.label, []).append(delivery)
        for label, found in by_label.items():
            reader = self._readers.get(label)
            if isinstance(reader, StreamReader):
                for number, positions in per_partition(found):
                    reader.settle(number, positions)
            elif reader is not None:
                reader.settle([delivery.position for delivery in found])

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process reads `partition`; see Transport."""
        reader = self._readers.get(subscription.label)
        return isinstance(reader, StreamReader) and partition in reader.parts

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes with the partitions read here; see Transport."""
        return self._readers[subscription.label].inflow.assignment

    async def _flush_acks(self) -> None:
        """Acknowledge what has waited for an earlier one for a while: that one may take long."""
        while True:
            await self._clock.sleep(FLUSH_S)
            for reader in self._readers.values():
                if isinstance(reader, QueueReader):
                    reader.flush()

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport. What other processes have in flight, the broker does not tell."""
        await self._link.up(self._timeout_s)
        reader = self._readers[subscription.label]
        connection = self._receiving
        if connection is None:
            raise self._unreachable()
        try:
            if isinstance(reader, StreamReader):
                return await self._stream_backlog(reader)
            channel = await connection.channel()
            channel.closed = ignore
            ready, _ = await channel.queue(reader.queue)
            await channel.close()
        except AmqpError as error:
            raise explained(error, subscription.label) from error
        under_way = reader.under_way()
        return Backlog(ready + under_way, under_way)

    async def _stream_backlog(self, reader: StreamReader) -> Backlog:
        """Count the partitions that are read here: how far others are, only they know."""
        parts = list(reader.parts.items())
        ends = await asyncio.gather(*(self._end_of(reader.logs[number]) for number, _ in parts))
        waiting = sum(
            max(0, part.base + end - part.high) + part.under_way() for end, (_, part) in zip(ends, parts, strict=True)
        )  # fmt: skip
        return Backlog(waiting, sum(part.under_way() for _, part in parts))

    # --- the end ---

    async def tidy(self) -> None:
        """Do nothing: the broker removes what is older than a Stream keeps."""

    async def drain(self) -> None:
        """Stop receiving; see Transport."""
        for reader in self._readers.values():
            try:
                await reader.drain()
            except AmqpError as error:
                log.debug("%s: %s", reader.subscription.label, error.text)

    async def stop(self) -> None:
        """Give back, disconnect; see Transport."""
        self._declaring.stop()
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
            self._flushing = None
        for reader in self._readers.values():
            if isinstance(reader, StreamReader):
                await reader.stop()
            else:
                reader.flush()
        await self._link.stop()
        self._publisher.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._disconnect()


def _context(address: Address, ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Return what a TLS connection needs.

    Raises: ConfigurationError E245 if a file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            "E245",
            f"{address.shown}: a file for TLS cannot be used: {error}",
            "ca, cert and key are paths of PEM files",
        ) from error
    return context
