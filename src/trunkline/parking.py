"""Parked keys: a failing message waits for its next try, and its key's later messages wait behind it.

Invariant: while a key is parked or held, no later message of it runs; what is parked is in the Store, here are
only counts. Bounded: at the limit the subscription pauses and says so, it never drops.
Never does: run handlers (delivery.py). Read next: stores/sqlite/store.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from trunkline.clock import Clock
from trunkline.errors import TransportError
from trunkline.hooks import Fact, FactKind, Hooks
from trunkline.outcome import Outcome, RetryLater
from trunkline.store import Store, parked_change
from trunkline.transport import LIVE, Delivery, Subscription, Transport

log = logging.getLogger("trunkline.parking")

BEHIND = RetryLater(0.0, "waits behind an earlier message of its key")
AGAIN_S = 1.0
"""Wait before looking again after the store failed."""
CALM = 10
"""After all keys were loaded anew nothing is for so many times as long, AGAIN_S at most: there may be very many."""
LEAST_S = 0.001
"""A shorter wait may be none on the wall clock, and be waited for again and again."""


class Parking:
    """The parked messages of one subscription, as far as this process is responsible for them.

    Args:
        run: hands deliveries that are due to the lanes.
        limit: most parked messages before `full` is set.
    """

    def __init__(
        self,
        subscription: Subscription,
        *,
        store: Store,
        transport: Transport,
        clock: Clock,
        hooks: Hooks,
        run: Callable[[list[Delivery]], Awaitable[None]],
        limit: int,
    ) -> None:
        self._subscription = subscription
        self._store = store
        self._owns = partial(transport.owns, subscription)
        self._clock = clock
        self._hooks = hooks
        self._run = run
        self._limit = limit
        self._total = 0
        self._running: set[str] = set()
        self._changed = asyncio.Event()
        self._reload = True
        self._calm_until = 0.0
        self._room = asyncio.Event()
        self._room.set()
        self.keys: dict[str, int] = {}

    async def room(self) -> None:
        """Wait until fewer than `limit` messages are parked."""
        if self._room.is_set():
            return
        reason = f"{self._total} messages are parked, the limit is {self._limit}"
        self.tell("paused", reason)
        await self._room.wait()
        self.tell("resumed", f"{self._total} messages are parked")

    def notify(self) -> None:
        """Look at the store again: another process may have changed it."""
        self._reload = True
        self._changed.set()

    async def load(self) -> None:
        """Learn which keys are parked; before the first live message of a partition is run."""
        await self._store.load_parked(self._subscription, self._owns, self._loaded)

    def _loaded(self, keys: dict[str, int]) -> None:
        self.keys.clear()
        self.keys.update(keys)
        self._total = sum(keys.values())
        self._check_room()
        self._changed.set()

    def settled(self, delivery: Delivery, outcome: Outcome) -> None:
        """Note what became of a delivery; called when its unit is submitted, so in commit order."""
        key = delivery.key
        if delivery.partition < 0 or key is None:
            return
        self._count(key, parked_change(delivery, outcome))

    def undone(self, delivery: Delivery, outcome: Outcome) -> None:
        """Take back what `settled` noted: it was not stored."""
        if delivery.partition >= 0 and delivery.key is not None:
            self._count(delivery.key, -parked_change(delivery, outcome))

    def _count(self, key: str, change: int) -> None:
        if not change:
            return
        count = self.keys.get(key, 0) + change
        if count > 0:
            self.keys[key] = count
        else:
            self.keys.pop(key, None)
        self._total += change
        self._check_room()

    def committed(self, delivery: Delivery) -> None:
        """Note that what became of a delivery is on disk: the next of its key may run."""
        if delivery.partition < 0 or delivery.key is None:
            self._changed.set()
        elif delivery.row != LIVE:
            self._running.discard(delivery.key)
            self._changed.set()
        elif delivery.key in self.keys:
            self._changed.set()  # parked just now: when its time comes is to be looked up

    def _check_room(self) -> None:
        if self._total >= self._limit:
            self._room.clear()
        else:
            self._room.set()

    async def work(self) -> None:
        """Hand out what is due, until cancelled."""
        while True:
            self._changed.clear()
            try:
                next_due = await self._step()
            except TransportError as error:
                self._reload = True  # it may be what failed
                log.warning("parked messages of %s cannot be read: %s", self._subscription.label, error)
                next_due = self._clock.now() + AGAIN_S
            if next_due is not None:
                wait_s = max(0.0, next_due - self._clock.now())
                timer = self._clock.call_later(wait_s, self._changed.set)
                await self._changed.wait()
                timer.cancel()
            else:
                await self._changed.wait()

    async def _step(self) -> float | None:
        calm_s = await self._load_anew() if self._reload else 0.0
        now = self._clock.now()
        found, next_due = await self._store.parked_due(self._subscription, self._owns, now, 100, self._running)
        for delivery in found:
            delivery.suspect = True
            if delivery.partition >= 0 and delivery.key is not None:
                self._running.add(delivery.key)
        if found:
            await self._run(found)
        if calm_s > 0:
            next_due = now + calm_s if next_due is None else min(next_due, now + calm_s)
        return next_due

    async def _load_anew(self) -> float:
        """Load the keys, unless that was just done; return after how many seconds to do it, or 0 if it is done.

        Nothing depends on doing so at once: what is redriven is counted already, and what was discarded only lets go.
        """
        began = self._clock.monotonic()
        if self._calm_until - began > LEAST_S:
            return self._calm_until - began
        self._reload = False
        await self.load()
        ended = self._clock.monotonic()
        self._calm_until = ended + min(CALM * (ended - began), AGAIN_S)
        return 0.0

    def tell(self, kind: FactKind, reason: str) -> None:
        """Tell observers that the subscription pauses or goes on."""
        subscription = self._subscription
        self._hooks.emit(Fact(kind, subscription.name, subscription.channel.name, reason=reason))
