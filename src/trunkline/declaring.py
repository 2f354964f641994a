"""Declares a channel at its first message, where the App did not name it at start.

Invariant: messages leave in the order in which they were given, also while a channel is being declared.
Read next: transport.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from trunkline.channel import Channel
from trunkline.errors import TransportError
from trunkline.transport import Staged


class Declaring:
    """Stands before a broker's `send`.

    Args:
        declare: makes channels on the broker; it waits for a connection.
        send: sends messages whose channels are declared.

    Attributes:
        channels: what is declared, by name; a new connection declares these again.
    """

    def __init__(
        self,
        declare: Callable[[Sequence[Channel]], Coroutine[None, None, None]],
        send: Callable[[Sequence[Staged]], Awaitable[None]],
    ) -> None:
        self.channels: dict[str, Channel] = {}
        self._declare = declare
        self._send = send
        self._line = asyncio.Lock()
        self._in_line: set[object] = set()
        self._under_way: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self, channels: Iterable[Channel]) -> None:
        """Begin with `channels`, which the transport itself declares."""
        self.channels = {channel.name: channel for channel in channels}
        self._stopped = False

    def stop(self) -> None:
        """Refuse what waits for its channel, and what comes now: the connection ends."""
        self._stopped = True
        if self._under_way is not None:
            self._under_way.cancel()

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Send `batch`, at once if all of its channels are declared.

        Raises: what `send` raises; also ConfigurationError E207, E246 where a channel cannot be declared.
        """
        if not self._in_line and self._known(batch) and not self._stopped:
            return self._send(batch)
        turn = object()
        self._in_line.add(turn)
        task = asyncio.get_running_loop().create_task(self._send_in_turn(batch, turn))
        task.add_done_callback(lambda _: self._in_line.discard(turn))  # also of one that is cancelled before it begins
        return task

    def _known(self, batch: Sequence[Staged]) -> bool:
        known = self.channels
        return all(staged.channel.name in known for staged in batch)

    async def _send_in_turn(self, batch: Sequence[Staged], turn: object) -> None:
        async with self._line:
            missing = {
                staged.channel.name: staged.channel for staged in batch if staged.channel.name not in self.channels
            }
            if missing:
                try:
                    await self._declare_now(list(missing.values()))
                except TransportError as error:
                    error.fields["unsent"] = list(batch)
                    raise
                self.channels |= missing
            if self._stopped:
                raise _late((staged.channel for staged in batch), unsent=list(batch))
            sent = self._send(batch)
            self._in_line.discard(turn)
        await sent

    async def _declare_now(self, channels: Sequence[Channel]) -> None:
        self._under_way = asyncio.ensure_future(self._declare(channels))
        if self._stopped:
            self._under_way.cancel()
        try:
            await self._under_way
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            raise _late(channels) from None
        finally:
            self._under_way = None


def _late(channels: Iterable[Channel], **fields: Any) -> TransportError:
    names = ", ".join(dict.fromkeys(channel.name for channel in channels))
    return TransportError("E520", f"{names}: publishing after the stop", "publish before", **fields)
