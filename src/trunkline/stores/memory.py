"""The store in the memory of one process, for tests.

Invariant: the same rules as stores/sqlite/store.py; a unit is applied whole, at once.
Never does: survive the process. Read next: store.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any

import apsw
import msgspec

from trunkline.clock import Clock
from trunkline.dbapi import ApswTransaction
from trunkline.errors import ConfigurationError, DeadLetterError
from trunkline.message import pack, unpack
from trunkline.outcome import ACK, DeadLetter, RetryLater
from trunkline.parked import ParkedMessages
from trunkline.store import DeadLetterRow, DuplicateSignal, OutboxRow, Transaction, Unit
from trunkline.transport import LIVE, Address, Delivery, Staged, Subscription, Transport


class MemoryStore:
    """Store of one App.

    Attributes:
        tables: the user's, once there are any.
    """

    remembers = True
    keeps = True

    def __init__(self, address: Address, clock: Clock) -> None:
        if address.path or address.options:
            raise ConfigurationError("E206", f"{address.shown} says more than memory: can use", "write memory:")
        self._clock = clock
        self._inbox: dict[str, set[str]] = {}
        self._dead: dict[int, tuple[DeadLetterRow, Delivery]] = {}
        self._attempts: dict[tuple[str, int, int], int] = {}
        self._outbox: list[tuple[float, int, Staged]] = []
        self._sending: dict[int, tuple[float, int, Staged]] = {}
        self._numbers = count(1)
        self._parked = ParkedMessages(self._numbers.__next__)
        self._callbacks: list[Callable[[], None]] = []
        self._staged_callbacks: list[Callable[[], None]] = []
        self._place: Callable[[Sequence[Staged]], None] | None = None
        self._live: dict[str, tuple[set[str], Any]] = {}
        self._lock = asyncio.Lock()
        self.tables: apsw.Connection | None = None

    async def start(self, transport: Transport, subscriptions: Sequence[Subscription]) -> bool:
        """Get ready; see Store."""
        self._place = getattr(transport, "place", None)
        for subscription in subscriptions:
            self._inbox.setdefault(subscription.label, set())
            self._parked.add_subscription(subscription)
        readers = getattr(transport, "readers", {})
        self._live = {s.label: (self._inbox[s.label], readers.get(s.label)) for s in subscriptions}
        return self._place is not None

    async def stop(self) -> None:
        """Forget the user's tables."""
        if self.tables is not None:
            self.tables.close()
            self.tables = None

    async def run_schema(self, statements: Sequence[str]) -> None:
        """Make the user's tables; see Store."""
        if statements:
            connection = self._connection()
            for statement in statements:
                connection.execute(statement)

    def _connection(self) -> apsw.Connection:
        if self.tables is None:
            self.tables = apsw.Connection(":memory:")
            self.tables.execute("PRAGMA foreign_keys=ON")
        return self.tables

    def rows(self, sql: str, parameters: Sequence[Any]) -> list[Any]:
        """Return the rows of a query on the user's tables."""
        return self._connection().execute(sql, parameters).fetchall()

    # --- the unit of work ---

    async def known(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> set[tuple[str, str]]:
        """Return which were handled before; see Store."""
        inbox = self._inbox[subscription.label]
        if inbox.isdisjoint([_inbox_id(delivery) for delivery in deliveries]):
            return set()
        return {
            (d.message.tenantid or "", d.message.identity)
            for d in deliveries
            if d.message is not None and _inbox_id(d) in inbox
        }

    def submit(self, unit: Unit) -> None:
        """Apply at once; see Store."""
        deliveries = unit.deliveries
        if unit.outcome is not ACK or unit.transaction is not None or len(deliveries) != 1 or not deliveries[0].fresh:
            self._submit_any(unit)
            return
        # The usual case, in as few steps as can be: what cannot have been handled before is acknowledged.
        delivery = deliveries[0]
        inbox, reader = self._live[delivery.subscription.label]
        message = delivery.message
        # An id made here just now is identity enough; see _inbox_id.
        inbox.add(message.id if message.tenantid is None else _inbox_id(delivery))  # type: ignore[union-attr]
        if unit.staged:
            self._send(unit.staged)
        if reader is not None:
            reader.under_way -= 1
        unit.done(unit, None)

    def _submit_any(self, unit: Unit) -> None:
        if unit.transaction is not None:
            try:
                self._end_transaction(unit)
            except apsw.Error as error:
                unit.done(unit, error)
                return
        elif unit.outcome is ACK and not unit.duplicate and not self._remember(unit):
            unit.duplicate = True
            unit.staged = ()
        for delivery in unit.deliveries:
            if unit.outcome is not ACK or delivery.suspect or delivery.row != LIVE:
                self._move(unit, delivery)
            reader = self._live[delivery.subscription.label][1]
            if delivery.row == LIVE and reader is not None:
                reader.under_way -= 1
        if unit.staged:
            self._send(unit.staged)
        unit.done(unit, None)

    def _move(self, unit: Unit, delivery: Delivery) -> None:
        if delivery.row != LIVE:
            self._parked.remove(delivery)
        if delivery.suspect:
            self._attempts.pop(_attempt_id(delivery), None)
        if unit.outcome is not ACK:
            self._set_aside(unit, delivery)

    def _remember(self, unit: Unit) -> bool:
        for number, delivery in enumerate(unit.deliveries):
            inbox = self._inbox[delivery.subscription.label]
            size = len(inbox)
            inbox.add(_inbox_id(delivery))
            if len(inbox) == size:
                self._forget(unit.deliveries[:number])
                return False
        return True

    def _remember_or_raise(self, unit: Unit) -> None:
        if not self._remember(unit):
            raise DuplicateSignal

    def _send(self, batch: Sequence[Staged]) -> None:
        if self._place is not None and all(staged.due is None for staged in batch):
            self._place(batch)
            return
        for staged in batch:
            heappush(self._outbox, (staged.due or 0.0, next(self._numbers), staged))
        for callback in self._staged_callbacks:
            callback()

    async def transaction(self, unit: Unit) -> Transaction:
        """Open the handler's transaction; see Store."""
        await self._lock.acquire()
        try:
            self._remember_or_raise(unit)
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
        except BaseException:
            self._lock.release()
            raise
        unit.transaction = ApswTransaction(connection)
        return unit.transaction

    def _end_transaction(self, unit: Unit) -> None:
        if unit.transaction is not None:
            unit.transaction.end()
        unit.transaction = None
        try:
            self._connection().execute("COMMIT")
        except apsw.Error:
            self._connection().execute("ROLLBACK")
            self._forget(unit.deliveries)
            raise
        finally:
            self._lock.release()

    async def rollback(self, unit: Unit) -> None:
        """Undo the handler's transaction; see Store."""
        self.undo(unit)

    def undo(self, unit: Unit) -> None:
        """Undo what the transaction of `unit` wrote, if it has one."""
        if unit.transaction is not None:
            unit.transaction.end()
            unit.transaction = None
            self._connection().execute("ROLLBACK")
            self._forget(unit.deliveries)
            self._lock.release()

    def _forget(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._inbox[delivery.subscription.label].discard(_inbox_id(delivery))

    # --- suspects ---

    async def attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Return the tries that never came to an end; see Store."""
        return [self._attempts.get(_attempt_id(delivery), 0) for delivery in deliveries]

    async def begin_attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Count one more try for each; see Store."""
        counts = []
        for delivery in deliveries:
            key = _attempt_id(delivery)
            self._attempts[key] = self._attempts.get(key, 0) + 1
            counts.append(self._attempts[key])
        return counts

    async def undo_attempts(self, deliveries: Sequence[Delivery]) -> None:
        """Take back one try of each; see Store."""
        for key in map(_attempt_id, deliveries):
            count = self._attempts.pop(key, 0) - 1
            if count > 0:
                self._attempts[key] = count

    # --- parked messages and dead letters ---

    def _set_aside(self, unit: Unit, delivery: Delivery) -> None:
        outcome = unit.outcome
        if isinstance(outcome, RetryLater):
            self._parked.park(delivery, self._clock.now() + outcome.after_s)
        elif isinstance(outcome, DeadLetter):
            message = delivery.message
            number = next(self._numbers)
            held = outcome.holds and delivery.partition >= 0 and delivery.key is not None
            row = DeadLetterRow(
                number, delivery.subscription.label, delivery.subscription.channel.name,
                "" if message is None else message.id, "" if message is None else message.type, delivery.key,
                outcome.code, outcome.reason, outcome.detail, delivery.attempt, self._clock.now(), held, 0,
                _event(delivery),
            )  # fmt: skip
            self._dead[number] = (row, delivery)

    async def load_parked(
        self, subscription: Subscription, owns: Callable[[int], bool], into: Callable[[dict[str, int]], None]
    ) -> None:
        """Tell which keys are parked or held; see Store."""
        keys: dict[str, int] = {}
        parked = self._parked.of(subscription.label)
        held = (d for row, d in self._dead.values() if row.holds and d.subscription.label == subscription.label)
        for delivery in (*parked, *held):
            if delivery.key is not None and delivery.partition >= 0 and owns(delivery.partition):
                keys[delivery.key] = keys.get(delivery.key, 0) + 1
        into(keys)

    async def parked_due(
        self,
        subscription: Subscription,
        owns: Callable[[int], bool],
        now: float,
        limit: int,
        running: set[str],
        taker: object = "",
    ) -> tuple[list[Delivery], float | None]:
        """Return what may run now; see Store.

        Args:
            taker: process that it runs in, where a simulation has several on one store; see `give_back`.
        """
        label = subscription.label
        held = {row.key for row, _ in self._dead.values() if row.holds and row.subscription == label}

        def blocked(delivery: Delivery) -> bool:
            return delivery.key in held or delivery.key in running or not owns(delivery.partition)

        return self._parked.due(label, now, limit, blocked, taker)

    async def dead_letters(self, subscription: str | None = None, limit: int = 1000) -> list[DeadLetterRow]:
        """Return dead letters; see Store."""
        found = []
        for row, _ in self._dead.values():
            label = row.subscription
            if subscription is None or label == subscription or label.partition("@")[0] == subscription:
                parked = self._parked.of(row.subscription)
                behind = sum(1 for delivery in parked if row.holds and delivery.key == row.key)
                found.append(msgspec.structs.replace(row, waiting=behind))
        return found[:limit]

    async def redrive(self, number: int, raw: bytes | None = None) -> None:
        """Give a dead letter back; see Store."""
        delivery = self._take_dead_letter(number)
        delivery.attempt = 0
        if raw is not None:
            delivery.raw, delivery.message = raw, None
        self._parked.park(delivery, 0.0)
        self._notify()

    async def edit_dead_letter(self, number: int, raw: bytes) -> None:
        """Replace the envelope of a dead letter; see Store."""
        message = unpack(raw)
        row, delivery = self._find_dead_letter(number)
        delivery.raw, delivery.message = raw, None
        self._dead[number] = (
            msgspec.structs.replace(row, message_id=message.id, message_type=message.type, raw=raw), delivery,
        )  # fmt: skip

    async def discard_dead_letter(self, number: int) -> None:
        """Remove a dead letter; see Store."""
        self._take_dead_letter(number)
        self._notify()

    def _find_dead_letter(self, number: int) -> tuple[DeadLetterRow, Delivery]:
        found = self._dead.get(number)
        if found is None:
            raise DeadLetterError("E601", f"no dead letter {number}", 'list them with "trunkline dead list"')
        return found

    def _take_dead_letter(self, number: int) -> Delivery:
        delivery = self._find_dead_letter(number)[1]
        del self._dead[number]
        return delivery

    # --- outbox ---

    async def outbox_due(
        self, channels: Collection[str], now: float, limit: int
    ) -> tuple[list[OutboxRow], float | None]:
        """Take what is to be sent now; see Store."""
        self._take_back()
        rows: list[OutboxRow] = []
        others = []
        while self._outbox and self._outbox[0][0] <= now and len(rows) < limit:
            item = heappop(self._outbox)
            if item[2].channel.name not in channels:
                others.append(item)
                continue
            self._sending[item[1]] = item
            rows.append(OutboxRow(item[1], item[2].channel.name, item[2].message))
        # Any time will do where there are rows: whoever has sent them asks again.
        waiting = [now] if rows else (due for due, _, staged in self._outbox if staged.channel.name in channels)
        due = min(waiting, default=None)
        for item in others:
            heappush(self._outbox, item)
        return rows, due

    def _take_back(self) -> None:
        """Let what was taken and not sent wait again: whoever asks for more has failed with it."""
        for item in self._sending.values():
            heappush(self._outbox, item)
        self._sending.clear()

    async def outbox_sent(self, rows: Sequence[int]) -> None:
        """Forget what was sent; see Store."""
        for number in rows:
            del self._sending[number]

    async def outbox_postpone(self, rows: Sequence[int], until: float) -> None:
        """Let rows wait; see Store."""
        for number in rows:
            heappush(self._outbox, (until, number, self._sending.pop(number)[2]))

    async def tidy(self) -> None:
        """Do nothing: a test ends before the inbox window does."""

    def give_back(self, taker: object) -> None:
        """Give back the parked messages that a process had taken that is gone; see parked_due."""
        self._parked.give_back(taker)

    def unsent(self) -> list[Staged]:
        """Return what waits in the outbox, the messages that are being sent included."""
        return [item[2] for item in (*self._outbox, *self._sending.values())]

    def parked_count(self) -> int:
        """Return how many messages wait for their next try, or behind one that does."""
        return self._parked.count()

    def on_staged(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._staged_callbacks.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._callbacks.append(callback)

    def _notify(self) -> None:
        for callback in self._callbacks:
            callback()


def _inbox_id(delivery: Delivery) -> str:
    message = delivery.message
    if message is None:
        return ""  # unreadable: never acknowledged as handled
    identity = message.id if delivery.fresh else message.identity  # an id made here is a UUID, and identity enough
    return f"{message.tenantid}\n{identity}" if message.tenantid else identity


def _attempt_id(delivery: Delivery) -> tuple[str, int, int]:
    return delivery.subscription.label, delivery.position, delivery.row


def _event(delivery: Delivery) -> bytes:
    if delivery.raw is not None:
        return delivery.raw
    assert delivery.message is not None  # noqa: S101 - one of the two is always there
    return pack(delivery.message)
