"""Connections of simulated processes: what is sent arrives in order and in time, late, or breaks the connection.

Invariant: as on TCP, what is sent on a connection arrives in the order in which it was sent, once, or the connection
breaks, and then whoever waits for an answer knows nothing. Read next: transport.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trunkline.errors import TransportError

if TYPE_CHECKING:
    from trunkline.testing.simulator.loop import Lane
    from trunkline.testing.simulator.world import World

T = TypeVar("T")

LATENCIES_S = [0.001, 0.0003, 0.002, 0.005, 0.02]
"""How long a step takes without a fault; the first one on a plain tape."""
DELAYS_S = [1.5, 5.0, 15.0]
PARTITIONS_S = [3.0, 1.0, 15.0, 40.0]


class Link:
    """A process's connection to another place.

    Args:
        owner: the process, also an attribute. place: where it goes to, for people.
        broken: called on the host when the connection breaks.
    """

    def __init__(self, world: World, owner: Lane, place: str, broken: Callable[[], None]) -> None:
        self._world = world
        self.owner = owner
        self._place = place
        self._broken = broken
        self._waiting: dict[int, tuple[asyncio.Future[Any], str]] = {}
        self._latency = world.choices.of(f"latency {owner.name}")
        self._there = self._back = 0.0
        self.up = True

    async def call(self, what: str, act: Callable[[], T]) -> T:
        """Have `act` done at the other end; return what it returns.

        Raises: TransportError E521 if the connection breaks: it was done or not; what `act` raises.
        """
        if not self.up:
            raise self._lost(what)
        answer: asyncio.Future[T] = self._world.loop.create_future()
        number = self._world.loop.next_number()
        self._waiting[number] = answer, what
        where = f"{self.owner.name} → {self._place}: {what}"
        if self._world.faults.happens("request_lost", where):
            self.cut()
        else:
            self._world.loop.call_on_host_at(self._until(back=False, where=where), self._arrive, answer, act, where)
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    def _arrive(self, answer: asyncio.Future[Any], act: Callable[[], Any], where: str) -> None:
        if not self.up:
            return
        self._world.sent(self.owner.name, self._place, where)
        try:
            result, error = act(), None
        except Exception as raised:  # noqa: BLE001 - handed to the caller
            result, error = None, raised
        if self._world.faults.happens("confirm_lost", where):
            self.cut()
        elif self.up:
            self._world.loop.call_on_host_at(self._until(back=True, where=where), self._answer, answer, result, error)

    def _answer(self, answer: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        if not self.up or answer.done():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    def push(self, what: str, act: Callable[[], None]) -> None:
        """Have `act` done in the process, after what was sent to it before."""
        if self.up:
            where = f"{self._place} → {self.owner.name}: {what}"
            self._world.loop.call_on_host_at(self._until(back=True, where=where), self._push, act)

    def _push(self, act: Callable[[], None]) -> None:
        if self.up:
            self._world.loop.call_in(self.owner, act)

    def _until(self, *, back: bool, where: str) -> float:
        """Return when a step ends: never before what was sent before it."""
        world = self._world
        now = world.loop.now
        took = LATENCIES_S[self._latency(len(LATENCIES_S))]
        if world.faults.happens("delay", where):
            took += world.faults.choose("delay", DELAYS_S)
        if world.faults.happens("partition", where):
            self._block(now, back=back)
        if back:
            self._back = at = max(self._back, now + took)
        else:
            self._there = at = max(self._there, now + took)
        return at

    def _block(self, now: float, *, back: bool) -> None:
        """Let nothing pass in one direction for a while; whoever keeps leases takes a process for dead then."""
        until = now + self._world.faults.choose("partition", PARTITIONS_S)
        if back:
            self._back = max(self._back, until)
        else:
            self._there = max(self._there, until)
        if until - now > self._world.lease_s:
            self._world.loop.call_on_host(self._world.lease_s, self.cut)

    def under_way_s(self) -> float:
        """Return in how many seconds everything that the process has sent has arrived."""
        return max(0.0, self._there - self._world.loop.time())

    def cut(self) -> None:
        """Break the connection."""
        if not self.up:
            return
        self.up = False
        waiting, self._waiting = self._waiting, {}
        for answer, what in waiting.values():
            if not answer.done():
                answer.set_exception(self._lost(what))
        self._broken()

    def _lost(self, what: str) -> TransportError:
        return TransportError("E521", f"the connection to {self._place} broke: {what} was done or not")
