"""The relay: sends what was staged in the outbox, when it is due.

Invariant: a row is forgotten only after the broker has confirmed its message; a crash in between sends the same
message id again, which the receiver's inbox absorbs. Rows of a channel leave in order; a channel that takes nothing
holds back no other.
Read next: store.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence

from trunkline.channel import Channel
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, PublishError, StoreFullError, TrunklineError
from trunkline.store import OutboxRow, Store
from trunkline.transport import Staged, Transport

log = logging.getLogger("trunkline.outbox")

BATCH = 500
AGAIN_S = 1.0
"""Wait before sending again what could not be sent."""
REFUSED_AGAIN_S = 60.0
"""Wait before sending again what the broker refused, such as a message too large for it."""
_REFUSALS = (PublishError, ConfigurationError)
_OF_A_CHANNEL = (StoreFullError, *_REFUSALS)
"""What may be wrong with one channel, or one message, while others can be sent."""
_UNANSWERED = ("E521", "E522")
"""A broker that is reached does not confirm: it may be unable to for some channels only."""


class Relay:
    """Sends the outbox of `store` through `transport`.

    Args:
        channels: the channels that this system knows, by name.
    """

    def __init__(self, store: Store, transport: Transport, channels: Mapping[str, Channel], clock: Clock) -> None:
        self._store = store
        self._transport = transport
        self._channels = channels
        self._clock = clock
        self._changed = asyncio.Event()
        self._waiting: dict[str, float] = {}  # channel that takes nothing now → when it is tried again
        store.on_staged(self._changed.set)

    async def work(self) -> None:
        """Send what is due, until cancelled."""
        while True:
            self._changed.clear()
            try:
                next_due = await self.flush()
            except TrunklineError as error:
                log.warning("the outbox cannot be sent, trying again in %.0f s: %s", AGAIN_S, error)
                await self._clock.sleep(AGAIN_S)
                continue
            if next_due is None:
                await self._changed.wait()
                continue
            timer = self._clock.call_later(max(0.0, next_due - self._clock.now()), self._changed.set)
            await self._changed.wait()
            timer.cancel()

    async def flush(self) -> float | None:
        """Send what is due now; return when the next is due, or None."""
        while True:
            now = self._clock.now()
            self._waiting = {channel: again for channel, again in self._waiting.items() if again > now}
            rows, next_due = await self._store.outbox_due(self._channels.keys() - self._waiting.keys(), now, BATCH)
            if not rows:
                return min((due for due in (next_due, *self._waiting.values()) if due is not None), default=None)
            error = await self._send(rows)
            if isinstance(error, _OF_A_CHANNEL):
                await self._send_apart(rows)
            elif error is not None:
                self._wait_with(dict.fromkeys(row.channel for row in rows), error)

    async def _send(self, rows: list[OutboxRow]) -> TrunklineError | None:
        """Send rows and forget what the broker has confirmed; return why it did not take what is left in `rows`."""
        batch = [Staged(self._channels[row.channel], row.message) for row in rows]
        error: TrunklineError | None = None
        unsent: set[int] = set()
        try:
            await self._transport.send(batch)
        except TrunklineError as refused:
            error = refused
            unsent.update(map(id, getattr(refused, "unsent", None) or batch))
        sent = [row.number for row, staged in zip(rows, batch, strict=True) if id(staged) not in unsent]
        rows[:] = [row for row, staged in zip(rows, batch, strict=True) if id(staged) in unsent]
        if sent:
            await self._store.outbox_sent(sent)
        return error

    async def _send_apart(self, rows: Sequence[OutboxRow]) -> None:
        """Send each channel what is for it; one without room waits, in its order, and in nobody else's way."""
        for channel in dict.fromkeys(row.channel for row in rows):
            mine = [row for row in rows if row.channel == channel]
            error = await self._send(mine)
            if isinstance(error, _REFUSALS):
                error = await self._send_singly(mine)
            if error is not None:
                self._wait_with([channel], error)

    def _wait_with(self, channels: Collection[str], error: TrunklineError) -> None:
        """Try channels again later; others go on, if it is theirs alone.

        Raises: `error` if it says that it is not.
        """
        if not isinstance(error, StoreFullError) and error.code not in _UNANSWERED:
            raise error
        log.warning("the outbox waits with %s, trying again in %.0f s: %s", ", ".join(channels), AGAIN_S, error)
        self._waiting |= dict.fromkeys(channels, self._clock.now() + AGAIN_S)

    async def _send_singly(self, rows: Sequence[OutboxRow]) -> TrunklineError | None:
        """Send what the broker takes; what it refuses waits, is said loudly, and stands in nobody's way.

        Returns: what keeps the rest from being sent.
        """
        for row in rows:
            error = await self._send([row])
            if isinstance(error, _REFUSALS):
                log.error(
                    "%s refuses outbox row %d for %s, trying again in %.0f s: %s",
                    type(self._transport).__name__, row.number, row.channel, REFUSED_AGAIN_S, error,
                )  # fmt: skip
                await self._store.outbox_postpone([row.number], self._clock.now() + REFUSED_AGAIN_S)
            elif error is not None:
                return error
        return None
