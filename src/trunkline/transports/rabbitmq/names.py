"""What exists on the broker for each channel, and how it is declared.

Invariant: names are unambiguous: a colon, which no name of a channel or subscription has, separates their parts.
Never does: send or receive. Read next: transport.py.
Source: RabbitMQ, "Quorum Queues", "Streams", "Consumer Priorities and Single Active Consumer".
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import Any

from pamqp import commands

from trunkline.channel import Channel as Declared
from trunkline.channel import Queue, Stream, Topic
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.transport import Subscription
from trunkline.transports.rabbitmq.client import (
    ACCESS_REFUSED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    AmqpError,
    Channel,
    Connection,
    ignore,
)

log = logging.getLogger("trunkline.rabbitmq")

_EXCHANGES = {"queue": "direct", "topic": "fanout", "stream": "topic"}
"""Kind of a channel → type of its exchange, which tells the kinds apart on the broker."""
_CURRENT = re.compile(r"but current is (?:the value )?'?([^' ]*)'?")
_ARGUMENT = re.compile(r"inequivalent arg '([^']+)'")
_LONGEST = 255
_SEGMENT_BYTES = 50_000_000
"""Retention removes whole segments; RabbitMQ's own are ten times as large."""
_NAMES_S = 1.5
"""How long a broker before 4.0 is given to write down names by itself: it does each half second, if it has rest."""
_SCRATCH_MS = 60_000
"""After so long the broker removes a scratch queue whose process died before it could."""
_DOWN = "down or inaccessible"
"""Said of a queue that exists and does not run yet, under the code of one that does not exist."""


class Names:
    """Names of what this system has on the broker; `prefix` keeps several systems apart."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def channel(self, name: str) -> str:
        """Return the name of a channel's exchange, and of the queue of a Queue."""
        return self._checked(f"{self._prefix}.{name}")

    def partition(self, name: str, number: int) -> str:
        """Return the name of the stream queue of a partition."""
        return self._checked(f"{self._prefix}.{name}:{number}")

    def subscription(self, subscription: Subscription, part: object = None) -> str:
        """Return the name of the queue of a subscription, or of one of its parts."""
        end = "" if part is None else f":{part}"
        return self._checked(f"{self._prefix}.{subscription.channel.name}:{subscription.name}{end}")

    def scratch(self, end: str) -> str:
        """Return the name of a queue that is needed for a moment."""
        return self._checked(f"{self._prefix}.scratch:{end}")

    def _checked(self, name: str) -> str:
        if len(name.encode()) > _LONGEST:
            raise ConfigurationError(
                "E241", f"prefix={self._prefix!r} makes the name {name!r}", f"at most {_LONGEST} bytes are possible"
            )
        return name


class Declarer:
    """Declares what is missing on one connection, and verifies what is there.

    Args:
        declared: names of the channels that this process has declared before; what is missing of them was deleted.
    """

    def __init__(self, connection: Connection, names: Names, declared: Collection[str] = ()) -> None:
        self._connection = connection
        self._names = names
        self._declared = declared
        self._channel: Channel | None = None
        # RabbitMQ 4 deletes from a quorum queue what was delivered 20 times; older ones take -1 for another limit.
        self._unlimited = {"x-delivery-limit": -1} if connection.version >= (4, 0) else {}
        self._young = False
        self._new_stream = False

    async def save(self, clock: Clock) -> None:
        """See that the broker has written down which queues it has, if some were declared here that may be new.

        Before 4.0 it keeps names in memory for up to a second (Ra, `names.dets`). A broker that is killed within that
        time forgets what such a queue holds, and the queue never gets a leader again. To look for a name that it does
        not know, as to declare a quorum queue, makes it write what it has kept. Of Streams it keeps one name, that of
        what coordinates them all, which begins with the first of them: nothing that can be asked for makes it write
        that one, so it is given the time.
        """
        if self._connection.version >= (4, 0):
            return
        if self._new_stream:
            self._new_stream = False
            await clock.sleep(_NAMES_S)
        if not self._young:
            return
        self._young = False
        queue = self._names.scratch(clock.new_id())
        arguments = {**self.quorum(), "x-expires": _SCRATCH_MS}
        try:
            channel = await self._open()
            request = commands.Queue.Declare(queue=queue, durable=True, arguments=arguments)
            await channel.call(request, commands.Queue.DeclareOk)
            await channel.call(commands.Queue.Delete(queue=queue), commands.Queue.DeleteOk)
        except AmqpError as error:
            if self._connection.error is not None:
                raise  # it is not the broker that refuses: the connection is gone
            log.warning("what was declared just now is lost if the broker is killed within a second: %s", error.text)

    async def close(self) -> None:
        """Close the channel used here."""
        if self._channel is not None:
            await self._channel.close()

    async def _open(self) -> Channel:
        if self._channel is None or self._channel.error is not None:
            self._channel = await self._connection.channel()
            self._channel.closed = ignore  # a refusal is the answer to a call
        return self._channel

    async def channel(self, channel: Declared) -> None:
        """Declare a channel.

        Raises: ConfigurationError E207, E246 or E248; TransportError.
        """
        name = self._names.channel(channel.name)
        await self._exchange(channel, name)
        if isinstance(channel, Queue):
            await self._queue(channel, name, self._classic() if channel.priority else self.quorum())
            await self._bind(name, name, name)
        elif isinstance(channel, Stream):
            await self._stream(channel, name)

    async def subscription(self, subscription: Subscription) -> list[int]:
        """Declare what one subscription has; return the partitions of a Stream that have no token yet.

        Raises: see `channel`.
        """
        channel = subscription.channel
        name = self._names.subscription(subscription)
        if isinstance(channel, Topic):
            await self._queue(channel, name, self.quorum())
            await self._bind(name, self._names.channel(channel.name), "")
        if not isinstance(channel, Stream):
            return []
        await self._queue(channel, self._names.subscription(subscription, "members"), self.quorum())
        new = []
        single = {**self.quorum(), "x-single-active-consumer": True}
        for number in range(channel.partitions):
            messages, consumers = await self._queue(channel, self._names.subscription(subscription, number), single)
            if not messages and not consumers:
                new.append(number)
        return new

    def quorum(self) -> dict[str, Any]:
        """Return the arguments of a replicated queue."""
        return {"x-queue-type": "quorum", **self._unlimited}

    def _classic(self) -> dict[str, Any]:
        return {"x-queue-type": "classic", "x-max-priority": 9}

    async def _stream(self, channel: Stream, name: str) -> None:
        """Declare the partitions, the first one last: where it is, all are."""
        last = self._names.partition(channel.name, channel.partitions - 1)
        first = self._names.partition(channel.name, 0)
        known = await self.exists(first)
        beyond = self._names.partition(channel.name, channel.partitions)
        fewer = known and channel.name not in self._declared and not await self.exists(last)
        if fewer or await self.exists(beyond):
            raise await self._other_partitions(channel)
        self._new_stream = self._new_stream or not known
        arguments: dict[str, Any] = {"x-queue-type": "stream"}
        if channel.retention_s is not None:
            arguments["x-max-age"] = f"{max(1, round(channel.retention_s))}s"
            arguments["x-stream-max-segment-size-bytes"] = _SEGMENT_BYTES
        for number in reversed(range(channel.partitions)):
            queue = self._names.partition(channel.name, number)
            await self._queue(channel, queue, arguments)
            await self._bind(queue, name, str(number))

    async def _other_partitions(self, channel: Stream) -> ConfigurationError:
        count = 0
        while await self.exists(self._names.partition(channel.name, count)):
            count += 1
        return ConfigurationError(
            "E207",
            f"stream {channel.name!r} with {channel.partitions} partitions exists with {count}",
            "declare it as it exists, or use another name",
        )

    async def exists(self, queue: str) -> bool:
        """Return whether there is a queue."""
        try:
            await (await self._open()).queue(queue)
        except AmqpError as error:
            if error.code == NOT_FOUND and _DOWN not in error.text:
                return False
            raise explained(error, queue) from error
        return True

    async def _exchange(self, channel: Declared, name: str) -> None:
        kind = _EXCHANGES[channel.kind]
        request = commands.Exchange.Declare(exchange=name, exchange_type=kind, durable=True)
        try:
            await (await self._open()).call(request, commands.Exchange.DeclareOk)
        except AmqpError as error:
            if error.code != PRECONDITION_FAILED:
                raise explained(error, name) from error
            current = _CURRENT.search(error.text)
            found = {exchange: kind for kind, exchange in _EXCHANGES.items()}
            exists = f"exists as {found.get(current[1], current[1])}" if current else f"exists otherwise: {error.text}"
            raise ConfigurationError(
                "E207", f"{channel.kind} {channel.name!r} {exists}", "declare it as it exists, or use another name"
            ) from error

    async def _queue(self, channel: Declared, queue: str, arguments: dict[str, Any]) -> tuple[int, int]:
        """Declare a queue; return (messages ready, consumers)."""
        request = commands.Queue.Declare(queue=queue, durable=True, arguments=arguments)
        try:
            found = await (await self._open()).call(request, commands.Queue.DeclareOk)
        except AmqpError as error:
            if error.code != PRECONDITION_FAILED:
                raise explained(error, queue) from error
            return await self._as_it_is(channel, queue, error)
        messages, consumers = found.message_count or 0, found.consumer_count or 0
        if arguments["x-queue-type"] == "quorum" and not messages and not consumers:
            self._young = True
        return messages, consumers

    async def _as_it_is(self, channel: Declared, queue: str, error: AmqpError) -> tuple[int, int]:
        """Accept a queue that differs in what may differ: how long it keeps, how often it delivers."""
        argument = _ARGUMENT.search(error.text)
        current = _CURRENT.search(error.text)
        if argument is not None and argument[1] in ("x-max-age", "x-stream-max-segment-size-bytes", "x-delivery-limit"):
            log.warning("queue %s stays as it is; a policy can change it: %s", queue, error.text)
            return await (await self._open()).queue(queue)
        what = f"{argument[1]} {current[1] or 'none'}" if argument is not None and current is not None else error.text
        priority = " with priority" if isinstance(channel, Queue) and channel.priority else ""
        raise ConfigurationError(
            "E207",
            f"{channel.kind} {channel.name!r}{priority}: its queue {queue} exists with other settings ({what})",
            "declare it as it exists, or use another name",
        ) from error

    async def _bind(self, queue: str, exchange: str, key: str) -> None:
        request = commands.Queue.Bind(queue=queue, exchange=exchange, routing_key=key)
        try:
            await (await self._open()).call(request, commands.Queue.BindOk)
        except AmqpError as error:
            raise explained(error, queue) from error


def explained(error: AmqpError, what: str) -> TrunklineError:
    """Return what an answer of the broker means for somebody who wants `what`."""
    if error.code == ACCESS_REFUSED:
        return ConfigurationError(
            "E246", f"{what}: {error.text}", "give the user configure, write and read permission for it"
        )
    if error.code in (540, PRECONDITION_FAILED) and "stream" in error.text:
        return ConfigurationError("E248", f"{what}: {error.text}", "Streams need RabbitMQ 3.9 or later")
    return TransportError("E520", f"{what}: {error.text or 'the broker did not answer'}", "see the broker's log")
