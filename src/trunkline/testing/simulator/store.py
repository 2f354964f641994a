"""The store of a simulated service: what is committed survives its processes, and a commit takes time and can fail.

Invariant: a unit is on the disk as a whole from the moment of its commit on, whether or not its process lives to hear
of it. Read next: world.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trunkline.clock import Clock
from trunkline.errors import FatalStoreError, StoreFullError, TransportError
from trunkline.store import DeadLetterRow, OutboxRow, Transaction, Unit, resolve, with_submitted
from trunkline.stores.memory import MemoryStore
from trunkline.testing.simulator.tables import Tables
from trunkline.testing.simulator.transport import world_of
from trunkline.transport import LIVE, Address, Delivery, Subscription, Transport

if TYPE_CHECKING:
    from trunkline.testing.simulator.loop import Lane
    from trunkline.testing.simulator.world import World

COMMITS_S = [0.001, 0.0002, 0.004, 0.02]
"""How long a commit takes without a fault."""


class Disk:
    """What a service has committed.

    Attributes:
        store: the state itself. is_made: whether the service has run its schema, in this run.
        sender: the process that sends the outbox. groups: of each process that there was, what it has submitted.
    """

    def __init__(self, world: World, service: str, tables: Tables | None) -> None:
        self.service = service
        self.groups: list[list[Unit]] = []
        self.store = MemoryStore(Address("memory", "", {}, "memory:"), world.clock)
        self._tables = tables or Tables()
        self.store.tables = self._tables.connection
        self.is_made = False
        self._world = world
        self.sender: Lane | None = None
        self._holder: Unit | None = None
        self._staged: list[tuple[Lane, Callable[[], None]]] = []
        self._changed: list[tuple[Lane, Callable[[], None]]] = []
        self._waiting: deque[tuple[Lane, asyncio.Future[None]]] = deque()
        self._open: dict[Unit, Lane] = {}
        self.store.on_staged(self.was_staged)
        self.store.on_change(self.was_changed)

    def when_staged(self, lane: Lane, callback: Callable[[], None]) -> None:
        """Call back in a process when the outbox may have grown."""
        self._staged.append((lane, callback))

    def was_staged(self) -> None:
        """Tell every process that the outbox may have grown, or that nobody sends it any more."""
        for lane, callback in self._staged:
            self._world.loop.call_in(lane, callback)

    def when_changed(self, lane: Lane, callback: Callable[[], None]) -> None:
        """Call back in a process when another one has committed."""
        self._changed.append((lane, callback))

    def was_changed(self, by: Lane | None = None) -> None:
        """Tell every process but `by` of a commit."""
        for lane, callback in self._changed:
            if lane is not by:
                self._world.loop.call_in(lane, callback)

    async def lock(self, lane: Lane, unit: Unit) -> None:
        """Wait until no other handler has a transaction open."""
        while self._holder is not None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append((lane, waiter))
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake_next()  # in case it was this one's turn
                raise
        self._holder = unit
        self._open[unit] = lane

    def unlock(self, unit: Unit) -> None:
        """Let the next handler have it."""
        self._open.pop(unit, None)
        if self._holder is unit:
            self._holder = None
            self._wake_next()

    def _wake_next(self) -> None:
        while self._holder is None and self._waiting:
            lane, waiter = self._waiting.popleft()
            if lane.alive and not waiter.done():
                waiter.set_result(None)
                return

    def run_schema(self, statements: Sequence[str]) -> None:
        """Make the user's tables."""
        self._tables.run_schema(statements)
        self.is_made = True

    def uncommitted(self, label: str, but: Sequence[Unit] = ()) -> set[tuple[str, str]]:
        """Return (tenant or empty, identity) of what open transactions handle of one subscription.

        Args:
            but: units that are left out.
        """
        return {
            (delivery.message.tenantid or "", delivery.message.identity)
            for unit in self._open
            if unit not in but
            for delivery in unit.deliveries
            if delivery.message is not None and delivery.subscription.label == label
        }

    def waits_for(self, units: Sequence[Unit]) -> bool:
        """Return whether a unit handles what a transaction does that stays open: it waits for its end."""
        return bool(self._open) and any(
            (delivery.message.tenantid or "", delivery.message.identity)
            in self.uncommitted(delivery.subscription.label, units)
            for unit in units
            if not unit.duplicate
            for delivery in unit.deliveries
            if delivery.message is not None
        )

    def is_finished(self) -> bool:
        """Return whether no message waits here: to be sent, or for its next try."""
        return not self.store.unsent() and not self.store.parked_count()

    @property
    def is_held(self) -> bool:
        """Whether a handler has a transaction open."""
        return self._holder is not None

    def rows(self, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return the rows of a query on what is committed."""
        return self.store.rows(sql, parameters)

    def close(self) -> Tables | None:
        """Forget everything; return the empty tables, if they can be used again."""
        for unit in self._open:
            self.store.undo(unit)
        for group in self.groups:
            group.clear()  # no garbage collection looks into a Unit, so none would find this run
        return self._tables if self._tables.empty() else None

    def crashed(self, lane: Lane) -> None:
        """Undo what a process that is gone had not committed, and give back what it had taken."""
        for unit, owner in list(self._open.items()):
            if owner is lane:
                self.store.undo(unit)
                self.unlock(unit)
        self._staged = [(owner, callback) for owner, callback in self._staged if owner is not lane]
        self._changed = [(owner, callback) for owner, callback in self._changed if owner is not lane]
        self.store.give_back(lane)
        if self.sender is lane:
            self.sender = None
            self.was_staged()


class SimulatedStore:
    """The store of one App in a simulation."""

    remembers = True
    keeps = True

    def __init__(self, address: Address, clock: Clock) -> None:
        self._world, self._lane = world_of(address, clock)
        self._disk: Disk = self._world.disk_of(self._lane.service)
        self._kept: MemoryStore = self._disk.store
        self._group: list[Unit] = []
        self._disk.groups.append(self._group)
        self._refusing = False
        self._latency = self._world.choices.of(f"latency {self._disk.service}")
        self._transport: Any
        self._shared: bool = self._world.broker.profile.shared
        self.engine = self
        self.failure: TransportError | None = None
        self.on_failure: list[Callable[[TransportError], None]] = []

    async def start(self, transport: Transport, subscriptions: Sequence[Subscription]) -> bool:
        """Open what is on the disk; see Store."""
        await self._kept.start(transport, subscriptions)
        self._transport = transport
        return self._shared

    async def stop(self) -> None:
        """Commit what was submitted, as the engines do; what this process had taken is free again."""
        with contextlib.suppress(TransportError):  # whoever submitted it is told
            while self._group:
                await self._written()
        self._disk.crashed(self._lane)

    async def run_schema(self, statements: Sequence[str]) -> None:
        """Make the tables; see Store."""
        self._disk.run_schema(statements)

    async def known(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> set[tuple[str, str]]:
        """See Store; what a transaction has written that is still open, nobody sees."""
        known = await self._kept.known(subscription, deliveries)
        return known - self._disk.uncommitted(subscription.label) if known else known

    # --- the unit of work ---

    def submit(self, unit: Unit) -> None:
        """Commit with the next group; see Store."""
        self._group.append(unit)
        if len(self._group) == 1:
            self._world.loop.call_on_host(COMMITS_S[self._latency(len(COMMITS_S))], self._commit)

    def _commit(self) -> None:
        """Write the group, on the disk; a process that died meanwhile has written nothing."""
        if self._refusing or not self._lane.alive:
            return
        if self._disk.waits_for(self._group):
            self._world.loop.call_on_host(COMMITS_S[0], self._commit)
            return
        units = self._group.copy()
        self._group.clear()
        world, where = self._world, f"the disk of {self._disk.service}"
        if self.failure is not None:
            self._refuse(units, self.failure)
        elif world.faults.happens("disk_full", where):
            self._refuse(units, StoreFullError("E502", f"no room left on {where}"))
        elif world.faults.happens("fsync_error", where):
            self._fail(units, FatalStoreError("E503", f"{where} failed", "restart"))
        else:
            for unit in units:
                self._apply(unit)
            if any(unit.deliveries or unit.staged for unit in units):
                self._disk.was_changed(self._lane)

    def _apply(self, unit: Unit) -> None:
        tell = unit.done
        unit.done = self._applied
        try:
            self._kept.submit(unit)
        finally:
            unit.done = tell
        self._disk.unlock(unit)

    def _applied(self, unit: Unit, error: BaseException | None) -> None:
        world = self._world
        if error is None:
            world.committed(self._lane, unit)
            if self._shared:
                for delivery in unit.deliveries:
                    if delivery.row == LIVE:
                        world.broker.settle(delivery.subscription.label, delivery.partition, delivery.position)
        world.loop.call_in(self._lane, self._tell, unit, error)

    def _tell(self, unit: Unit, error: BaseException | None) -> None:
        if error is None and self._shared:
            self._transport.finished([delivery for delivery in unit.deliveries if delivery.row == LIVE])
        unit.done(unit, error)

    def _refuse(self, units: list[Unit], error: TransportError) -> None:
        """Undo units; until the process is told, nothing of it is written, for it may come after what is undone."""
        self._refusing = True
        for unit in units:
            self._kept.undo(unit)
        self._world.loop.call_in(self._lane, self._refused, units, error)

    def _refused(self, units: list[Unit], error: TransportError) -> None:
        """Tell of units that were undone, before whoever waits goes on, as the engines do."""
        units = [*units, *self._group]
        self._group.clear()
        self._refusing = False
        for unit in units:
            self._kept.undo(unit)
            unit.done(unit, error)
        for unit in units:
            self._disk.unlock(unit)

    def _fail(self, units: list[Unit], error: FatalStoreError) -> None:
        self.failure = error
        self._refuse(units, error)
        for callback in self.on_failure:
            self._world.loop.call_in(self._lane, callback, error)

    async def transaction(self, unit: Unit) -> Transaction:
        """Open the handler's transaction; see Store."""
        await self._disk.lock(self._lane, unit)
        try:
            return await self._kept.transaction(unit)
        except BaseException:
            self._disk.unlock(unit)
            raise

    async def rollback(self, unit: Unit) -> None:
        """See Store."""
        if unit.transaction is not None:
            self._kept.undo(unit)
            self._disk.unlock(unit)

    # --- everything else, as it is on the disk ---

    async def attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """See Store."""
        return await self._kept.attempts(deliveries)

    async def begin_attempts(self, deliveries: Sequence[Delivery]) -> list[int]:
        """See Store."""
        await self._written()
        return await self._kept.begin_attempts(deliveries)

    async def undo_attempts(self, deliveries: Sequence[Delivery]) -> None:
        """See Store."""
        await self._written()
        await self._kept.undo_attempts(deliveries)

    async def _written(self) -> None:
        """Wait until everything submitted before is on the disk."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.submit(Unit((), partial(resolve, future)))
        await future

    async def load_parked(
        self, subscription: Subscription, owns: Callable[[int], bool], into: Callable[[dict[str, int]], None]
    ) -> None:
        """See Store."""
        await self._written()
        await self._kept.load_parked(
            subscription, owns, lambda keys: into(with_submitted(keys, self._group, subscription))
        )

    async def parked_due(
        self, subscription: Subscription, owns: Callable[[int], bool], now: float, limit: int, running: set[str]
    ) -> tuple[list[Delivery], float | None]:
        """See Store."""
        return await self._kept.parked_due(subscription, owns, now, limit, running, self._lane)

    async def outbox_due(
        self, channels: Collection[str], now: float, limit: int
    ) -> tuple[list[OutboxRow], float | None]:
        """See Store."""
        disk = self._disk
        if disk.sender not in (None, self._lane):
            return [], None
        rows, due = await self._kept.outbox_due(channels, now, limit)
        disk.sender = self._lane if rows or due is not None else None
        return rows, due

    async def outbox_sent(self, rows: Sequence[int]) -> None:
        """See Store."""
        await self._written()
        await self._kept.outbox_sent(rows)

    async def outbox_postpone(self, rows: Sequence[int], until: float) -> None:
        """See Store."""
        await self._kept.outbox_postpone(rows, until)

    async def dead_letters(self, subscription: str | None = None, limit: int = 1000) -> list[DeadLetterRow]:
        """See Store."""
        return await self._kept.dead_letters(subscription, limit)

    async def redrive(self, number: int, raw: bytes | None = None) -> None:
        """See Store."""
        await self._kept.redrive(number, raw)

    async def edit_dead_letter(self, number: int, raw: bytes) -> None:
        """See Store."""
        await self._kept.edit_dead_letter(number, raw)

    async def discard_dead_letter(self, number: int) -> None:
        """See Store."""
        await self._kept.discard_dead_letter(number)

    async def tidy(self) -> None:
        """See Store."""

    def on_staged(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._disk.when_staged(self._lane, callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """See Store."""
        self._disk.when_changed(self._lane, callback)
