"""Publishing: what concurrent callers give within one turn of the loop goes out as one write.

Invariant: a caller is told "confirmed" only for what the server answered, after its replicas if so many were asked for.
Read next: transport.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from trunkline.channel import Channel, Stream
from trunkline.errors import PublishError, TransportError, TrunklineError
from trunkline.link import Link
from trunkline.message import partition_of
from trunkline.transport import Staged
from trunkline.transports.redis.connection import Connection, Refusal, failure, pack
from trunkline.transports.redis.layout import FIELD, Names
from trunkline.transports.redis.server import Server
from trunkline.wire import encode


class _Batch:
    """What one caller waits for.

    Attributes:
        refused: messages that never left, and why.
    """

    __slots__ = ("error", "future", "refused", "sent")

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future
        self.sent: Sequence[Staged] = ()
        self.refused: list[Staged] = []
        self.error: TrunklineError | None = None

    def end(self, error: TrunklineError | None, unsent: list[Staged]) -> None:
        """Tell the caller."""
        unsent = self.refused + unsent
        error = error or self.error
        if error is not None:
            error.fields["unsent"] = unsent
        if self.future.done():
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class Publisher:
    """Sends messages over the connection that is up.

    Args:
        refused: told why the server refused a message.

    Attributes:
        connection: that one, or None while there is none.
    """

    def __init__(self, server: Server, link: Link, refused: Callable[[TrunklineError], None]) -> None:
        self._refused = refused
        self.connection: Connection | None = None
        self._server = server
        self._link = link
        self._heads: dict[str, list[bytes]] = {}
        self._out: list[bytes] = []
        self._batches: list[_Batch] = []

    def declare(self, channels: Iterable[Channel]) -> None:
        """Prepare the commands for `channels`."""
        for channel in channels:
            streams = Names(self._server.prefix, channel).streams
            # Everything of the command but the value and its length.
            heads = [pack(("XADD", stream, "*", FIELD, b"")).removesuffix(b"0\r\n\r\n") for stream in streams]
            self._heads[channel.name] = heads

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Publish `batch`; see Transport."""
        if self.connection is None:
            return self._send_later(batch)
        return self._enqueue(batch)

    async def _send_later(self, batch: Sequence[Staged]) -> None:
        while self.connection is None:
            try:
                await self._link.up(self._server.timeout_s)
            except TransportError as error:
                error.fields["unsent"] = list(batch)
                raise
        await self._enqueue(batch)

    def _enqueue(self, batch: Sequence[Staged]) -> asyncio.Future[None]:
        made = _Batch(asyncio.get_running_loop().create_future())
        out, heads, most = self._out, self._heads, self._server.max_bytes
        if not self._batches:
            asyncio.get_running_loop().call_soon(self._flush)
        sent = batch
        for staged in batch:
            channel, message = staged.channel, staged.message
            event = encode(message)
            if len(event) > most:
                made.refused.append(staged)
                made.error = PublishError(
                    "E313", f"message {message.id} for {channel.name!r} has {len(event)} bytes", f"at most {most} fit"
                )
                continue
            places = heads[channel.name]
            place = places[partition_of(message, len(places))] if isinstance(channel, Stream) else places[0]
            out.append(b"%b%d\r\n%b\r\n" % (place, len(event), event))
        if made.refused:
            sent = [staged for staged in batch if staged not in made.refused]
        made.sent = sent
        self._batches.append(made)
        return made.future

    def _flush(self) -> None:
        out, self._out = self._out, []
        batches, self._batches = self._batches, []
        connection = self.connection
        if not out or connection is None:
            self._end(batches, self._not_sent() if out else None)
            return
        count = len(out)
        if self._server.replicas:
            wait_ms = int(self._server.timeout_s * 1000)
            out.append(pack(("WAIT", self._server.replicas, wait_ms)))
        replies = connection.request(b"".join(out), len(out), self._server.timeout_s if self._server.replicas else 0.0)
        replies.add_done_callback(lambda done: self._answered(batches, count, done))

    def _answered(self, batches: list[_Batch], count: int, done: asyncio.Future[list[Any]]) -> None:
        lost = done.exception()
        if lost is not None:
            self._end(batches, self._unknown(str(lost)))
            return
        replies = done.result()
        if len(replies) > count and (isinstance(replies[-1], Refusal) or replies[-1] < self._server.replicas):
            self._end(batches, self._unknown(f"replicas that confirmed: {replies[-1]} of {self._server.replicas}"))
            return
        if not any(type(reply) is not bytes for reply in replies[:count]):
            self._end(batches, None)
            return
        at = 0
        for batch in batches:
            mine = replies[at : at + len(batch.sent)]
            at += len(mine)
            refused = [reply for reply in mine if isinstance(reply, Refusal)]
            unsent = [staged for staged, reply in zip(batch.sent, mine, strict=True) if isinstance(reply, Refusal)]
            error = failure(self._server.shown, refused[0]) if refused else None
            batch.end(error, unsent)
            if error is not None:
                self._refused(error)

    def _end(self, batches: list[_Batch], error: TransportError | None) -> None:
        for batch in batches:
            if error is None:
                batch.end(None, [])
            else:
                batch.end(TransportError(error.code, error.message, error.hint), list(batch.sent))

    def _unknown(self, reason: str) -> TransportError:
        return TransportError(
            "E521", f"{self._server.shown} did not confirm: {reason}", "publish again; a copy may have arrived"
        )

    def _not_sent(self) -> TransportError:
        return TransportError("E520", f"{self._server.shown} is not reached", "publish again")
