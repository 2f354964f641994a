"""One connection to Redis: commands out in one write per turn of the loop, replies in order.

Invariant: every request ends: with its replies, or with an error when the connection ends or its time is over.
Never does: reconnect (link.py), know channels. Read next: publisher.py.

Why not redis-py: publishing 100 at a time took half of its time here, a message received and acknowledged 1.9 µs of CPU
against 6; hiredis parses in both. The protocol is a dozen lines (RESP2).
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError, TrunklineError

pack: Callable[[tuple[str | int | bytes, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
"""Return one command as it goes over the wire."""

Refusal = hiredis.ReplyError
"""What an error of the server looks like among the replies."""

_LATER = {
    "MISCONF": "it cannot write its snapshot; look into its log and at its disk",
    "OOM": "its memory is full; raise maxmemory, or let receivers catch up",
    "READONLY": "it is a replica; name the primary too, with commas, and it is found",
    "LOADING": "it still reads its data",
    "MASTERDOWN": "it is a replica without its primary",
    "BUSY": "a script of somebody else runs",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write",
    "NOSCRIPT": "its scripts were flushed; they are loaded again",
    "NOGROUP": "a stream or group was deleted; it is declared again",
}


_WORDS = re.compile(rf"\b(NOAUTH|WRONGPASS|NOPERM|WRONGTYPE|MOVED|CROSSSLOT|{'|'.join(_LATER)})\b")


def failure(shown: str, reply: Refusal) -> TrunklineError:
    """Return what an error reply means: ConfigurationError E207, E244, E246 or E248, else TransportError E522."""
    text = str(reply)
    # In front; within a script of version 6 somewhere behind.
    word = found[0] if (found := _WORDS.search(text)) else ""
    if word in ("NOAUTH", "WRONGPASS"):
        return ConfigurationError("E244", f"{shown} refuses the user or the password: {text}", "correct the URL")
    if word == "NOPERM" or "can't run this command" in text:
        return ConfigurationError(
            "E246", f"{shown}: {text}", "allow the user the commands and the keys of this prefix (ACL SETUSER)"
        )
    if word == "WRONGTYPE":
        return ConfigurationError("E207", f"{shown}: a key of a channel holds something else", "use another prefix")
    if word in ("MOVED", "CROSSSLOT"):
        return ConfigurationError(
            "E248", f"{shown} is a node of a cluster: {text}", "use a server without cluster mode"
        )
    return TransportError("E522", f"{shown} refuses: {text}", _LATER.get(word, "see the server's log"))


class _Request:
    __slots__ = ("count", "deadline", "future", "replies")

    def __init__(self, future: asyncio.Future[list[Any]], count: int, deadline: float) -> None:
        self.future = future
        self.count = count
        self.deadline = deadline
        self.replies: list[Any] = []


class Connection(asyncio.Protocol):
    """A connection after its handshake.

    Args:
        shown: the URL without secrets.
        timeout_s: how long a reply may take.
        lost: told once when the connection ends without `close`.

    Attributes:
        number: how the server calls this client.
    """

    def __init__(self, shown: str, clock: Clock, timeout_s: float, lost: Callable[[Connection], None]) -> None:
        self.number = 0
        self.open = False
        self.reason = "closed by the server"
        self._shown = shown
        self._clock = clock
        self._timeout_s = timeout_s
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._waiting: deque[_Request] = deque()
        self._out: list[bytes] = []
        self._transport: asyncio.Transport
        self._ended: asyncio.Future[None] = self._loop.create_future()

    # --- commands ---

    def request(self, data: bytes, count: int = 1, wait_s: float = 0.0) -> asyncio.Future[list[Any]]:
        """Send packed commands; the result holds their `count` replies, errors among them.

        Args:
            wait_s: how long the commands may block, in seconds.
        Raises: TransportError E522 if the connection ends before.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if not self.open:
            future.set_exception(self._gone())
            return future
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)
        deadline = self._clock.monotonic() + self._timeout_s + wait_s
        self._waiting.append(_Request(future, count, deadline))
        return future

    async def call(self, *command: str | int | bytes) -> Any:
        """Send one command and return its reply.

        Raises: what `failure` says of an error.
        """
        (reply,) = await self.request(pack(command))
        if isinstance(reply, Refusal):
            raise failure(self._shown, reply)
        return reply

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self.open:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self.open = True

    def data_received(self, data: bytes) -> None:
        """Give each request its replies."""
        gets, waiting = self._reader.gets, self._waiting
        try:
            self._reader.feed(data)
            while (reply := gets()) is not False:
                request = waiting[0]
                request.replies.append(reply)
                if len(request.replies) == request.count:
                    waiting.popleft()
                    if not request.future.done():
                        request.future.set_result(request.replies)
        except (hiredis.ProtocolError, IndexError) as error:
            self.abort(f"this is no Redis: {error}")

    def connection_lost(self, error: BaseException | None) -> None:
        """Fail what waits."""
        if self.open and error is not None:
            self.reason = str(error) or type(error).__name__
        was_open, self.open = self.open, False
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            if not request.future.done():
                request.future.set_exception(self._gone())
                request.future.exception()  # seen here: whoever asked may be gone
        if not self._ended.done():
            self._ended.set_result(None)
        if was_open:
            self._lost(self)

    # --- the end ---

    def overdue(self, now: float) -> bool:
        """Return whether the oldest request has waited too long."""
        return bool(self._waiting) and self._waiting[0].deadline < now

    def abort(self, reason: str) -> None:
        """End at once, as if the server had gone."""
        if self.open:
            self.reason = reason
            self._transport.abort()

    async def close(self) -> None:
        """End; what still waits fails."""
        if self.open:
            self.open = False
            self.reason = "closed here"
            out, self._out = self._out, []
            self._transport.write(b"".join(out))
            self._transport.close()
        try:
            async with asyncio.timeout(1.0):
                await asyncio.shield(self._ended)
        except TimeoutError:
            self._transport.abort()

    def _gone(self) -> TransportError:
        return TransportError(
            "E522", f"{self._shown}: connection lost: {self.reason}", "a running service makes it anew; try again"
        )
