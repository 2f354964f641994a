"""The relay: sends what was staged in the outbox, when it is due.

Invariant: a row is forgotten only after the broker has confirmed its message; a crash in between sends the same
message id again, which the receiver's inbox absorbs. Rows leave in order.
Read next: store.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from trunkline.channel import Channel
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, PublishError, TrunklineError
from trunkline.store import OutboxRow, Store
from trunkline.transport import Staged, Transport

log = logging.getLogger("trunkline.outbox")

BATCH = 500
AGAIN_S = 1.0
"""Wait before sending again what could not be sent."""
REFUSED_AGAIN_S = 60.0
"""Wait before sending again what the broker refused, such as a message too large for it."""


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
            rows, next_due = await self._store.outbox_due(self._channels.keys(), self._clock.now(), BATCH)
            if not rows:
                return next_due
            try:
                await self._transport.send([self._staged(row) for row in rows])
            except (PublishError, ConfigurationError):
                await self._send_singly(rows)
            else:
                await self._store.outbox_sent([row.number for row in rows])

    async def _send_singly(self, rows: Sequence[OutboxRow]) -> None:
        """Send what the broker takes; what it refuses waits, is said loudly, and stands in nobody's way."""
        for row in rows:
            try:
                await self._transport.send([self._staged(row)])
            except (PublishError, ConfigurationError) as error:
                log.error(  # noqa: TRY400 - the text says it all
                    "%s refuses outbox row %d for %s, trying again in %.0f s: %s",
                    type(self._transport).__name__, row.number, row.channel, REFUSED_AGAIN_S, error,
                )  # fmt: skip
                await self._store.outbox_postpone([row.number], self._clock.now() + REFUSED_AGAIN_S)
            else:
                await self._store.outbox_sent([row.number])

    def _staged(self, row: OutboxRow) -> Staged:
        channel = self._channels.get(row.channel)
        if channel is None:
            raise TrunklineError(
                "E507",
                f"outbox row {row.number} is for channel {row.channel!r}, which no service here declares",
                f"run the service that staged it; declared are: {', '.join(sorted(self._channels))}",
            )
        return Staged(channel, row.message)
