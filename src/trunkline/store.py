"""The contract of a store: inbox, outbox, parked and dead letters, and the unit of work over them.

Invariant: a Unit is committed as a whole or not at all. Read next: delivery.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from trunkline.channel import Queue
from trunkline.message import Message
from trunkline.outcome import ACK, DeadLetter, Outcome, RetryLater
from trunkline.transport import LIVE, Delivery, Staged, Subscription, Transport

INBOX_WINDOW_S = 7 * 24 * 3600.0
"""How long a handled message is remembered; the longest retry must be shorter."""

Done = Callable[[Any, BaseException | None], None]
"""Called with the Unit and None, or the error that undid it."""


class DuplicateSignal(BaseException):
    """The message was handled before: leave the handler, roll back, acknowledge.

    Not an Exception, so that a handler's `except Exception` does not catch it.
    """


class Unit(msgspec.Struct, eq=False, gc=False):
    """What the handling of one delivery (or one batch) commits.

    Attributes:
        deliveries: what is settled with it; empty for a publication from outside a handler.
        done: called once on the loop with the unit and None when committed, else the error; nothing was stored then.
        owner: name of the handler, for warnings.
        staged: messages that leave with it.
        outcome: what becomes of the deliveries.
        transaction: the handler's open transaction, if it asked for one.
        duplicate: set by the store: the inbox already had it, so only the settlement was committed.
        context: the handler's Context while it runs, if it asked for one.
    """

    deliveries: Sequence[Delivery]
    done: Done
    owner: str = ""
    staged: Sequence[Staged] = ()
    outcome: Outcome = ACK
    transaction: Transaction | None = None
    duplicate: bool = False
    context: Any = None

    def end_context(self) -> None:
        """Refuse what the handler's Context is asked for from now on."""
        if self.context is not None:
            self.context._end()  # noqa: SLF001 - users must not see it
            self.context = None

    def stage(self, staged: Staged) -> None:
        """Add a message that leaves with this unit."""
        if type(self.staged) is list:
            self.staged.append(staged)
        else:
            self.staged = [*self.staged, staged]


def _told(_unit: Unit, _error: BaseException | None) -> None:
    """Stand in place of a Unit's `done` once that was called."""


def parked_change(delivery: Delivery, outcome: Outcome) -> int:
    """Return by how much an outcome changes the number of parked or held messages of the delivery's key."""
    adds = isinstance(outcome, RetryLater) or (isinstance(outcome, DeadLetter) and outcome.holds)
    return int(adds) - int(delivery.row != LIVE)


def with_submitted(keys: dict[str, int], units: Iterable[Unit], subscription: Subscription) -> dict[str, int]:
    """Return how many are parked or held of each key, with what units change that were submitted during the reading."""
    for unit in units:
        for delivery in unit.deliveries:
            if delivery.subscription is subscription and delivery.partition >= 0 and delivery.key is not None:
                keys[delivery.key] = keys.get(delivery.key, 0) + parked_change(delivery, unit.outcome)
    return {key: count for key, count in keys.items() if count > 0}


def resolve(future: asyncio.Future[None], unit: Unit, error: BaseException | None) -> None:
    """End `future` as a unit ended; bound to its future, this is a Unit's `done`."""
    # The error keeps the frames that it came through, and those the unit, into which no garbage collection looks.
    unit.done = _told
    if future.done():
        return  # whoever waited was cancelled
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def dead_letter_queue(service: str) -> Queue:
    """Return the Queue that gets what `service` could not handle when there is no store to keep it."""
    return Queue(f"{service}.dead-letters")


class Transaction(Protocol):
    """The user's hands on the unit of work: statements join its commit."""

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return the number of rows it changed."""

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one query; return its rows."""

    def end(self) -> None:
        """Refuse further statements: the unit of work is over."""

    def connection(self) -> Any:
        """Return a DB-API 2.0 connection on this transaction, for SQLAlchemy and existing code."""


class OutboxRow(msgspec.Struct, frozen=True):
    """A staged message that waits for its relay."""

    number: int
    channel: str
    message: Message


class OutboxEntry(msgspec.Struct, frozen=True):
    """A message in the outbox as an operator sees it.

    Attributes:
        channel: where it goes.
        message: its envelope, or None if it cannot be read.
        due: when it is sent, seconds since the epoch; in the past where that is at once.
    """

    channel: str
    message: Message | None
    due: float


class DeadLetterRow(msgspec.Struct, frozen=True):
    """A message set aside.

    Attributes:
        number: its number in the store.
        subscription: label of the reader that could not handle it.
        key: its partition key, if any.
        code: code of the reason. reason: one line. detail: traceback.
        attempt: failures so far.
        at: when it was set aside, seconds since the epoch.
        holds: whether the later messages of its key wait behind it.
        waiting: how many do.
        raw: the envelope as stored; unreadable when it was undecodable.
    """

    number: int
    subscription: str
    channel: str
    message_id: str
    message_type: str
    key: str | None
    code: str
    reason: str
    detail: str
    attempt: int
    at: float
    holds: bool
    waiting: int
    raw: bytes


class ParkedRow(msgspec.Struct, frozen=True):
    """A parked message that its subscription tries next, or would if no dead letter held its key.

    Attributes:
        subscription: `name@channel`.
        message: its envelope, or None if it cannot be read.
        due: when it is tried, seconds since the epoch.
        attempt: failures so far.
        reason: why it was parked.
        behind: how many of its key wait behind it; None where nothing does, without order per key.
        held_by: number of the dead letter that it waits behind, if it does.
    """

    subscription: str
    message: Message | None
    key: str | None
    due: float
    attempt: int
    reason: str
    behind: int | None
    held_by: int | None


class SetAside(msgspec.Struct, frozen=True):
    """What a store holds of one subscription.

    Attributes:
        parked: messages that wait for their next try, behind one that does, or behind a dead letter.
        dead: dead letters.
        oldest: time of the oldest parked message; None if there is none.
    """

    parked: int = 0
    dead: int = 0
    oldest: float | None = None


class Store(Protocol):
    """Transactional state of a service. Implementations are found by entry point `trunkline.stores`.

    Attributes:
        remembers: whether it has an inbox; without one a message may have its effects twice.
        keeps: whether a parked message is safe with it, so that the broker may forget it.
    """

    remembers: bool
    keeps: bool

    async def start(self, transport: Transport, subscriptions: Sequence[Subscription]) -> bool:
        """Open; return whether `transport` is the same database, so that settlement joins the commit."""

    async def stop(self) -> None:
        """Close."""

    async def run_schema(self, statements: Sequence[str]) -> None:
        """Run the service's own table definitions."""

    async def known(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> set[tuple[str, str]]:
        """Return (tenant or empty, identity) of those among `deliveries` that were handled before."""

    def submit(self, unit: Unit) -> None:
        """Commit `unit` with the next group; `unit.done` tells when."""

    async def transaction(self, unit: Unit) -> Transaction:
        """Open the transaction of `unit`; its inbox rows are the first write.

        Raises: DuplicateSignal if the inbox has one of them.
        """

    async def rollback(self, unit: Unit) -> None:
        """Undo what the transaction of `unit` wrote and close it."""

    async def attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Return how many tries of each were begun (see `begin_attempts`) and never came to an end."""

    async def begin_attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Durably count one more try for each suspect; return the counts."""

    async def undo_attempts(self, deliveries: Sequence[Delivery]) -> None:
        """Durably take back one try of each: it did not end, and its process did not die of it."""

    async def load_parked(
        self, subscription: Subscription, owns: Callable[[int], bool], into: Callable[[dict[str, int]], None]
    ) -> None:
        """Call `into` with key → number of parked or held messages, for the partitions that `owns` accepts.

        At the moment of the call it holds for everything that was submitted before, so nothing is missed.
        """

    async def parked_due(
        self, subscription: Subscription, owns: Callable[[int], bool], now: float, limit: int, running: set[str]
    ) -> tuple[list[Delivery], float | None]:
        """Return parked deliveries that may run now, heads of keys only, and when the next is due."""

    async def outbox_due(
        self, channels: Collection[str], now: float, limit: int
    ) -> tuple[list[OutboxRow], float | None]:
        """Take what is to be sent now to `channels`, in order; also return when the next is due.

        One process at a time has rows of a channel taken, so that order per key holds.
        """

    async def outbox_sent(self, rows: Sequence[int]) -> None:
        """Forget outbox rows that the broker has confirmed."""

    async def outbox_postpone(self, rows: Sequence[int], until: float) -> None:
        """Let outbox rows that the broker refuses wait until then, so that others can leave."""

    async def dead_letters(self, subscription: str | None = None, limit: int = 1000) -> list[DeadLetterRow]:
        """Return dead letters, oldest first."""

    async def redrive(self, number: int, raw: bytes | None = None) -> None:
        """Give a dead letter back to its subscription, with `raw` in place of its envelope if given.

        Raises: DeadLetterError if there is none of that number.
        """

    async def edit_dead_letter(self, number: int, raw: bytes) -> None:
        """Replace the envelope of a dead letter, which stays set aside.

        Args:
            raw: a packed Message.
        Raises: DeadLetterError if there is none of that number.
        """

    async def discard_dead_letter(self, number: int) -> None:
        """Remove a dead letter; the messages of its key go on."""

    async def tidy(self) -> None:
        """Forget handled messages older than the inbox window, a bounded number at a time."""

    def on_staged(self, callback: Callable[[], None]) -> None:
        """Call back on the loop when the outbox may have grown, by whichever process."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back on the loop when another process may have changed the store."""
