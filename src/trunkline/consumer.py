"""One subscription at work: receive, lanes, deliver, and what follows a commit.

Invariant: at most `limit` messages are under way; a commit that failed is done again in the order of the
messages, and nothing later of the subscription is committed before; nothing begins here of a partition that another
process may read. Never does: decide outcomes (delivery.py).
Read next: delivery.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from trunkline.clock import Clock
from trunkline.delivery import MAX_CRASHES, Deliverer
from trunkline.errors import LeaseLostError, TransportError, TrunklineError
from trunkline.handler import Options
from trunkline.lanes import Lanes
from trunkline.message import unpack
from trunkline.outcome import ACK, DeadLetter, RetryLater
from trunkline.parking import Parking
from trunkline.policies.breaker import Circuit
from trunkline.policies.retry import describe
from trunkline.store import Store, Unit
from trunkline.tasks import cancel, spawn
from trunkline.transport import LIVE, Delivery, Subscription, Transport

log = logging.getLogger("trunkline.consumer")
T = TypeVar("T")

IN_FLIGHT = 1000
"""Most messages of one subscription under way in one process."""
AGAIN_S = 1.0
"""Wait before doing again what the store could not commit."""
LAST_WORD_S = 2.0
"""Most seconds that a stop waits for the store to take tries back."""


class Consumer:
    """Receives for one subscription and sees its messages through.

    Args:
        shared: whether the Store commits settlements itself.
        alone: held while a message runs that may have taken a process down.
        failed: told about an error that ends the service.
    """

    def __init__(  # noqa: PLR0913 - wired by app only
        self,
        subscription: Subscription,
        options: Options,
        *,
        batch: bool,
        transport: Transport,
        store: Store,
        clock: Clock,
        parking: Parking,
        shared: bool,
        alone: asyncio.Lock,
        failed: Callable[[BaseException], None],
    ) -> None:
        self.subscription = subscription
        self.parking = parking
        self.deliverer: Deliverer
        self._options = options
        self._batch = batch
        self._transport = transport
        self._store = store
        self._clock = clock
        self._shared = shared
        self._alone = alone
        self._failed = failed
        self._tasks: list[asyncio.Task[None]] = []
        self._under_way = 0
        self._free: asyncio.Future[None] | None = None
        self._assignment = -1
        self._left: set[int] = set()
        self._begun: dict[int, Delivery] = {}  # suspects whose try is counted and did not end, by their `id`
        self._redo: list[Delivery] = []
        self._acks: list[Delivery] = []
        self._batch_ended = asyncio.Event()
        self._batch_ended.set()
        self._gathered: list[Delivery] = []
        self._singly: set[int] = set()  # those whose batch broke a constraint at its commit, by their `id`
        self._gathering = asyncio.Event()
        self._full = asyncio.Event()
        self._batches_idle = asyncio.Event()
        self._batches_idle.set()
        self._going = asyncio.Event()
        self._going.set()
        self._held: set[str] = set()  # why nothing begins now
        self.circuit: Circuit | None = None
        if options.breaker is not None:
            self.circuit = Circuit(
                options.breaker, clock, hold=lambda: self._hold("breaker"), go_on=lambda: self._go_on("breaker"),
                told=parking.tell,
            )  # fmt: skip
        self._draining = False
        self._broken = False
        self.lanes: Lanes

    def start(self, deliverer: Deliverer) -> None:
        """Begin to receive."""
        self.deliverer = deliverer
        moves = self.subscription.channel.kind == "stream" and self._transport.capabilities.processes
        deliver = self._deliver_owned if moves else deliverer.deliver
        self.lanes = Lanes(deliver, self._options.concurrency, self.subscription.label)
        self.lanes.failure = self._failed
        self._spawn(self._receive())
        self._spawn(self.parking.work())
        if self._batch:
            self._spawn(self._run_batches())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = spawn(coroutine, self._failed)
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def drain(self, grace_s: float) -> None:
        """Let what is under way finish for up to `grace_s` seconds, then cancel it; its messages come again."""
        self._draining = True
        self._under_way -= self.lanes.forget_waiting() + len(self._gathered)
        self._gathered.clear()
        self._batches_idle.set()
        try:
            async with asyncio.timeout(grace_s):
                await self._empty()
        except TimeoutError:
            log.warning("%s: %d messages unfinished at stop; they come again", self.subscription.label, self._under_way)

    async def _empty(self) -> None:
        while self._under_way and not self._broken:
            self._free = asyncio.get_running_loop().create_future()
            await self._free

    async def stop(self) -> None:
        """Cancel everything; a try that this interrupts is no crash."""
        self.deliverer.stopping = True
        if self.circuit is not None:
            self.circuit.stop()
        await cancel(list(self._tasks), self.subscription.label)
        await self.lanes.stop()
        begun, self._begun = list(self._begun.values()), {}
        if begun and not self._broken:
            try:
                async with asyncio.timeout(LAST_WORD_S):
                    await self._store.undo_attempts(begun)
            except Exception as error:  # noqa: BLE001 - whatever the store says, the rest is to be stopped
                log.warning(
                    "%s: the store did not take back %d tries that the stop interrupted; they count as crashes: %s",
                    self.subscription.label, len(begun), str(error) or f"no answer within {LAST_WORD_S:g} s",
                )  # fmt: skip

    # --- pauses ---

    def _hold(self, why: str) -> None:
        """Begin nothing more; what runs goes on."""
        self._held.add(why)
        self.lanes.pause()
        self._going.clear()

    def _go_on(self, why: str) -> None:
        """Begin again, unless there is another reason not to."""
        self._held.discard(why)
        if not self._held:
            self._going.set()
            self.lanes.resume()

    # --- receiving ---

    async def _receive(self) -> None:
        while True:
            while self._under_way >= IN_FLIGHT:
                self._free = asyncio.get_running_loop().create_future()
                await self._free
            await self.parking.room()
            try:
                batch = await self._transport.receive(self.subscription, max(1, IN_FLIGHT - self._under_way))
            except TransportError as error:
                if not error.retryable:
                    raise
                log.warning("%s cannot receive, again in %.0f s: %s", self.subscription.label, AGAIN_S, error)
                await self._clock.sleep(AGAIN_S)
                continue
            if self._left:
                # All that is older than this batch goes before it is let in; what comes again begins anew.
                self._without_lost([])
                self._left.clear()
            self._under_way += len(batch)
            await self._admit(batch)

    async def _until_stored(self, act: Callable[[], Awaitable[T]]) -> T:
        """Await `act()`, again and again while the store has no room or does not answer.

        Raises: TransportError when the store has failed for good.
        """
        while True:
            try:
                return await act()
            except TransportError as error:
                if _is_final(error):
                    raise
                log.warning("%s: again in %.0f s: %s", self.subscription.label, AGAIN_S, error)
            await self._clock.sleep(AGAIN_S)

    async def _admit(self, batch: list[Delivery]) -> None:
        """Read envelopes, acknowledge what was handled before, treat suspects, hand the rest to the lanes."""
        assignment = self._transport.assignment(self.subscription)
        if assignment != self._assignment:
            # Before anything of a partition that is new here runs: its parked keys must be known.
            await self._until_stored(self.parking.load)
            self._assignment = assignment
            batch = self._without_lost(batch)
        seen_before = [delivery for delivery in batch if not delivery.fresh]
        if seen_before:
            batch = await self._without_known(batch, seen_before)
            if any(delivery.suspect for delivery in batch):
                batch = await self._admit_suspects(batch)
        self._run(batch)

    def _without_lost(self, batch: list[Delivery]) -> list[Delivery]:
        """Forget what waits here of partitions that another process reads now; return the rest of `batch`."""
        forgotten = self.lanes.forget(self._is_lost)
        for waiting in (self._gathered, batch):
            forgotten += [delivery for delivery in waiting if self._is_lost(delivery)]
            waiting[:] = [delivery for delivery in waiting if not self._is_lost(delivery)]
        self._forget(forgotten)
        return batch

    def _is_lost(self, delivery: Delivery) -> bool:
        """Return whether another process may read the partition of a delivery, or may have done so meanwhile.

        Once one delivery was left for it, all that were received with it or before are: a partition that comes back
        brings them again, and the later ones must not run before the earlier.
        """
        partition = delivery.partition
        if partition < 0 or delivery.row != LIVE:
            return False
        if partition not in self._left:
            if self._transport.owns(self.subscription, partition):
                return False
            self._left.add(partition)
        return True

    def _forget(self, deliveries: Sequence[Delivery]) -> None:
        """Take messages for no longer under way, though nothing became of them: they are another process's."""
        self._under_way -= len(deliveries)
        self._give_room()
        interrupted = [delivery for delivery in deliveries if self._begun.pop(id(delivery), None)]
        if interrupted:
            # The partition went away, the process did not: these tries were no crashes.
            self._spawn(self._until_stored(lambda: self._store.undo_attempts(interrupted)))

    def _deliver_owned(self, delivery: Delivery) -> Coroutine[Any, Any, None] | None:
        """Deliver, unless its partition went away while it waited.

        What waits is forgotten only after the store was asked. Until then whoever reads the partition now may have
        come to its key, and no parked key holds it back here.
        """
        moved = self._transport.assignment(self.subscription) != self._assignment
        if moved and self._is_lost(delivery):
            self._forget([delivery])
            return None
        return self.deliverer.deliver(delivery)

    async def _without_known(self, batch: list[Delivery], candidates: list[Delivery]) -> list[Delivery]:
        """Acknowledge those of `candidates` that were handled before; return the rest of `batch`."""
        for delivery in candidates:
            if delivery.message is None and delivery.unread is None:
                self._read_envelope(delivery)
        if not self._store.remembers:
            return batch
        known = await self._until_stored(lambda: self._store.known(self.subscription, candidates))
        rest = []
        for delivery in batch:
            message = delivery.message
            if message is not None and not delivery.fresh:
                identity = (message.tenantid or "", message.identity)
                if identity in known:
                    self._acknowledge(delivery)
                    continue
                known.add(identity)  # a second copy in this batch: the first one answers for both
            rest.append(delivery)
        return rest

    def _read_envelope(self, delivery: Delivery) -> None:
        try:
            delivery.message = message = unpack(delivery.raw)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - any bytes may be there; deliver says so and buries it
            log.debug("unreadable envelope on %s: %s", self.subscription.label, error)
        else:
            if delivery.key is None:
                delivery.key = message.partitionkey

    def _acknowledge(self, delivery: Delivery) -> None:
        unit = Unit((delivery,), self._acknowledged)
        unit.duplicate = True
        self.deliverer.settle(unit, ACK)

    def _acknowledged(self, unit: Unit, error: BaseException | None) -> None:
        """React to the end of `_acknowledge`: what failed is not done again as a message, before the first copy."""
        if isinstance(error, TrunklineError) and not _is_final(error):
            self._spawn(self._acknowledge_again(unit.deliveries[0]))
        else:
            self.settled(unit, error)

    async def _acknowledge_again(self, delivery: Delivery) -> None:
        await self._clock.sleep(AGAIN_S)
        self._acknowledge(delivery)

    async def _admit_suspects(self, batch: list[Delivery]) -> list[Delivery]:
        """Count the try on disk before it begins; run alone what was under way in more than one crash."""
        suspects = [delivery for delivery in batch if delivery.suspect]
        counts = dict(
            zip(map(id, suspects), await self._until_stored(lambda: self._store.attempts(suspects)), strict=True)
        )
        new = [delivery for delivery in suspects if not counts[id(delivery)]]
        if new:
            await self._begin_attempts(new)
        runnable: list[Delivery] = []
        for number, delivery in enumerate(batch):
            if not counts.get(id(delivery)):
                runnable.append(delivery)
                continue
            self._run(runnable)
            runnable = []
            if self._draining:
                self._under_way -= len(batch) - number
                self._give_room()
                break
            await self._run_alone(delivery)
        return runnable

    async def _run_alone(self, delivery: Delivery) -> None:
        """Run a suspect while nothing else of its subscription does, and count it only now: so innocents are not."""
        async with self._alone:
            await self._idle()
            if self._is_lost(delivery):
                self._forget([delivery])
                return
            (count,) = await self._begin_attempts([delivery])
            # What was submitted before is stored now: a broker that moved a partition away and back brings again what
            # this process has just handled.
            if not await self._without_known([delivery], [delivery]):
                return
            if count > MAX_CRASHES:
                reason = f"the process died {count} times while handling it"
                delivery.attempt = count
                self.deliverer.settle(Unit((delivery,), self.settled), DeadLetter("crashed", reason))
                return
            self._run([delivery])
            await self._idle()

    async def _begin_attempts(self, suspects: list[Delivery]) -> list[int]:
        """Count the try of each on disk; return the counts."""
        counts = await self._until_stored(lambda: self._store.begin_attempts(suspects))
        self._begun.update((id(delivery), delivery) for delivery in suspects)
        return counts

    async def _idle(self) -> None:
        await self.lanes.idle()
        await self._batches_idle.wait()

    def _run(self, deliveries: Sequence[Delivery], *, first: bool = False) -> None:
        """Have deliveries run after, or before, what waits here."""
        if not deliveries:
            return
        if self._draining:
            # What waited before these was forgotten, so they must not run either: they all come again, in order.
            self._under_way -= len(deliveries)
            self._give_room()
        elif self._batch:
            at = 0 if first else len(self._gathered)
            self._gathered[at:at] = deliveries
            self._batches_idle.clear()
            self._gathering.set()
            if len(self._gathered) >= self._options.batch.size:
                self._full.set()
        elif first:
            self.lanes.add_first(deliveries)
        else:
            self.lanes.add(deliveries)

    async def run_parked(self, deliveries: list[Delivery]) -> None:
        """Run parked messages that are due; each try is counted, for one may take the process down.

        Before what waits here: they are older, and while they do not run, more of their key is parked behind them.
        """
        self._under_way += len(deliveries)
        fresh = await self._without_known(deliveries, deliveries)
        if fresh:
            self._run(await self._admit_suspects(fresh), first=True)

    async def _run_batches(self) -> None:
        options = self._options.batch
        while not self.deliverer.stopping:  # a handler may have swallowed what was to end this
            await self._gathering.wait()
            if options.wait_s and len(self._gathered) < self._next_size():
                await self._fill(options.wait_s)
            await self._going.wait()
            size = self._next_size()
            taken, self._gathered = self._gathered[:size], self._gathered[size:]
            self._singly.difference_update(map(id, taken))
            if not self._gathered:
                self._gathering.clear()
            owned = [delivery for delivery in taken if not self._is_lost(delivery)]
            self._forget([delivery for delivery in taken if self._is_lost(delivery)])
            if owned:
                self._batch_ended.clear()
                await self.deliverer.deliver_batch(owned)
                self._batch_ended.set()
            if not (self._gathered or self._redo):
                self._batches_idle.set()

    def _next_size(self) -> int:
        return 1 if self._gathered and id(self._gathered[0]) in self._singly else self._options.batch.size

    async def _fill(self, wait_s: float) -> None:
        """Wait until a batch is full, `wait_s` seconds at most."""
        self._full.clear()
        timer = self._clock.call_later(wait_s, self._full.set)
        await self._full.wait()
        timer.cancel()

    # --- after the commit ---

    def settled(self, unit: Unit, error: BaseException | None) -> None:
        """React to a unit's end: give room, or have it done again."""
        if error is not None:
            self._undone(unit, error)
            return
        parking = self.parking
        deliveries = unit.deliveries
        if unit.outcome is not ACK or parking.keys or len(deliveries) > 1 or deliveries[0].row != LIVE:
            for delivery in deliveries:
                if parking.keys or delivery.row != LIVE or unit.outcome is not ACK:
                    parking.committed(delivery)
        if not self._shared:
            self._acknowledge_later(unit)
        self._under_way -= len(deliveries)
        if self._free is not None:
            self._give_room()
        if self._begun:
            for delivery in deliveries:
                self._begun.pop(id(delivery), None)

    def _give_room(self) -> None:
        free, self._free = self._free, None
        if free is not None and not free.done():
            free.set_result(None)

    def _acknowledge_later(self, unit: Unit) -> None:
        if self._store.keeps:
            done = [delivery for delivery in unit.deliveries if delivery.row == LIVE]
        elif isinstance(unit.outcome, RetryLater):
            return  # only the broker keeps it: it is acknowledged after its last try
        else:
            done = list(unit.deliveries)
        if done:
            if not self._acks:
                asyncio.get_running_loop().call_soon(self._send_acks)
            self._acks += done

    def _send_acks(self) -> None:
        acks, self._acks = self._acks, []
        self._spawn(self._until_stored(lambda: self._transport.settle(acks)))

    def _undone(self, unit: Unit, error: BaseException) -> None:
        """Nothing of `unit` was stored: do it again, before anything later of this subscription."""
        if not isinstance(error, TrunklineError):
            # The user's statements broke a constraint at the end of the unit: a failure of the handler.
            if len(unit.deliveries) > 1:
                self._singly.update(map(id, unit.deliveries))
            elif not _is_set_aside_for(error, unit):
                self.deliverer.broken_at_end(unit, error)
                return
        elif _is_final(error):
            self._broken = True  # the engine has stopped; the service stops with it
            self._give_room()
            return
        if self.deliverer.stopping:
            return  # it comes again, to whoever reads then
        if not self._redo:
            log.warning("%s: the store refused a commit, again in %.0f s: %s", self.subscription.label, AGAIN_S, error)
            # What runs now was started after the messages that are done again: it comes after them.
            self.deliverer.epoch += 1
            self._hold("commit")
            self._spawn(self._do_again())
        self._redo += unit.deliveries

    async def _do_again(self) -> None:
        """Put what was undone in front, once nothing older can be added to it any more."""
        await self._clock.sleep(AGAIN_S)
        await self.lanes.still()
        await self._batch_ended.wait()
        assignment: int | None = None
        while assignment != (assignment := self._transport.assignment(self.subscription)):
            await self._until_stored(self.parking.load)  # for the partitions that are read now
        undone, self._redo = self._redo, []
        redo = [delivery for delivery in undone if not self._is_lost(delivery)]
        self._forget([delivery for delivery in undone if self._is_lost(delivery)])
        redo.sort(key=lambda delivery: delivery.position)
        if self._batch:
            self._gathered[:0] = redo
            self._gathering.set()
        else:
            self.lanes.add_first(redo)
        self._go_on("commit")


def _is_set_aside_for(error: BaseException, unit: Unit) -> bool:
    """Return whether the store refused to set `unit` aside for the very reason it was set aside for.

    To set it aside once more would go on for ever, without a pause.
    """
    return isinstance(unit.outcome, DeadLetter) and unit.outcome.reason == describe(error)


def _is_final(error: TrunklineError) -> bool:
    """Return whether the engine has stopped: what waits is not done again in this process."""
    return isinstance(error, LeaseLostError) or not (isinstance(error, TransportError) and error.retryable)
