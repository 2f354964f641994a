"""One pull consumer: asked ahead, so that messages come without a wait between.

Invariant: never more messages asked for than there is room. Never does: decode or settle (its readers).
Read next: queues.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from nats.aio.subscription import Subscription

from trunkline.clock import Clock
from trunkline.transports.nats.connection import Connection, command, parse_headers

log = logging.getLogger("trunkline.transport.nats")

EXPIRES_S = 20
"""How long the server keeps a request for messages."""
HEARTBEAT_S = 5
"""How often the server says of a request that there is nothing; at most half of EXPIRES_S."""
SILENT_S = 2 * HEARTBEAT_S + 1
"""A request of which nothing was heard for so long never reached its consumer: one that was posted while the server
was coming back, or while the consumer was being removed, gets no answer."""

Take = Callable[[list[bytes], bytes, bytes, bytes | None], None]
"""Takes a message: from how often it was delivered on the tokens of its reply subject, that subject, body, headers."""


class Source:
    """Asks one consumer for messages.

    Args:
        take: what is done with each.
        refill: told that a request is over; asks again if there is room.
        broken: told that the consumer is gone or silent.
        batch: how many are asked for at once.
    """

    def __init__(
        self, connection: Connection, clock: Clock, stream: str, consumer: str, *, take: Take,
        refill: Callable[[], None], broken: Callable[[], None], batch: int,
    ) -> None:  # fmt: skip
        self.outstanding = 0
        self.consumer = consumer
        self._connection = connection
        self._clock = clock
        self._verb = f"{connection.api}.CONSUMER.MSG.NEXT.{stream}.{consumer}".encode()
        self._inbox = f"{connection.inbox}.m.{clock.new_id()}".encode()
        self._take = take
        self._refill = refill
        self._broken = broken
        self._subscription: Subscription | None = None
        self._heard = 0.0
        self._brought = False
        self.batch = batch

    async def open(self) -> None:
        """Listen for what comes; ask for nothing yet."""
        self.outstanding = 0
        self._subscription = await self._connection.subscribe(self._inbox.decode(), self._came)

    def pull(self) -> None:
        """Ask for a batch if less than half of one is on its way."""
        if self.outstanding <= self.batch // 2 and self._subscription is not None:
            self.outstanding += self.batch
            self._heard = self._clock.monotonic()
            request = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (
                self.batch, EXPIRES_S * 1_000_000_000, HEARTBEAT_S * 1_000_000_000,
            )  # fmt: skip
            self._connection.post(command(self._verb, self._inbox, request))

    def check(self) -> None:
        """Take a consumer that did not even say that nothing came for gone."""
        now = self._clock.monotonic()
        if self._brought:
            self._heard, self._brought = now, False
        if self.outstanding and now - self._heard > SILENT_S:
            log.warning("%s: consumer %s is silent", self._connection.shown, self.consumer)
            self.outstanding = 0
            self._broken()

    def _came(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:  # noqa: ARG002
        if reply:
            self._brought = True
            self.outstanding -= 1
            parts = reply.split(b".")
            # $JS.ACK.stream.consumer.delivered.…, or with a domain and a hash of the account before the stream.
            self._take(parts[4:] if len(parts) == 9 else parts[6:], reply, data, headers)  # noqa: PLR2004
            return
        self._heard = self._clock.monotonic()
        status = (headers or b"").split(b"\r\n", 1)[0]
        left = parse_headers(headers).get("Nats-Pending-Messages")
        if left is not None:
            self.outstanding = max(0, self.outstanding - int(left))
            self._refill()
        elif status[9:12] not in {b"100", b"404", b"408"}:
            log.warning("%s: consumer %s: %s", self._connection.shown, self.consumer, status.decode("utf-8", "replace"))
            self.outstanding = 0
            self._broken()

    async def close(self) -> None:
        """Ask for no more; what is on its way still comes before this ends."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._connection.unsubscribe(subscription)

    def cut(self) -> None:
        """Forget what was on its way on a connection that is gone."""
        self._subscription = None
        self.outstanding = 0
