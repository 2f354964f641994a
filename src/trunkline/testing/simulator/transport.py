"""Channels on the simulated broker, as one process sees them.

Invariant: the contract of `Transport`, with the promises of the broker that the URL names (`sim:kafka`).
Read next: store.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from trunkline.channel import Channel, Stream
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError
from trunkline.inflow import Inflow
from trunkline.partitions import Watermark
from trunkline.testing.simulator.account import subject
from trunkline.testing.simulator.broker import PROFILES, Entry, Session
from trunkline.testing.simulator.network import Link
from trunkline.transport import LIVE, Address, Backlog, Capabilities, Delivery, Staged, Subscription

if TYPE_CHECKING:
    from trunkline.testing.simulator.world import NodeClock

FETCH = 100
"""Most messages that one answer brings."""
RECONNECT_S = 0.5


class SimulatedTransport:
    """Channels of one App in a simulation."""

    def __init__(self, address: Address, clock: Clock) -> None:
        self._world, self._lane = world_of(address, clock)
        self._clock = clock
        profile = self._world.broker.profile
        self._broker = self._world.broker
        self.capabilities = Capabilities(
            durable=True,
            processes=True,
            priority=profile.priority,
            ordered_streams=True,
            description=f"a simulated {profile.scheme}",
        )
        if profile.shared:
            self.place = self._broker.publish
        self._readers: dict[str, _Reader] = {}
        self._link: Link | None = None
        self._session: Session | None = None
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Connect; see Transport."""
        self._declared = list(channels), list(subscriptions)
        for subscription in self._declared[1]:
            self._readers[subscription.label] = _Reader(self, subscription)
        self._spawn(self._keep_connected())
        await self._connected.wait()
        for reader in self._readers.values():
            self._spawn(reader.work())

    def _spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def _keep_connected(self) -> None:
        while True:
            link = self._link = Link(self._world, self._lane, "broker", self._broken)
            try:
                await link.call("connect", self._join)
            except TransportError:
                link.up = False
                await self._clock.sleep(RECONNECT_S)
                continue
            self._lost.clear()
            self._connected.set()
            if link.up:
                await self._lost.wait()
            self._connected.clear()
            for reader in self._readers.values():
                reader.told(None, frozenset())

    def _join(self) -> None:
        """Sign on, at the broker."""
        world, link = self._world, self._link
        if not world.broker_up:
            raise TransportError("E520", "the broker does not answer")
        assert link is not None  # noqa: S101 - made by whoever calls this
        session = self._session = Session(
            self._lane.name,
            lambda label, entries: link.push("messages", lambda: self._readers[label].arrived(session, entries)),
            lambda label, owned: link.push("partitions", lambda: self._readers[label].told(session, owned)),
        )
        world.sessions[session] = link
        self._broker.declare(*self._declared)
        self._broker.join(session, self._readers)
        if not self._lane.alive:  # what it sent before it died arrives all the same
            world.session_over(session)

    def _broken(self) -> None:
        """React to a broken connection: the broker finds out at once or when the lease is over; the process, now."""
        session, self._session = self._session, None
        if session is not None:
            self._world.session_over(session)
        self._world.loop.call_in(self._lane, self._lost.set)

    async def call(self, what: str, act: Any) -> Any:
        """Have something done at the broker, over a connection that stands."""
        while self._link is None or not (self._connected.is_set() and self._link.up):
            self._connected.clear()
            await self._connected.wait()
        return await self._link.call(what, act)

    def ask(self, label: str) -> None:
        """Ask for more of a subscription, at the broker."""
        if self._session is not None:
            self._broker.ask(self._session, label, FETCH)

    async def send(self, batch: Sequence[Staged]) -> None:
        """Publish; see Transport."""
        staged = list(batch)
        where = f"{self._lane.name}: publish"

        def publish() -> None:
            self._broker.publish(staged)
            if not self._broker.profile.shared and self._world.faults.happens("duplicate", where):
                self._broker.publish(staged)

        self._world.offered(staged)
        try:
            await self.call("publish", publish)
        except TransportError as error:
            error.unsent = staged  # type: ignore[attr-defined]
            raise
        self._world.confirmed(staged)

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return what came; see Transport."""
        return await self._readers[subscription.label].receive(limit)

    def finished(self, deliveries: Sequence[Delivery]) -> None:
        """Note what the store has settled, where it is the same database."""
        for delivery in deliveries:
            self._readers[delivery.subscription.label].finished((delivery,))

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Confirm; what cannot be confirmed comes again."""
        by_label: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            by_label.setdefault(delivery.subscription.label, []).append(delivery)
        for label, finished in by_label.items():
            self.note("settles", finished)
            await self._settle(label, self._readers[label].finished(finished))

    async def _settle(self, label: str, places: list[tuple[int, int]]) -> None:
        session, link = self._session, self._link
        if places and session is not None and link is not None and link.up:
            with contextlib.suppress(TransportError):
                await link.call("settle", lambda: self._broker.confirm(session, label, places))

    def note(self, kind: str, some: Sequence[Entry | Delivery]) -> None:
        """Keep an event for the story."""
        if some and self._world.events is not None:
            about = tuple(subject(one.message) for one in some if one.message is not None)
            self._world.note(self._lane.name, kind, "", "broker", about)

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """See Transport."""
        return self._readers[subscription.label].owns(partition)

    def assignment(self, subscription: Subscription) -> int:
        """See Transport."""
        reader = self._readers.get(subscription.label)
        return -1 if reader is None else reader.inflow.assignment

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Count what waits; see Transport."""
        return Backlog(len(self._broker.waiting().get(subscription.label, ())))

    async def tidy(self) -> None:
        """Do nothing: a run ends before a retention does."""

    async def drain(self) -> None:
        """Stop receiving; see Transport."""
        for reader in self._readers.values():
            reader.inflow.drain()

    async def stop(self) -> None:
        """Give back what was not settled and disconnect; see Transport."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        session, link = self._session, self._link
        if link is not None and link.up:
            if session is not None:
                with contextlib.suppress(TransportError):
                    await link.call("leave", lambda: self._broker.leave(session))
            link.cut()


class _Reader:
    """What one process reads of one subscription."""

    def __init__(self, transport: SimulatedTransport, subscription: Subscription) -> None:
        self.subscription = subscription
        self.inflow = Inflow(subscription)
        self.owned: frozenset[int] = frozenset()
        self._transport = transport
        self._stream = isinstance(subscription.channel, Stream)
        self._came = asyncio.Event()
        self._under_way: dict[int, Watermark] = {}
        self._leaving: set[int] = set()

    async def work(self) -> None:
        """Ask for more, and again after each answer and each new connection."""
        transport = self._transport
        label = self.subscription.label
        while True:
            await self.inflow.room()
            self._came.clear()
            try:
                await transport.call(f"ask for {label}", lambda: transport.ask(label))
            except TransportError:
                continue
            await self._came.wait()

    def arrived(self, session: Session, entries: list[Entry]) -> None:
        """Take what the broker handed out."""
        if session is not self._transport._session:  # noqa: SLF001 - one concept in two classes
            return
        taken = [entry for entry in entries if not self._stream or entry.partition in self.owned]
        self._transport.note("received", taken)
        for entry in taken:
            if self._stream:
                self._under_way.setdefault(entry.partition, Watermark(entry.position)).take((entry.position,))
        self.inflow.put(
            Delivery(
                self.subscription, entry.message, None, entry.message.partitionkey, entry.position, entry.partition,
                0, LIVE, entry.lost,
            )
            for entry in taken
        )  # fmt: skip
        self._came.set()

    def told(self, session: Session | None, owned: frozenset[int]) -> None:
        """Take note of the partitions that may be read from now on; None: the connection is gone."""
        if session is not None and session is not self._transport._session:  # noqa: SLF001 - as above
            return
        gone = self.owned - owned
        if session is None:
            self._under_way.clear()
            self._leaving.clear()
            self._came.set()
            if not self._stream:
                self.inflow.forget()
        if not self._stream or (self.owned == owned and session is not None):
            return
        for number in [None] if session is None else sorted(gone):
            for delivery in self.inflow.forget(number):
                mark = self._under_way.get(delivery.partition)
                # What came on an earlier connection too may have been finished since.
                if mark is not None and delivery.position >= mark.low:
                    mark.give_back(1)
        self.owned = owned
        self._leaving |= {number for number in gone if session is not None}
        self._leaving -= owned
        self.inflow.reassigned()
        self._release()

    def owns(self, partition: int) -> bool:
        """Return whether what is under way of a partition may go on: also while it waits to move."""
        return partition in self.owned or partition in self._leaving

    def finished(self, deliveries: Sequence[Delivery]) -> list[tuple[int, int]]:
        """Note what is settled: a partition that is to move does so once nothing of it is under way.

        Returns: what the broker is to be told: (partition, position), of a Stream the first one that is unfinished.
        """
        if not self._stream:
            return [(delivery.partition, delivery.position) for delivery in deliveries]
        risen = {}
        for delivery in deliveries:
            mark = self._under_way.get(delivery.partition)
            if mark is not None and mark.done((delivery.position,)):
                risen[delivery.partition] = mark.low
        self._release()
        return list(risen.items())

    def _release(self) -> None:
        for number in sorted(self._leaving):
            if not len(self._under_way.get(number, ())):
                self._leaving.discard(number)
                self.inflow.reassigned()
                self._transport._spawn(self._let_go(number))  # noqa: SLF001 - as above

    async def _let_go(self, number: int) -> None:
        transport, session = self._transport, self._transport._session  # noqa: SLF001 - as above
        if session is None:
            return
        try:
            await transport.call(
                "give a partition back",
                lambda: transport._broker.release(session, self.subscription.label, number),  # noqa: SLF001
            )
        except TransportError:
            return  # the session is over, and with it the partition is another's

    async def receive(self, limit: int) -> list[Delivery]:
        """See Transport."""
        return await self.inflow.receive(limit)


def world_of(address: Address, clock: Clock) -> tuple[Any, Any]:
    """Return the world and the lane that a `sim:` URL of a simulated process belongs to.

    Raises: ConfigurationError E202 outside of a simulation, or for a broker that is not simulated.
    """
    world = getattr(clock, "world", None)
    if world is None:
        raise ConfigurationError(
            "E202", f"{address.shown} exists in a simulation only", "run it with: trunkline simulate MODULE:SYSTEM"
        )
    if address.path not in PROFILES:
        raise ConfigurationError("E202", f"no simulated {address.path!r}", f"there are: {', '.join(PROFILES)}")
    return world, cast("NodeClock", clock).lane
