"""The framework's own safeguards, each switched off.

Invariant: what a mutation replaces is what the product runs; nothing in the product knows of a switch.
Read next: mistakes.py.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest

from tests.simulator.mutations.bed import deploy, desk, desks, killer, post, refusal, retries, retries_of_two
from tests.simulator.mutations.hunt import Mutation
from trunkline import delivery, parked
from trunkline.consumer import Consumer
from trunkline.delivery import Deliverer
from trunkline.errors import TransportError
from trunkline.lanes import Lanes
from trunkline.outbox import BATCH, Relay
from trunkline.outcome import ACK
from trunkline.parked import ParkedMessages
from trunkline.parking import Parking
from trunkline.partitions import Watermark
from trunkline.store import Unit
from trunkline.stores import memory
from trunkline.stores.memory import MemoryStore
from trunkline.testing.simulator.store import SimulatedStore
from trunkline.testing.simulator.transport import SimulatedTransport
from trunkline.transport import LIVE

Patch = pytest.MonkeyPatch
SOON_S = 0.002


# --- the inbox ---


def no_inbox(patch: Patch) -> None:
    async def known(_self: Any, _subscription: Any, _deliveries: Any) -> set[Any]:
        return set()

    patch.setattr(MemoryStore, "_remember", lambda _self, _unit: True)
    patch.setattr(MemoryStore, "known", known)


def inbox_not_asked_at_commit(patch: Patch) -> None:
    remember = MemoryStore._remember

    def remember_any(self: MemoryStore, unit: Unit) -> bool:
        remember(self, unit)
        return True

    patch.setattr(MemoryStore, "_remember", remember_any)


def inbox_not_asked_on_admission(patch: Patch) -> None:
    async def known(_self: Any, _subscription: Any, _deliveries: Any) -> set[Any]:
        return set()

    patch.setattr(MemoryStore, "known", known)


def inbox_ignores_tenant(patch: Patch) -> None:
    async def known(self: Any, subscription: Any, deliveries: Any) -> set[Any]:
        inbox = self._inbox[subscription.label]
        return {(d.message.tenantid or "", d.message.identity) for d in deliveries if d.message.identity in inbox}

    patch.setattr(memory, "_inbox_id", lambda delivery: delivery.message.identity)
    patch.setattr(MemoryStore, "known", known)


# --- one commit ---


def _later(store: SimulatedStore, act: Any) -> None:
    """Do something on the disk in a commit of its own, if the process still lives."""
    store._world.loop.call_on_host(SOON_S, lambda: act() if store._lane.alive else None)


def inbox_in_a_second_commit(patch: Patch) -> None:
    apply = SimulatedStore._apply

    def apply_in_two(self: SimulatedStore, unit: Unit) -> None:
        apply(self, unit)
        if unit.outcome is ACK and not unit.duplicate:
            self._kept._forget(unit.deliveries)
            _later(self, lambda: self._kept._remember(unit))

    patch.setattr(SimulatedStore, "_apply", apply_in_two)


def outbox_in_a_second_commit(patch: Patch) -> None:
    send, apply = MemoryStore._send, SimulatedStore._apply
    waiting: list[Any] = []

    def apply_in_two(self: SimulatedStore, unit: Unit) -> None:
        apply(self, unit)
        for batch in waiting:
            _later(self, functools.partial(send, self._kept, batch))
        waiting.clear()

    patch.setattr(MemoryStore, "_send", lambda _self, batch: waiting.append(batch))
    patch.setattr(SimulatedStore, "_apply", apply_in_two)


def duplicate_publishes(patch: Patch) -> None:
    submit = MemoryStore._submit_any

    def submit_any(self: MemoryStore, unit: Unit) -> None:
        staged = unit.staged
        submit(self, unit)
        if unit.duplicate and staged:
            self._send(staged)

    patch.setattr(MemoryStore, "_submit_any", submit_any)


def acknowledged_before_the_commit(patch: Patch) -> None:
    run = Consumer._run

    def run_acknowledged(self: Consumer, deliveries: Any, **options: Any) -> None:
        live = [one for one in deliveries if one.row == LIVE]
        if live and not self._shared:
            self._spawn(self._transport.settle(live))
        run(self, deliveries, **options)

    patch.setattr(Consumer, "_run", run_acknowledged)


# --- the outbox ---


def row_forgotten_before_confirmed(patch: Patch) -> None:
    async def flush(self: Relay) -> float | None:
        while True:
            rows, due = await self._store.outbox_due(self._channels.keys(), self._clock.now(), BATCH)
            if not rows:
                return due
            await self._store.outbox_sent([row.number for row in rows])
            await self._transport.send([self._staged(row) for row in rows])

    patch.setattr(Relay, "flush", flush)


def row_forgotten_when_send_fails(patch: Patch) -> None:
    async def flush(self: Relay) -> float | None:
        while True:
            rows, due = await self._store.outbox_due(self._channels.keys(), self._clock.now(), BATCH)
            if not rows:
                return due
            with contextlib.suppress(TransportError):
                await self._transport.send([self._staged(row) for row in rows])
            await self._store.outbox_sent([row.number for row in rows])

    patch.setattr(Relay, "flush", flush)


def sent_beside_the_outbox(patch: Patch) -> None:
    run, start = Deliverer._run, SimulatedStore.start

    async def started(self: SimulatedStore, transport: Any, subscriptions: Any) -> bool:
        self._beside = transport
        return await start(self, transport, subscriptions)

    async def run_and_send(self: Deliverer, route: Any, unit: Unit, *args: Any) -> Any:
        value = await run(self, route, unit, *args)
        if unit.staged:
            await self._store._beside.send(unit.staged)
        return value

    deliver = Deliverer.deliver

    def deliver_with_await(self: Deliverer, one: Any) -> Any:
        route = None if self._known_outcome(one) else self._routes.get(one.message.type)
        if route is None:
            return deliver(self, one)
        return self._handle(route, Unit((one,), self._settled, route.name), one, None)

    patch.setattr(SimulatedStore, "start", started)
    patch.setattr(Deliverer, "deliver", deliver_with_await)
    patch.setattr(Deliverer, "_run", run_and_send)
    patch.setattr(MemoryStore, "_send", lambda _self, _batch: None)


def success_on_a_broken_connection(patch: Patch) -> None:
    async def send(self: SimulatedTransport, batch: Any) -> None:
        with contextlib.suppress(TransportError):
            await self.call("publish", functools.partial(self._broker.publish, list(batch)))
        self._world.offered(list(batch))
        self._world.confirmed(list(batch))

    patch.setattr(SimulatedTransport, "send", send)


def schedule_ignored(patch: Patch) -> None:
    send = MemoryStore._send

    def send_now(self: MemoryStore, batch: Any) -> None:
        send(self, [type(one)(one.channel, one.message, None, one.fresh) for one in batch])

    patch.setattr(MemoryStore, "_send", send_now)


# --- order, and failures ---


def keys_run_beside_each_other(patch: Patch) -> None:
    stay = Lanes._stay_with
    patch.setattr(Lanes, "_stay_with", lambda self, rest, _key: stay(self, rest, None))


def parked_key_released_early(patch: Patch) -> None:
    settled = Parking.settled

    def settled_and_released(self: Parking, one: Any, outcome: Any) -> None:
        settled(self, one, outcome)
        if one.row != LIVE:
            self.keys.pop(one.key, None)

    patch.setattr(Parking, "settled", settled_and_released)


def parked_keys_not_loaded(patch: Patch) -> None:
    async def load(_self: Parking) -> None:
        pass

    patch.setattr(Parking, "load", load)


def parked_keys_not_waited_for(patch: Patch) -> None:
    admit = Consumer._admit

    async def admitted(self: Consumer, batch: Any) -> None:
        self._assignment = self._transport.assignment(self.subscription)
        await admit(self, batch)

    patch.setattr(Consumer, "_admit", admitted)


def successors_not_held(patch: Patch) -> None:
    known = Deliverer._known_outcome

    def known_outcome(self: Deliverer, one: Any) -> Any:
        outcome = known(self, one)
        return None if outcome is delivery.BEHIND else outcome

    patch.setattr(Deliverer, "_known_outcome", known_outcome)


def next_parked_runs_beside_the_first(patch: Patch) -> None:
    step = Parking._step

    async def step_alone(self: Parking) -> Any:
        self._running = set()
        return await step(self)

    patch.setattr(Parking, "_step", step_alone)


def retry_forgotten_when_handed_out(patch: Patch) -> None:
    due = ParkedMessages.due

    def due_and_gone(self: ParkedMessages, label: str, *args: Any) -> Any:
        found, next_due = due(self, label, *args)
        for one in found:
            self.remove(one)
        return found, next_due

    patch.setattr(parked.ParkedMessages, "due", due_and_gone)


def tries_not_counted(patch: Patch) -> None:
    async def begin(_self: Any, deliveries: Any) -> list[int]:
        return [1 for _ in deliveries]

    patch.setattr(MemoryStore, "begin_attempts", begin)


def suspects_run_together(patch: Patch) -> None:
    async def admit(self: Consumer, batch: Any) -> Any:
        suspects = [one for one in batch if one.suspect]
        counts = await self._until_stored(lambda: self._store.begin_attempts(suspects))
        rest = [one for one in batch if not one.suspect]
        for one, count in zip(suspects, counts, strict=True):
            if count > delivery.MAX_CRASHES:
                one.attempt = count
                died = delivery.DeadLetter("crashed", f"the process died {count} times")
                self.deliverer.settle(Unit((one,), self.settled), died)
            else:
                rest.append(one)
        return rest

    patch.setattr(Consumer, "_admit_suspects", admit)


def refused_commit_not_done_again(patch: Patch) -> None:
    def undone(self: Consumer, unit: Unit, _error: Any) -> None:
        self._under_way -= len(unit.deliveries)
        self._give_room()

    patch.setattr(Consumer, "_undone", undone)


def refused_commit_done_again_beside_others(patch: Patch) -> None:
    patch.setattr(Lanes, "pause", lambda _self: None)


def begun_before_a_refused_commit_goes_on(patch: Patch) -> None:
    patch.setattr(Deliverer, "epoch", property(lambda _self: 0, lambda _self, _value: None), raising=False)


def transaction_not_rolled_back(patch: Patch) -> None:
    async def undo(_self: Deliverer, unit: Unit) -> None:
        unit.end_context()
        unit.staged = ()

    patch.setattr(Deliverer, "_undo", undo)


def failed_try_publishes(patch: Patch) -> None:
    async def undo(self: Deliverer, unit: Unit) -> None:
        unit.end_context()
        if unit.transaction is not None:
            await self._store.rollback(unit)

    patch.setattr(Deliverer, "_undo", undo)


def dead_letter_holds_nothing(patch: Patch) -> None:
    settle = Deliverer.settle

    def settle_unheld(self: Deliverer, unit: Unit, outcome: Any) -> None:
        if isinstance(outcome, delivery.DeadLetter):
            outcome = delivery.DeadLetter(outcome.code, outcome.reason, outcome.detail, holds=False)
        settle(self, unit, outcome)

    patch.setattr(Deliverer, "settle", settle_unheld)


def duplicate_in_a_batch_not_looked_for(patch: Patch) -> None:
    async def attempt(self: Deliverer, route: Any, unit: Unit, payloads: Any) -> Any:
        value = await self._run(route, unit, unit.deliveries[0], route.call(payloads, None))
        if value is not None:
            self._stage(route, unit, unit.deliveries[0].message, value)
        return ACK

    patch.setattr(Deliverer, "_try_batch", attempt)


def lost_partition_goes_on(patch: Patch) -> None:
    patch.setattr(Consumer, "_is_lost", lambda _self, _one: False)


def retries_where_it_is_not_read(patch: Patch) -> None:
    start = Parking.__init__

    def begun(self: Parking, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        self._owns = lambda _partition: True

    patch.setattr(Parking, "__init__", begun)


def assignment_not_noticed(patch: Patch) -> None:
    def same(self: SimulatedTransport, _subscription: Any) -> int:
        return 0

    patch.setattr(SimulatedTransport, "assignment", same)


def offset_passes_the_unfinished(patch: Patch) -> None:
    done = Watermark.done

    def done_past(self: Watermark, positions: Any) -> bool:
        positions = list(positions)
        before = self.low
        done(self, positions)
        self.low = max(self.low, *(position + 1 for position in positions))
        return self.low != before

    patch.setattr(Watermark, "done", done_past)


def drain_does_not_wait(patch: Patch) -> None:
    async def empty(_self: Consumer) -> None:
        pass

    patch.setattr(Consumer, "_empty", empty)


SAFEGUARDS = (
    Mutation("no inbox", desk, no_inbox, by="crash sweep"),
    Mutation("the inbox is not asked at commit", post, inbox_not_asked_at_commit, by="point sweep"),
    Mutation("the inbox is not asked on admission", desk, inbox_not_asked_on_admission, by=""),
    Mutation("the inbox ignores the tenant", post, inbox_ignores_tenant, by="plain"),
    Mutation("effect and inbox row in two commits", desk, inbox_in_a_second_commit, by="crash sweep"),
    Mutation("effect and outbox row in two commits", desk, outbox_in_a_second_commit, by="crash sweep"),
    Mutation("a duplicate publishes again", post, duplicate_publishes, by="random", seed=90),
    Mutation("acknowledged before the commit", desk, acknowledged_before_the_commit, by="crash sweep"),
    Mutation(
        "an outbox row is forgotten before it is confirmed", desk, row_forgotten_before_confirmed, by="crash sweep"
    ),
    Mutation("an outbox row is forgotten when sending fails", desk, row_forgotten_when_send_fails, by="point sweep"),
    Mutation("messages are sent beside the outbox", desk, sent_beside_the_outbox, by="crash sweep"),
    Mutation("success on a broken connection", desk, success_on_a_broken_connection, by="point sweep"),
    Mutation("a schedule is ignored", post, schedule_ignored, by="plain"),
    Mutation("messages of a key run beside each other", desk, keys_run_beside_each_other, by="plain"),
    Mutation("a parked key is released early", desk, parked_key_released_early, by="plain"),
    Mutation("parked keys are not loaded", desk, parked_keys_not_loaded, by="crash sweep", broker="rabbitmq"),
    Mutation(
        "the first messages do not wait for parked keys",
        desk,
        parked_keys_not_waited_for,
        by="random",
        broker="rabbitmq",
    ),
    Mutation("successors of a parked message are not held", desk, successors_not_held, by="plain"),
    Mutation("the next parked message runs beside the first", retries, next_parked_runs_beside_the_first, by=""),
    Mutation("a delayed retry is forgotten when it begins", desk, retry_forgotten_when_handed_out, by="crash sweep"),
    Mutation("tries are not counted across crashes", killer, tries_not_counted, by="plain"),
    Mutation("suspects run together", killer, suspects_run_together, by="plain"),
    Mutation("a refused commit is not done again", desk, refused_commit_not_done_again, by="point sweep"),
    Mutation("later messages go on while one is done again", desk, refused_commit_done_again_beside_others, by="pairs"),
    Mutation("what began before a refused commit is kept", desk, begun_before_a_refused_commit_goes_on, by="pairs"),
    Mutation("a failed handler's statements stay", desk, transaction_not_rolled_back, by="plain"),
    Mutation("a failed handler's messages leave", desk, failed_try_publishes, by="plain"),
    Mutation("a dead letter holds nothing", refusal, dead_letter_holds_nothing, by="plain"),
    Mutation("a lost partition goes on", desks, lost_partition_goes_on, by="random", seed=170),
    Mutation(
        "retries where the partition is not read", retries_of_two, retries_where_it_is_not_read, by="random", seed=15070
    ),
    Mutation("a new assignment is not noticed", desks, assignment_not_noticed, by="random", seed=15),
    Mutation("an offset passes an unfinished message", desk, offset_passes_the_unfinished, by="crash sweep"),
    Mutation("a stop does not wait for handlers", deploy, drain_does_not_wait, by="point sweep"),
    Mutation(
        "a duplicate in a batch is not looked for", post, duplicate_in_a_batch_not_looked_for, by="random", seed=85
    ),
)
