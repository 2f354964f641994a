"""Publishing with confirmation: pipelined, what one tick gives written as one buffer.

Invariant: a batch ends when each of its messages was confirmed or refused, or its time is over; after a new connection
what is not confirmed is sent again under the same ids and in the same order.
Never does: partitions of keys (transport.py). Read next: source.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Sequence

import msgspec

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, PublishError, StoreFullError, TransportError, TrunklineError
from trunkline.message import Message
from trunkline.transport import Staged, told_first
from trunkline.transports.nats.connection import Connection
from trunkline.wire import CONTENT_TYPE, MAX_WIRE_BYTES, encode

log = logging.getLogger("trunkline.transport.nats")

MOST = 4000
"""Messages on their way to the server; a stream refuses more than 10,000 from all publishers (max_buffered_msgs)."""
MOST_BYTES = 16 * 1024 * 1024
AGAIN_S = 0.2
"""Wait before sending again what the server could not take just now."""

TOO_LARGE = 10054
FULL = {10023, 10025, 10047, 10077}
LATER = {10008, 10009, 10167, 10195}
"""Codes of nats-server's errors.json: too many requests, a stream that is offline or without leader."""

_TAIL = f"\r\ncontent-type: {CONTENT_TYPE}\r\n".encode()
_UUID = 36
_HEAD_SIZE = len("NATS/1.0\r\nNats-Msg-Id: ") + len(_TAIL) + len("\r\n")


class _Batch:
    """What one caller waits for.

    Attributes:
        left: not yet confirmed or refused.
        sent: whether any of it has left.
        refusal: what to tell when its time is over: why the server did not take what was last sent; None if that is
            on its way.
        error: what its caller is told once all has been answered for.
        unsent: what was not confirmed, by number.
    """

    __slots__ = ("deadline", "error", "future", "left", "refusal", "sent", "unsent")

    def __init__(self, future: asyncio.Future[None], left: int, deadline: float) -> None:
        self.future = future
        self.left = left
        self.deadline = deadline
        self.sent = False
        self.refusal: TransportError | None = None
        self.error: TrunklineError | None = None
        self.unsent: dict[int, Staged] = {}

    def answered(self) -> None:
        """Count a message that was confirmed or refused."""
        self.left -= 1
        if not self.left:
            self.end()

    def end(self) -> None:
        """Tell the caller."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(None)
        else:
            self.error.fields["unsent"] = [self.unsent[number] for number in sorted(self.unsent)]
            self.future.set_exception(self.error)


class _Entry:
    """One message on its way."""

    __slots__ = ("batch", "command", "staged", "subject")

    def __init__(self, batch: _Batch, command: bytes, staged: Staged, subject: bytes) -> None:
        self.batch = batch
        self.command = command
        self.staged = staged
        self.subject = subject


class Publisher:
    """Sends what callers give and tells them when it is stored.

    Args:
        timeout_s: how long a caller waits.
    """

    def __init__(self, connection: Connection, clock: Clock, timeout_s: float) -> None:
        self._connection = connection
        self._clock = clock
        self._timeout_s = timeout_s
        self._inbox = f"{connection.inbox}.p.".encode()
        self._skip = len(self._inbox)
        self._token = 0
        self._queued: deque[int] = deque()
        self._entries: dict[int, _Entry] = {}
        self._flying = 0
        self._flying_bytes = 0
        self._again: list[int] = []
        self._up = False
        self._scheduled = False
        self._watching = False

    # --- giving ---

    def send(self, items: Sequence[tuple[bytes, Staged]]) -> asyncio.Future[None]:
        """Return a future that ends when the server has confirmed all of `items`.

        Args:
            items: subject and message of each.

        Its errors: PublishError E313 if one is too large, then none is sent; TransportError E520, E521; E502 or E313
        if the server refuses one, once it has answered for the others.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        batch = _Batch(future, len(items), self._clock.monotonic() + self._timeout_s)
        largest = min(self._connection.max_payload, MAX_WIRE_BYTES)
        made = []
        for subject, staged in items:
            self._token += 1
            line, size = _publish(subject, self._inbox, self._token, staged.message)
            if size > largest:
                future.set_exception(self._too_large(staged, size, largest, items))
                return future
            made.append((self._token, _Entry(batch, line, staged, subject)))
        if not made:
            future.set_result(None)
            return future
        for token, entry in made:
            self._entries[token] = entry
            self._queued.append(token)
        self._schedule(loop)
        if not self._watching:
            self._watching = True
            self._clock.call_later(min(1.0, self._timeout_s / 10), self._expire)
        return future

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._up and not self._scheduled and not self._again:
            self._scheduled = True
            loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Write what there is room for."""
        self._scheduled = False
        if not self._up or self._again:
            return
        out = []
        queued, entries = self._queued, self._entries
        while queued and self._flying < MOST and self._flying_bytes < MOST_BYTES:
            entry = entries.get(queued.popleft())
            if entry is None:
                continue
            entry.batch.sent = True
            entry.batch.refusal = None
            self._flying += 1
            self._flying_bytes += len(entry.command)
            out.append(entry.command)
        if out:
            self._connection.post(b"".join(out))

    # --- confirmations ---

    def _acknowledged(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:  # noqa: ARG002
        token = int(subject[self._skip :])
        entry = self._entries.get(token)
        if entry is None:
            return
        self._flying -= 1
        self._flying_bytes -= len(entry.command)
        if headers is not None or data.startswith(b'{"error"'):
            self._refused(token, entry, data, headers)
        else:
            del self._entries[token]
            entry.batch.answered()
        if self._queued:
            self._schedule(asyncio.get_running_loop())

    def _refused(self, token: int, entry: _Entry, data: bytes, headers: bytes | None) -> None:
        """Send it again where that helps, else note why not."""
        error = {} if headers is not None else msgspec.json.decode(data).get("error") or {}
        code, text = error.get("err_code", 0), error.get("description", "nobody keeps its subject")
        name = entry.staged.channel.name
        later = headers is not None or code in LATER or error.get("code") in {429, 503}
        if later and code not in FULL:
            self._later(token, entry, f"{self._connection.shown} takes no message to {name!r}: {text}")
        else:
            self._give_up(token, entry, self._refusal(code, name, text))

    def _later(self, token: int, entry: _Entry, why: str) -> None:
        """Send it again soon: no leader, a stream that is being recovered, too much at once; all that follows waits."""
        log.debug("again in %g s: %s", AGAIN_S, why)
        entry.batch.refusal = TransportError("E520", why, "see the server's log")
        if not self._again:
            self._clock.call_later(AGAIN_S, self._retry)
        self._again.append(token)

    def _refusal(self, code: int, name: str, text: str) -> TrunklineError:
        shown = self._connection.shown
        if code in FULL:
            return StoreFullError("E502", f"{shown} has no room for {name!r}: {text}", "make room, or raise its limits")
        if code == TOO_LARGE:
            return PublishError("E313", f"message to {name!r} is too large for its stream: {text}", "send less")
        return PublishError("E313", f"{shown} refuses a message to {name!r}: {text}", "see the limits of its stream")

    def _give_up(self, token: int, entry: _Entry, error: TrunklineError) -> None:
        """Note that one message was refused; its batch ends with the last of the others."""
        del self._entries[token]
        entry.batch.unsent[token] = entry.staged
        entry.batch.error = told_first(entry.batch.error, error)
        entry.batch.answered()

    def _retry(self) -> None:
        self._queued.extendleft(sorted(self._again, reverse=True))
        self._again.clear()
        self._pump()

    # --- what ends a batch otherwise ---

    def _fail(self, batch: _Batch, error: TrunklineError) -> None:
        """End a batch before all of it has been answered for."""
        for token, entry in list(self._entries.items()):
            if entry.batch is batch:
                del self._entries[token]
                batch.unsent[token] = entry.staged
        batch.error = error
        batch.end()
        self._recount()

    def _recount(self) -> None:
        """Count what is on its way, after some of it was given up; others have its room."""
        waiting = {*self._queued, *self._again}
        flying = [entry for token, entry in self._entries.items() if token not in waiting]
        self._flying = len(flying)
        self._flying_bytes = sum(len(entry.command) for entry in flying)
        if self._queued:
            self._schedule(asyncio.get_running_loop())

    def _expire(self) -> None:
        """Tell those whose time is over; look again as long as anything is on its way."""
        now = self._clock.monotonic()
        for batch in {id(entry.batch): entry.batch for entry in list(self._entries.values())}.values():
            if batch.deadline > now:
                break  # the oldest come first, and all wait equally long
            link = self._connection.link
            if batch.refusal is not None:
                self._fail(batch, batch.refusal)
            elif batch.sent or link.is_up:
                what = f"{self._connection.shown} did not confirm within {self._timeout_s:g} s; it may have the message"
                self._fail(batch, TransportError("E521", what, "send it again under the same id"))
            else:
                self._fail(batch, link.unreachable(self._timeout_s))
        if self._entries:
            self._clock.call_later(min(1.0, self._timeout_s / 10), self._expire)
        else:
            self._watching = False

    def denied(self, subject: str, error: ConfigurationError) -> None:
        """Give up what goes to a subject that the user may not publish to."""
        for token, entry in list(self._entries.items()):
            # nats-py gives what the server said in small letters.
            if entry.subject.decode().lower() == subject:
                self._give_up(token, entry, ConfigurationError(error.code, error.message, error.hint))
        self._recount()

    # --- the connection ---

    async def connected(self) -> None:
        """Send what is not confirmed, the oldest first."""
        await self._connection.subscribe(self._inbox.decode() + "*", self._acknowledged)
        self._queued = deque(self._entries)
        self._again.clear()
        self._flying = self._flying_bytes = 0
        self._up = True
        self._pump()

    def lost(self) -> None:
        """Wait for the next connection."""
        self._up = False

    def stop(self) -> None:
        """Tell who still waits."""
        self.lost()
        shown = self._connection.shown
        for batch in {id(entry.batch): entry.batch for entry in self._entries.values()}.values():
            if batch.sent:
                what = f"{shown} was left before it confirmed; it may have the message"
                self._fail(batch, TransportError("E521", what, "send it again under the same id"))
            else:
                self._fail(batch, TransportError("E520", f"{shown} was left before anything was sent", "send it again"))

    def _too_large(
        self, staged: Staged, size: int, largest: int, items: Sequence[tuple[bytes, Staged]]
    ) -> PublishError:
        return PublishError(
            "E313", f"message to {staged.channel.name!r} has {size} bytes with its envelope; {self._connection.shown}"
            f" takes {largest}", f"send less, or raise max_payload of the server (up to {MAX_WIRE_BYTES})",
            unsent=[one for _, one in items],
        )  # fmt: skip


def _publish(subject: bytes, inbox: bytes, token: int, message: Message) -> tuple[bytes, int]:
    """Return the protocol lines of one message, and its size as the server counts it.

    Source: CloudEvents NATS binding 1.0 §3.2, structured mode; NATS client protocol, HPUB.
    """
    body = encode(message)
    identity = _identity(message).encode()
    head = _HEAD_SIZE + len(identity)
    size = head + len(body)
    return b"HPUB %b %b%d %d %d\r\nNATS/1.0\r\nNats-Msg-Id: %b%b\r\n%b\r\n" % (
        subject, inbox, token, head, size, identity, _TAIL, body,
    ), size  # fmt: skip


def _identity(message: Message) -> str:
    """Return what the server knows a message by: its UUID, or a hash of what identifies it.

    A tenant is part of it, so that none can suppress the message of another.
    """
    identity = message.identity
    if message.tenantid is None and len(identity) == _UUID and identity.isascii() and identity.isprintable():
        return identity
    text = f"{message.tenantid or ''}\n{identity}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=18).hexdigest()
