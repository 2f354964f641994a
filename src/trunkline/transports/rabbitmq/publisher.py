"""Messages on their way to the broker: written together, confirmed each.

Invariant: a batch ends only when each of its messages was confirmed or refused, or its time is over; what was not
confirmed when a connection broke is sent again, in its order.
Never does: connect. Read next: reader.py.
Source: RabbitMQ, "Consumer Acknowledgements and Publisher Confirms".
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable
from struct import Struct
from typing import Any

import msgspec
from pamqp import commands, frame

from trunkline.clock import Clock
from trunkline.errors import (
    ConfigurationError,
    PublishError,
    StoreFullError,
    TransportError,
    TrunklineError,
    UnroutableError,
)
from trunkline.transport import Staged, told_first
from trunkline.transports.rabbitmq.client import (
    ACCESS_REFUSED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    AmqpError,
    Channel,
    Returned,
)
from trunkline.wire import CONTENT_TYPE, MAX_WIRE_BYTES

log = logging.getLogger("trunkline.rabbitmq")

_CHANNEL = 1
"""Number of the only channel of the connection that publishes, so that a route's bytes are made once."""
_HEADER = Struct(">BHIHHQ").pack
_BODY = Struct(">BHI").pack
_END = b"\xce"
_CONTENT_TYPE_FLAG, _DELIVERY_MODE_FLAG, _PRIORITY_FLAG = 1 << 15, 1 << 12, 1 << 11
_TOO_LARGE = re.compile(r"message size (\d+) .*(?:max|limit)\D*(\d+)")


def _every(_: object) -> bool:
    return True


def _properties(priority: int | None) -> bytes:
    """Return the end of a content header frame: persistent, of the CloudEvents type, of a priority."""
    flags = _CONTENT_TYPE_FLAG | _DELIVERY_MODE_FLAG | (0 if priority is None else _PRIORITY_FLAG)
    kind = CONTENT_TYPE.encode()
    rest = b"\x02" if priority is None else bytes((2, priority))
    return flags.to_bytes(2, "big") + len(kind).to_bytes(1, "big") + kind + rest + _END


_PLAIN = _properties(None)
_URGENT = [_properties(priority) for priority in range(10)]


class Route:
    """Where messages of one channel, or one partition of it, go.

    Args:
        mandatory: whether a message that no queue takes is an error.
    """

    __slots__ = ("exchange", "head", "key", "shown")

    def __init__(self, shown: str, exchange: str, key: str, *, mandatory: bool) -> None:
        self.shown = shown
        self.exchange = exchange
        self.key = key
        self.head = frame.marshal(
            commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory), _CHANNEL
        )


class Group:
    """What one caller sent together.

    Attributes:
        done: ends with it. left: not yet confirmed or refused. until: when its time is over.
    """

    __slots__ = ("done", "error", "left", "unsent", "until")

    def __init__(self, done: asyncio.Future[None], left: int, until: float) -> None:
        self.done = done
        self.left = left
        self.until = until
        self.error: TrunklineError | None = None
        self.unsent: list[Staged] = []


class Outgoing(msgspec.Struct, gc=False, eq=False):
    """One message on its way.

    Attributes:
        staged: what it was made of; None for one of the transport's own.
        error: why it was refused.
    """

    route: Route
    body: bytes
    group: Group
    staged: Staged | None = None
    properties: bytes = _PLAIN
    error: TrunklineError | None = None


def outgoing(route: Route, body: bytes, group: Group, staged: Staged, priority: int | None) -> Outgoing:
    """Return a message on its way; its priority is cut to 0 to 9."""
    return Outgoing(
        route, body, group, staged, _PLAIN if priority is None else _URGENT[min(max(priority, 0), 9)]
    )  # fmt: skip


class Publisher:
    """Sends and waits for confirms.

    Args:
        timeout_s: how long a batch may take.
        unreachable: gives the error for a batch that was never sent.
        reopen: asked for a new channel after the broker closed the one in use.
    """

    def __init__(
        self,
        clock: Clock,
        timeout_s: float,
        unreachable: Callable[[], TransportError],
        reopen: Callable[[], None],
    ) -> None:
        self.blocked: str | None = None
        self._clock = clock
        self._timeout_s = timeout_s
        self._unreachable = unreachable
        self._reopen = reopen
        self._channel: Channel | None = None
        self._part_bytes = 0
        self._tag = 0
        self._low = 1
        self._todo: list[Outgoing] = []
        self._under_way: dict[int, Outgoing] = {}
        self._groups: deque[Group] = deque()
        self._timer: Any = None

    def group(self, size: int) -> Group:
        """Return a new batch, to be given to `send`."""
        done = asyncio.get_running_loop().create_future()
        group = Group(done, size, self._clock.monotonic() + self._timeout_s)
        self._groups.append(group)
        if self._timer is None:
            self._timer = self._clock.call_later(self._timeout_s, self._expire)
        return group

    def send(self, messages: Iterable[Outgoing]) -> None:
        """Send with the end of this turn of the loop, together with what others give till then."""
        if not self._todo:
            asyncio.get_running_loop().call_soon(self.flush)
        self._todo += messages

    def publish(self, route: Route, body: bytes) -> asyncio.Future[None]:
        """Send one message of the transport's own; the result ends when it is confirmed."""
        group = self.group(1)
        self.send((Outgoing(route, body, group),))
        return group.done

    def flush(self) -> None:
        """Write what waits, unless the broker takes nothing now."""
        if self._channel is None or self.blocked is not None or not self._todo:
            return
        todo, self._todo = self._todo, []
        parts: list[bytes] = []
        tag = self._tag
        for message in todo:
            if message.group.done.done():
                continue
            body = message.body
            size = len(body)
            if size > MAX_WIRE_BYTES:
                self._refuse(message)
                continue
            tag += 1
            self._under_way[tag] = message
            head = _HEADER(2, _CHANNEL, len(message.properties) + 11, 60, 0, size)
            if size <= self._part_bytes:
                parts += (message.route.head, head, message.properties, _BODY(3, _CHANNEL, size), body, _END)
            else:
                parts += (message.route.head, head, message.properties, *self._cut(body))
        self._tag = tag
        self._channel.connection.write(b"".join(parts))

    def _refuse(self, message: Outgoing) -> None:
        """Refuse what no reader takes, though the broker would."""
        size, shown = len(message.body), message.route.shown
        message.error = PublishError("E313", f"a message for {shown} has {size} bytes", f"at most {MAX_WIRE_BYTES} fit")
        self._ended(message, taken=False)

    def _cut(self, body: bytes) -> Iterable[bytes]:
        for start in range(0, len(body), self._part_bytes):
            part = body[start : start + self._part_bytes]
            yield _BODY(3, _CHANNEL, len(part))
            yield part
            yield _END

    # --- the connection ---

    async def attach(self, channel: Channel) -> None:
        """Use a new channel; what was not confirmed is sent again before anything new.

        Raises: AmqpError.
        """
        assert channel.number == _CHANNEL  # noqa: S101 - a route's bytes name it
        await channel.call(commands.Confirm.Select(), commands.Confirm.SelectOk)
        channel.confirmed, channel.returned, channel.closed = self._confirmed, self._returned, self._closed
        self._part_bytes = channel.connection.frame_max - 8
        self._tag, self._low = 0, 1
        again, self._under_way = list(self._under_way.values()), {}
        self._todo[:0] = again
        self._channel = channel
        self.blocked = None
        self.flush()

    def detach(self) -> None:
        """The connection is gone."""
        self._channel = None

    def set_blocked(self, reason: str | None) -> None:
        """Wait while the broker takes nothing."""
        if reason is not None:
            log.warning("the broker takes no messages now: %s", reason)
        self.blocked = reason
        self.flush()

    def _confirmed(self, tag: int, below: bool, taken: bool) -> None:  # noqa: FBT001 - called with what the frame says
        under_way = self._under_way
        if below:
            for number in range(self._low, tag + 1):
                message = under_way.pop(number, None)
                if message is not None:
                    self._ended(message, taken=taken)
            self._low = tag + 1
        else:
            message = under_way.pop(tag, None)
            if message is not None:
                self._ended(message, taken=taken)
            if tag == self._low:
                self._low = tag + 1

    def _ended(self, message: Outgoing, *, taken: bool) -> None:
        if not taken and message.error is None:
            message.error = _no_room(message.route.shown)
        group = message.group
        group.left -= 1
        if message.error is not None:
            group.error = told_first(group.error, message.error)
            if message.staged is not None:
                group.unsent.append(message.staged)
        if not group.left:
            self._finish(group)

    def _finish(self, group: Group) -> None:
        if not group.done.done():
            if group.error is None:
                group.done.set_result(None)
            else:
                group.error.fields["unsent"] = group.unsent
                group.done.set_exception(group.error)
        groups = self._groups
        while groups and groups[0].done.done():
            groups.popleft()

    def _returned(self, returned: Returned) -> None:
        """Note that no queue took a message; its confirm comes after this."""
        for message in self._under_way.values():
            if message.error is None and message.body == returned.body and message.route.key == returned.routing_key:
                message.error = UnroutableError(
                    "E313",
                    f"no queue takes messages for {message.route.shown}: {returned.reason}",
                    "start a process that declares it, or see whether somebody deleted its queue",
                )
                return

    def _closed(self, error: AmqpError) -> None:
        """Fail the messages for which the broker closed the channel, send the others again on a new one."""
        self._channel = None
        is_culprit, reason = self._culprits(error)
        log.warning("the broker closed the channel that publishes: %s", error.text)
        for tag, message in list(self._under_way.items()):
            if is_culprit(message):
                del self._under_way[tag]
                message.error = reason()
                self._ended(message, taken=False)
        self._reopen()

    def _culprits(self, error: AmqpError) -> tuple[Callable[[Outgoing], bool], Callable[[], TrunklineError]]:
        """Return which messages are at fault, and what to say of each."""
        large = _TOO_LARGE.search(error.text)
        if error.code == PRECONDITION_FAILED and large is not None:
            size, most = large[1], int(large[2])
            return lambda message: len(message.body) > most, lambda: PublishError(
                "E313",
                f"a message of {size} bytes is larger than the broker takes",
                f"at most {most} bytes (max_message_size of the broker)",
            )
        if error.code == ACCESS_REFUSED:
            return _every, lambda: ConfigurationError(
                "E246", f"the broker does not permit to publish: {error.text}", "give the user write permission"
            )
        if error.code == NOT_FOUND:
            return lambda message: f"'{message.route.exchange}'" in error.text, lambda: UnroutableError(
                "E313", f"nothing carries these messages: {error.text}", "start a process that declares the channel"
            )
        return _every, lambda: TransportError(
            "E521", f"the broker closed the channel: {error.text}", "whether the messages arrived is not known"
        )

    # --- time ---

    def _expire(self) -> None:
        """Fail the batches whose time is over."""
        self._timer = None
        now = self._clock.monotonic()
        groups = self._groups
        while groups and (groups[0].done.done() or groups[0].until <= now):
            self._give_up(groups.popleft())
        if groups:
            self._timer = self._clock.call_later(max(0.0, groups[0].until - now), self._expire)

    def _give_up(self, group: Group) -> None:
        if group.done.done():
            return
        lost = [message for message in self._under_way.values() if message.group is group]
        waiting = [message for message in self._todo if message.group is group]
        if self.blocked is not None:
            group.error = TransportError(
                "E521", f"the broker has taken no messages for {self._timeout_s:g} s: {self.blocked}",
                "free memory or disk on the broker's machine",
            )  # fmt: skip
        elif lost:
            group.error = TransportError(
                "E521", f"{len(lost)} messages were not confirmed within {self._timeout_s:g} s",
                "whether they arrived is not known; to send them again under the same id is safe",
            )  # fmt: skip
        else:
            group.error = self._unreachable()
        group.unsent += [message.staged for message in (*lost, *waiting) if message.staged is not None]
        self._todo = [message for message in self._todo if message.group is not group]
        self._finish(group)

    def stop(self) -> None:
        """Fail what is under way."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._channel = None
        written = {message.group for message in self._under_way.values()}
        while self._groups:
            group = self._groups.popleft()
            if not group.done.done():
                left = (*self._under_way.values(), *self._todo)
                group.error = _left_behind(written=group in written)
                group.unsent += [m.staged for m in left if m.group is group and m.staged is not None]
                self._finish(group)
        self._todo.clear()
        self._under_way.clear()


def _no_room(shown: str) -> StoreFullError:
    """Return the error for a message that the broker answered with basic.nack.

    Source: RabbitMQ, "Queue Length Limit": a queue with reject-publish has no room; "Consumer Acknowledgements and
    Publisher Confirms": or its process has failed, which is rare. Of a Topic, other queues may have the message.
    """
    return StoreFullError(
        "E502",
        f"the broker refused a message for {shown}: its queue is full, or has failed",
        "make room, or raise the queue's limits; the broker's log names a queue that has failed",
    )


def _left_behind(*, written: bool) -> TransportError:
    """Return the error for what a stop has left."""
    if not written:
        return TransportError("E520", "the transport was stopped before anything was sent", "publish it again")
    return TransportError(
        "E521", "the transport was stopped before the broker confirmed; it may have the message",
        "publish it again under the same id",
    )  # fmt: skip
