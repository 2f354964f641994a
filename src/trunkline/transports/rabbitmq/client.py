"""AMQP 0-9-1 over one TCP connection: handshake, channels, calls, deliveries, confirms.

Invariant: bytes are cut into frames in one pass and messages are handed over by the batch, without a task, future or
frame object for each; every call ends, with its answer or with AmqpError.
Never does: reconnect (link.py), names and meaning (transport.py). Read next: publisher.py.
Source: AMQP 0-9-1 §2.3 and §4.2; RabbitMQ's extensions (confirms, connection.blocked, consumer cancel).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections import deque
from collections.abc import Callable
from itertools import count
from struct import Struct
from typing import Any, TypeVar

import msgspec
from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.exceptions import PAMQPException

from trunkline.clock import Clock

log = logging.getLogger("trunkline.rabbitmq")
F = TypeVar("F", bound=Frame)

_METHOD, _HEADER, _BODY = 1, 2, 3
_END = 0xCE
_frame = Struct(">BHI").unpack_from
_index = Struct(">I").unpack_from
_tag = Struct(">QB").unpack_from
_ack = Struct(">BHIIQBB").pack
_content = Struct(">QH").unpack_from
_short = Struct(">H").unpack_from

_DELIVER, _RETURN, _ACK, _NACK = 0x3C003C, 0x3C0032, 0x3C0050, 0x3C0078
_CANCEL, _CHANNEL_CLOSE = 0x3C001E, 0x140028
_CLOSE, _CLOSE_OK, _BLOCKED, _UNBLOCKED = 0xA0032, 0xA0033, 0xA003C, 0xA003D

ACCESS_REFUSED, NOT_FOUND, LOCKED, PRECONDITION_FAILED, NOT_ALLOWED = 403, 404, 405, 406, 530
"""Reply codes (AMQP 0-9-1 §1.2)."""
_NOT_AMQP = "what came is not AMQP 0-9-1"
CHANNEL_CLOSE_S = 5.0
"""How long a channel waits for the broker to close it."""
CLOSE_S = 2.0
"""How long the broker's farewell is waited for."""


class AmqpError(Exception):
    """The broker closed a channel or the connection, or the connection broke.

    Args:
        code: AMQP reply code such as 404; 0 where there is none.
        early: whether the connection broke before the broker said anything.
    """

    def __init__(self, code: int, text: str, *, early: bool = False) -> None:
        self.code = code
        self.text = text
        self.early = early
        super().__init__(text)


class Arrived(msgspec.Struct, gc=False):
    """One message as it came.

    Attributes:
        consumer: tag of the consumer it is for.
        tag: of the delivery, rising from 1 in each channel.
        again: it was delivered before.
        flags: which properties are set. properties: those, encoded.
    """

    consumer: bytes
    tag: int
    again: bool
    flags: int
    properties: bytes
    body: bytes

    def decoded(self) -> commands.Basic.Properties:
        """Return the properties.

        Raises: ValueError if they are none.
        """
        found = commands.Basic.Properties()
        found.unmarshal(self.flags, self.properties)
        return found


class Returned(msgspec.Struct, gc=False):
    """One message that no queue took."""

    reason: str
    routing_key: str
    body: bytes


class Channel:
    """One channel.

    Attributes:
        arrived: gets what came in one read of the socket. confirmed: gets (tag, also all lower ones, taken).
        returned: gets what could not be routed. closed: told that the broker closed the channel.
    """

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.arrived: Callable[[list[Arrived]], None] = ignore
        self.confirmed: Callable[[int, bool, bool], None] = ignore
        self.returned: Callable[[Returned], None] = ignore
        self.closed: Callable[[AmqpError], None] = connection.drop
        self.error: AmqpError | None = None
        self._closing = False
        self._calls: deque[asyncio.Future[Any]] = deque()
        self._batch: list[Arrived] = []
        self._head: tuple[bytes, int, bool] | Returned | None = None
        self._left = 0
        self._flags = 0
        self._properties = b""
        self._parts: list[bytes] = []

    # --- asking ---

    async def call(self, request: Frame, answer: type[F]) -> F:
        """Send a method and wait for its answer.

        Raises: AmqpError.
        """
        if self.error is not None:
            raise self.error
        if self._closing:
            raise AmqpError(0, "the channel is being closed")
        found = await self._ask(request)
        if not isinstance(found, answer):
            raise AmqpError(0, f"{type(found).__name__} came as an answer to {type(request).__name__}")
        return found

    def _ask(self, request: Frame) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append(future)
        self.connection.write(frame.marshal(request, self.number))
        return future

    async def consume(self, queue: str, consumer: str, prefetch: int, arguments: dict[str, Any] | None = None) -> None:
        """Have what is in a queue delivered.

        Args:
            prefetch: most unacknowledged messages of this consumer, 0 for any number.
        Raises: AmqpError.
        """
        await self.call(commands.Basic.Qos(prefetch_count=prefetch), commands.Basic.QosOk)
        await self.call(
            commands.Basic.Consume(queue=queue, consumer_tag=consumer, arguments=arguments), commands.Basic.ConsumeOk
        )

    async def cancel(self, consumer: str) -> None:
        """Have nothing more delivered to a consumer; what came stays unacknowledged.

        Raises: AmqpError.
        """
        await self.call(commands.Basic.Cancel(consumer_tag=consumer), commands.Basic.CancelOk)

    async def queue(self, name: str) -> tuple[int, int]:
        """Return (messages ready, consumers) of a queue.

        Raises: AmqpError, 404 if there is none; then the channel is closed.
        """
        found = await self.call(commands.Queue.Declare(queue=name, passive=True), commands.Queue.DeclareOk)
        return found.message_count or 0, found.consumer_count or 0

    def ack(self, tag: int, *, below: bool = False) -> None:
        """Acknowledge a delivery, with `below` all before it too."""
        if self.error is None and not self._closing:
            self.connection.write(_ack(_METHOD, self.number, 13, _ACK, tag, below, _END))

    def give_back(self, tag: int) -> None:
        """Let the broker deliver it again, to whoever asks."""
        if self.error is None and not self._closing:
            self.connection.write(_ack(_METHOD, self.number, 13, _NACK, tag, 2, _END))  # bit 1: requeue

    async def close(self) -> None:
        """Close the channel; what is unacknowledged goes back. Nothing is raised if it is closed already.

        Nothing more is written to it: what came to the broker after this would end the whole connection. One that does
        not answer ends with its connection.
        """
        if self.error is None and not self._closing:
            self._closing = True
            request = commands.Channel.Close(reply_code=200, reply_text="", class_id=0, method_id=0)
            try:
                async with asyncio.timeout(CHANNEL_CLOSE_S):
                    await self._ask(request)
            except TimeoutError:
                self.connection.drop(AmqpError(0, f"channel {self.number} was not closed in {CHANNEL_CLOSE_S:g} s"))
            except AmqpError as error:
                log.debug("channel %d was closed already: %s", self.number, error)
            self.end(AmqpError(0, "the channel is closed"))

    def end(self, error: AmqpError) -> None:
        """Fail what waits and whatever is asked from now on."""
        if self.error is None:
            self.error = error
            self.connection.forget(self.number)
            calls, self._calls = self._calls, deque()
            for call in calls:
                if not call.done():
                    call.set_exception(error)

    # --- what comes ---

    def method(self, index: int, data: bytes, start: int, end: int) -> None:
        """Take a method frame; its arguments are `data[start:end]`."""
        if index == _DELIVER:
            after = start + 1 + data[start]
            tag, again = _tag(data, after)
            self._head = (data[start + 1 : after], tag, bool(again & 1))
        elif index == _ACK:
            tag, multiple = _tag(data, start)
            self.confirmed(tag, bool(multiple & 1), True)  # noqa: FBT003
        elif index == _NACK:
            tag, multiple = _tag(data, start)
            self.confirmed(tag, bool(multiple & 1), False)  # noqa: FBT003
        else:
            self._rare_method(_unmarshal(index, data[start:end]))

    def _rare_method(self, found: Frame) -> None:
        if isinstance(found, commands.Basic.Return):
            self._head = Returned(found.reply_text or "", found.routing_key or "", b"")
        elif isinstance(found, commands.Basic.Cancel):
            self.connection.drop(AmqpError(0, f"the broker ended consumer {found.consumer_tag}: its queue is gone"))
        elif isinstance(found, commands.Channel.Close):
            error = AmqpError(found.reply_code or 0, found.reply_text or "")
            self.connection.write(frame.marshal(commands.Channel.CloseOk(), self.number))
            self.end(error)
            self.closed(error)
        elif self._calls:
            call = self._calls.popleft()
            if not call.done():
                call.set_result(found)

    def header(self, data: bytes, start: int, end: int) -> None:
        """Take a content header frame."""
        self._left, self._flags = _content(data, start + 4)
        self._properties = data[start + 14 : end]
        if not self._left:
            self._complete(b"")

    def body(self, part: bytes) -> None:
        """Take a content body frame."""
        self._left -= len(part)
        if self._left > 0:
            self._parts.append(part)
        elif self._parts:
            self._parts.append(part)
            parts, self._parts = self._parts, []
            self._complete(b"".join(parts))
        else:
            self._complete(part)

    def _complete(self, body: bytes) -> None:
        head = self._head
        if type(head) is tuple:
            if not self._batch:
                self.connection.filled.append(self)
            self._batch.append(Arrived(*head, self._flags, self._properties, body))
        elif isinstance(head, Returned):
            head.body = body
            self.returned(head)

    def hand_over(self) -> None:
        """Give the messages of one read of the socket to who wants them."""
        batch, self._batch = self._batch, []
        self.arrived(batch)


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        lost: told once when it ends without `close`.
        blocked: told the reason when the broker takes no more messages, None when it does again.
    """

    def __init__(
        self, clock: Clock, lost: Callable[[AmqpError], None], blocked: Callable[[str | None], None] | None = None
    ) -> None:
        self.filled: list[Channel] = []
        self.frame_max = 131_072
        self.version = (0, 0)
        self._clock = clock
        self._lost = lost
        self._blocked = blocked or ignore
        self._socket: asyncio.Transport
        self._rest = b""
        self._channels: dict[int, Channel] = {}
        self._control: deque[Frame] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: AmqpError | None = None
        self._open = False
        self._heard = True
        self._silent = 0
        self._timer: Any = None

    @property
    def error(self) -> AmqpError | None:
        """Return why the connection has ended, or None while it stands."""
        return self._error

    def check(self) -> None:
        """Raise AmqpError if the connection has ended."""
        if self._error is not None:
            raise self._error

    # --- opening and closing ---

    async def handshake(self, user: str, password: str, vhost: str, heartbeat_s: int) -> None:
        """Sign in and choose the virtual host.

        Raises: AmqpError with the broker's code; without one if it does not speak AMQP.
        """
        self.write(b"AMQP\x00\x00\x09\x01")
        start = await self._next(commands.Connection.Start)
        properties: Any = start.server_properties or {}
        self.version = _version(str(properties.get("version", "")))
        capabilities = {"authentication_failure_close": True, "connection.blocked": True, "basic.nack": True}
        capabilities |= {"consumer_cancel_notify": True, "publisher_confirms": True}
        about: Any = {"product": "Trunkline", "capabilities": capabilities}
        self._say(
            commands.Connection.StartOk(
                client_properties=about, mechanism="PLAIN", response=f"\0{user}\0{password}", locale="en_US"
            )
        )
        tune = await self._next(commands.Connection.Tune)
        self.frame_max = tune.frame_max or self.frame_max
        self._say(
            commands.Connection.TuneOk(
                channel_max=tune.channel_max or 0, frame_max=self.frame_max, heartbeat=heartbeat_s
            )
        )
        self._say(commands.Connection.Open(virtual_host=vhost))
        await self._next(commands.Connection.OpenOk)
        self._open = True
        self._beat(heartbeat_s / 2)

    def _say(self, request: Frame) -> None:
        self.write(frame.marshal(request, 0))

    async def _next(self, kind: type[F]) -> F:
        while not self._control:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found = self._control.popleft()
        if not isinstance(found, kind):
            raise AmqpError(0, f"{type(found).__name__} came where {kind.__name__} was due")
        return found

    def _beat(self, every_s: float) -> None:
        """Show life, and look for it: nothing heard for two heartbeats means that the other side is gone."""
        self._silent = 0 if self._heard else self._silent + 1
        self._heard = False
        if self._silent > 4:  # noqa: PLR2004 - each is half a heartbeat
            self.drop(AmqpError(0, f"nothing heard for {self._silent * every_s:g} s"))
            return
        self.write(b"\x08\0\0\0\0\0\0\xce")
        self._timer = self._clock.call_later(every_s, self._beat, every_s)

    async def channel(self) -> Channel:
        """Open a channel.

        Raises: AmqpError.
        """
        self.check()
        number = next(number for number in count(1) if number not in self._channels)
        channel = self._channels[number] = Channel(self, number)
        await channel.call(commands.Channel.Open(), commands.Channel.OpenOk)
        return channel

    def forget(self, number: int) -> None:
        """A channel is closed."""
        self._channels.pop(number, None)

    async def close(self) -> None:
        """Say farewell and close; nothing is raised."""
        if self._open and self._error is None:
            self._error = AmqpError(0, "the connection is closed")
            self._say(commands.Connection.Close(reply_code=200, reply_text="", class_id=0, method_id=0))
            try:
                async with asyncio.timeout(CLOSE_S):
                    await asyncio.shield(self._ended)
            except TimeoutError:
                log.debug("the broker did not answer the farewell within %.0f s", CLOSE_S)
        self.drop(AmqpError(0, "the connection is closed"))
        await asyncio.shield(self._ended)

    def drop(self, error: AmqpError) -> None:
        """End the connection at once."""
        if self._error is None:
            self._error = error
        self._socket.abort()

    # --- the socket ---

    def write(self, data: bytes) -> None:
        """Send bytes; what the socket does not take now waits."""
        self._socket.write(data)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; see asyncio.Protocol."""
        self._socket = transport  # type: ignore[assignment]  # uvloop's is one, but not by its type

    def connection_lost(self, exc: Exception | None) -> None:
        """End; see asyncio.Protocol."""
        known = self._error
        error = self._error = known or AmqpError(
            0, f"the connection broke: {exc or 'closed by the other side'}", early=self.version == (0, 0)
        )
        if self._timer is not None:
            self._timer.cancel()
        self._wake()
        for channel in list(self._channels.values()):
            channel.end(error)
        self._ended.set_result(None)
        if self._open:
            self._open = False
            self._lost(error)

    def data_received(self, data: bytes) -> None:
        """Cut what came into frames, hand over what is complete; see asyncio.Protocol."""
        self._heard = True
        if self._rest:
            data = self._rest + data
        try:
            self._rest = data[self._cut(data) :]
        except AmqpError as error:
            self.drop(error)
            return
        except (PAMQPException, ValueError, IndexError, struct.error) as error:
            self.drop(AmqpError(0, f"{_NOT_AMQP}: {error!r}"))
            return
        if self.filled:
            filled, self.filled = self.filled, []
            for channel in filled:
                channel.hand_over()

    def _cut(self, data: bytes) -> int:
        """Give each frame to its channel; return where the first incomplete one begins."""
        position, end = 0, len(data)
        channels = self._channels
        while end - position >= 8:  # noqa: PLR2004 - the shortest frame
            kind, number, size = _frame(data, position)
            start = position + 7
            last = start + size
            if last >= end:
                self._check_part(data, size)
                break
            if data[last] != _END:
                raise AmqpError(0, _NOT_AMQP)
            channel = channels.get(number)
            if channel is None:
                self._control_frame(kind, number, data, start, last)
            elif kind == _BODY:
                channel.body(data[start:last])
            elif kind == _HEADER:
                channel.header(data, start, last)
            elif kind == _METHOD:
                channel.method(_index(data, start)[0], data, start + 4, last)
            position = last + 1
        return position

    def _check_part(self, data: bytes, size: int) -> None:
        """Refuse to wait for the rest of what is no frame."""
        if not self._open:
            self._check_protocol(data)
        if size > self.frame_max:
            raise AmqpError(0, f"{_NOT_AMQP}: a frame of {size} bytes")

    def _check_protocol(self, data: bytes) -> None:
        if data.startswith(b"\x15\x03"):
            raise AmqpError(0, "the port speaks TLS", early=True)
        if data.startswith(b"AMQP"):
            raise AmqpError(0, f"the port speaks AMQP {'.'.join(map(str, data[4:8]))}, not 0-9-1", early=True)
        if data[0] != _METHOD:
            raise AmqpError(0, _NOT_AMQP, early=True)

    def _control_frame(self, kind: int, number: int, data: bytes, start: int, end: int) -> None:
        if kind != _METHOD or number:
            return  # a heartbeat, or the last of a channel that is closed
        index = _index(data, start)[0]
        found = _unmarshal(index, data[start + 4 : end])
        if isinstance(found, commands.Connection.Close):
            self._say(commands.Connection.CloseOk())
            raise AmqpError(found.reply_code or 0, found.reply_text or "")
        if isinstance(found, commands.Connection.CloseOk):
            self._socket.close()
        elif isinstance(found, commands.Connection.Blocked):
            self._blocked(found.reason or "no reason given")
        elif isinstance(found, commands.Connection.Unblocked):
            self._blocked(None)
        else:
            self._control.append(found)
            self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def ignore(*_: object) -> None:
    """Do nothing."""


def _unmarshal(index: int, arguments: bytes) -> Frame:
    found: Frame = commands.INDEX_MAPPING[index]()
    found.unmarshal(arguments)
    return found


def _version(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version; zeros where there are none.

    >>> _version("3.10.8")
    (3, 10)
    """
    numbers = [int(part) if part.isdigit() else 0 for part in text.split(".")]
    return (*numbers, 0, 0)[:2]  # type: ignore[return-value]


async def connect(
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    clock: Clock,
    *,
    lost: Callable[[AmqpError], None],
    blocked: Callable[[str | None], None] | None = None,
) -> Connection:
    """Return a connection, not yet signed in.

    Raises: OSError, among them ssl.SSLError.
    """
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(clock, lost, blocked), host, port, ssl=tls, server_hostname=host if tls else None
    )
    return connection


async def speaks_tls(host: str, port: int) -> bool:
    """Return whether a port answers a TLS greeting, whoever's certificate it shows."""
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=ssl.create_default_context(), server_hostname=host)
    except ssl.SSLCertVerificationError:
        return True
    except OSError:
        return False
    writer.transport.abort()  # a farewell in TLS waits for the other side's
    return True
