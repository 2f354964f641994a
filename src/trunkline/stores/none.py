"""No store: the broker alone keeps what is not finished, and a message may have its effects twice.

Invariant: what a handler returns is confirmed by the broker before its input is acknowledged, under ids that are the
same every time; a parked message stays unacknowledged, so that it comes again after a crash.
Never does: inbox, schedules, transactions. Read next: store.py.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Collection, Sequence
from itertools import count

import msgspec

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, DeadLetterError, TransactionError, TrunklineError
from trunkline.message import Message
from trunkline.outcome import ACK, DeadLetter, RetryLater
from trunkline.parked import ParkedMessages
from trunkline.store import DeadLetterRow, OutboxRow, Transaction, Unit, dead_letter_queue
from trunkline.transport import LIVE, Address, Delivery, Staged, Subscription, Transport

UNDECODABLE = "trunkline.undecodable"
"""Type of a dead letter whose bytes were no message; they are its payload."""


class NoStore:
    """Stands where a store would be; `none:`."""

    remembers = False
    keeps = False

    def __init__(self, address: Address, clock: Clock) -> None:
        if address.path or address.options:
            raise ConfigurationError("E206", f"{address.shown} says more than none: can use", "write none:")
        self._clock = clock
        self._parked = ParkedMessages(count(1).__next__)
        self._waiting: list[tuple[Unit, list[Staged]]] = []
        self._sending: asyncio.Task[None] | None = None
        self._transport: Transport

    async def start(self, transport: Transport, subscriptions: Sequence[Subscription]) -> bool:
        """Get ready; see Store."""
        self._transport = transport
        for subscription in subscriptions:
            self._parked.add_subscription(subscription)
        return False

    async def stop(self) -> None:
        """Wait for what is being sent."""
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)

    async def run_schema(self, statements: Sequence[str]) -> None:
        """Refuse table definitions.

        Raises: ConfigurationError E243.
        """
        if statements:
            raise ConfigurationError(
                "E243", "a service has tables of its own, and none: has no place for them", "name a store"
            )

    # --- the unit of work ---

    async def known(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> set[tuple[str, str]]:  # noqa: ARG002
        """Return nothing: nobody remembers."""
        return set()

    def submit(self, unit: Unit) -> None:
        """Send what `unit` staged, then it is done; see Store."""
        deliveries = unit.deliveries
        if unit.outcome is ACK and not unit.staged and len(deliveries) == 1 and deliveries[0].row == LIVE:
            unit.done(unit, None)  # the usual case: nothing to send, nothing parked
            return
        outgoing = self._outgoing(unit)
        if not outgoing:
            self._finish(unit)
            return
        self._waiting.append((unit, outgoing))
        if self._sending is None:
            self._sending = asyncio.get_running_loop().create_task(self._send())

    def _outgoing(self, unit: Unit) -> list[Staged]:
        outgoing = list(unit.staged)
        if unit.deliveries and outgoing:
            outgoing = [_derived(unit, number, staged) for number, staged in enumerate(outgoing)]
        if isinstance(unit.outcome, DeadLetter):
            outgoing += [self._letter(delivery, unit.outcome) for delivery in unit.deliveries]
        return outgoing

    async def _send(self) -> None:
        """Send what was submitted, all of one moment as one batch."""
        while self._waiting:
            units, self._waiting = self._waiting, []
            try:
                await self._transport.send([staged for _, outgoing in units for staged in outgoing])
            except TrunklineError as error:
                for unit, _ in units:
                    unit.done(unit, error)
            else:
                for unit, _ in units:
                    self._finish(unit)
        self._sending = None

    def _finish(self, unit: Unit) -> None:
        if unit.outcome is not ACK or any(delivery.row != LIVE for delivery in unit.deliveries):
            for delivery in unit.deliveries:
                if delivery.row != LIVE:
                    self._parked.remove(delivery)
                if isinstance(unit.outcome, RetryLater):
                    self._parked.park(delivery, self._clock.now() + unit.outcome.after_s)
        unit.done(unit, None)

    def _letter(self, delivery: Delivery, outcome: DeadLetter) -> Staged:
        """Return a dead letter as a message for the service's dead letter queue."""
        message = delivery.message
        subscription = delivery.subscription
        why = {
            "deadlettercode": outcome.code, "deadletterreason": outcome.reason[:1000],
            "deadletterattempt": str(delivery.attempt), "deadletterchannel": subscription.channel.name,
            "deadlettersubscription": subscription.name,
        }  # fmt: skip
        if message is None:
            raw = delivery.raw or b""
            message = Message(
                _name_id(f"{subscription.label}\n{delivery.partition}\n{delivery.position}"),
                UNDECODABLE, subscription.name, raw, self._clock.now(), datacontenttype="application/octet-stream",
            )  # fmt: skip
        extensions = {**(message.extensions or {}), **why}
        return Staged(dead_letter_queue(subscription.name), msgspec.structs.replace(message, extensions=extensions))

    async def transaction(self, unit: Unit) -> Transaction:
        """Refuse.

        Raises: TransactionError E513.
        """
        raise TransactionError("E513", f"{unit.owner} asked for a transaction, and there is no store", "name a store")

    async def rollback(self, unit: Unit) -> None:
        """Do nothing: there is no transaction."""

    # --- suspects ---

    async def attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Return zeros: nobody counts over the end of a process."""
        return [0] * len(deliveries)

    async def begin_attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Return ones; see `attempts`."""
        return [1] * len(deliveries)

    async def undo_attempts(self, deliveries: Sequence[Delivery]) -> None:
        """Do nothing; see `attempts`."""

    # --- parked messages and dead letters ---

    async def load_parked(
        self, subscription: Subscription, owns: Callable[[int], bool], into: Callable[[dict[str, int]], None]
    ) -> None:
        """Tell which keys are parked; what went to another process is forgotten, for the broker brings it there."""
        self._parked.forget_lost(subscription.label, owns)
        keys: dict[str, int] = {}
        for delivery in self._parked.of(subscription.label):
            if delivery.key is not None and delivery.partition >= 0:
                keys[delivery.key] = keys.get(delivery.key, 0) + 1
        into(keys)

    async def parked_due(
        self,
        subscription: Subscription,
        owns: Callable[[int], bool],  # noqa: ARG002 - what is not owned was forgotten
        now: float,
        limit: int,
        running: set[str],
    ) -> tuple[list[Delivery], float | None]:
        """Return what may run now; see Store."""
        return self._parked.due(subscription.label, now, limit, lambda delivery: delivery.key in running)

    async def dead_letters(self, subscription: str | None = None, limit: int = 1000) -> list[DeadLetterRow]:  # noqa: ARG002
        """Return nothing: dead letters are messages of a Queue here, see `dead_letter_queue`."""
        return []

    async def redrive(self, number: int, raw: bytes | None = None) -> None:  # noqa: ARG002
        """Refuse; see `dead_letters`."""
        raise _not_here(number)

    async def edit_dead_letter(self, number: int, raw: bytes) -> None:  # noqa: ARG002
        """Refuse; see `dead_letters`."""
        raise _not_here(number)

    async def discard_dead_letter(self, number: int) -> None:
        """Refuse; see `dead_letters`."""
        raise _not_here(number)

    # --- outbox ---

    async def outbox_due(
        self,
        channels: Collection[str],  # noqa: ARG002
        now: float,  # noqa: ARG002
        limit: int,  # noqa: ARG002
    ) -> tuple[list[OutboxRow], float | None]:
        """Return nothing: what is staged is sent at once."""
        return [], None

    async def outbox_sent(self, rows: Sequence[int]) -> None:
        """Do nothing; see `outbox_due`."""

    async def outbox_postpone(self, rows: Sequence[int], until: float) -> None:
        """Do nothing; see `outbox_due`."""

    async def tidy(self) -> None:
        """Do nothing."""

    def on_staged(self, callback: Callable[[], None]) -> None:
        """Do nothing: there is no outbox."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Do nothing: no other process shares this memory."""


def _derived(unit: Unit, number: int, staged: Staged) -> Staged:
    """Return `staged` under an id that is the same whenever the same input is handled again."""
    first = unit.deliveries[0].message
    origin = "" if first is None else first.identity
    identity = _name_id(f"{origin}\n{unit.owner}\n{number}")
    return Staged(staged.channel, msgspec.structs.replace(staged.message, id=identity))


def _name_id(name: str) -> str:
    """Return the same id for the same name.

    Source: RFC 9562 §5.8, a UUIDv8 of hash bits.
    """
    digits = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-8{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"


def _not_here(number: int) -> DeadLetterError:
    return DeadLetterError(
        "E604", f"dead letter {number} cannot be treated: there is no store", "dead letters are messages of"
        " the queue NAME.dead-letters; read it with a service, or name a store",
    )  # fmt: skip
