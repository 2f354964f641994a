"""One run of a simulated system: its processes, their broker and disks, what goes wrong, and the verdict.

Invariant: the same tape gives the same run, step by step. A run is judged only once nothing goes wrong any more and
everything had time to come to rest. Read next: search.py.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import re
import traceback
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec

from trunkline.app import App
from trunkline.channel import Channel
from trunkline.clock import Clock, Draws
from trunkline.errors import SimulationError, TransportError
from trunkline.hooks import Fact
from trunkline.message import Message
from trunkline.outcome import ACK, PASSED
from trunkline.service import Service, System
from trunkline.store import Unit
from trunkline.testing.simulator.account import Account, Violation, subject
from trunkline.testing.simulator.broker import PROFILES, Broker, Cursor, Line, Session
from trunkline.testing.simulator.faults import CRASH, Faults
from trunkline.testing.simulator.interception import interception
from trunkline.testing.simulator.loop import STEPS, EndlessError, Lane, SimulatedLoop, make_task
from trunkline.testing.simulator.network import Link
from trunkline.testing.simulator.outside import Outside, Reply
from trunkline.testing.simulator.simulation import Client, Simulation
from trunkline.testing.simulator.store import Disk
from trunkline.testing.simulator.tape import Choices, Tape
from trunkline.testing.simulator.whereabouts import Whereabouts, raised_at
from trunkline.transport import Staged, Transport, load_adapter

EPOCH = 1_700_000_000.0
HEAL_S = 20.0
"""Virtual seconds after which nothing goes wrong any more."""
CRASH_STEPS = 1200
"""Drawn crashes happen before one of so many steps of a process, if it comes that far."""
RESTARTS_S = [0.5, 0.05, 2.0, 12.0]
AWAY_S = [2.0, 0.2, 8.0]
SKEWS_S = [-30.0, 30.0, -0.5, 0.5, -4000.0, 4000.0]
PAUSES_S = [2.0, 8.0, 20.0]
_COMMITS = {ACK: "commit", PASSED: "passed"}


class Event(msgspec.Struct, frozen=True):
    """Something that happened in a run, for its story.

    Attributes:
        at: virtual seconds. who: which process, or the broker. kind: see story.py, which knows all of them.
        to: other end of what was sent; where exactly, of a fault and of what a handler raised.
        about: ids of the messages that it happened to. made: ids of those that a commit publishes.
    """

    at: float
    who: str
    kind: str
    text: str
    to: str = ""
    about: tuple[str, ...] = ()
    made: tuple[str, ...] = ()


class Result(msgspec.Struct, frozen=True):
    """How one run ended.

    Attributes:
        tape: repeats it.
        trace: hash over every step.
        fired: fault → how often.
        total: steps of everything together. steps: node → steps of its processes.
        counts: kind of decision → how many there were.
        places: of each fault, in order: which, at which node, at which step of its process.
        events, messages (by id): kept for a story only.
        outlived: variables of modules that changed, and that no crash cleared; see Variables.
    """

    violations: list[Violation]
    tape: Tape
    trace: int
    total: int
    seconds: float
    fired: dict[str, int]
    steps: dict[str, int]
    counts: dict[str, int]
    summary: dict[str, Any]
    places: list[tuple[str, str, int]] = []
    events: list[Event] = []
    messages: dict[str, Message] = {}
    outlived: tuple[str, ...] = ()


class NodeClock(Clock):
    """The clock of one process."""

    def __init__(self, world: World, lane: Lane, skew_s: float = 0.0) -> None:
        self.world = world
        self.lane = lane
        self.skew_s = skew_s
        loop = world.loop
        self.now = lambda: EPOCH + loop.now + self.skew_s
        self.monotonic = loop.time

    def random(self) -> float:
        """Return a number in [0, 1) that the seed repeats."""
        return self.world.draws.random()

    def stamp(self) -> tuple[str, float]:
        """Return a UUIDv7 that the seed repeats, and the time; see Clock."""
        now = self.now()
        self.world.ids += 1
        ms = int(now * 1000)
        return f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7000-8000-{self.world.ids:012x}", now


class Node:
    """One place where processes of a service run, one after the other.

    Attributes:
        lane: of the living process, or the last one. app: of the living process, once it has started.
    """

    def __init__(self, service: Service, number: int, copy: int) -> None:
        self.name = service.name if copy == 1 else f"{service.name}-{copy}"
        self.service = service
        self.number = number
        self.lane = Lane(self.name, number, None, service.name)
        self.lane.alive = False
        self.app: App | None = None
        self.clock: NodeClock
        self.steps = 0


class World:
    """One run.

    Args:
        tape: is repeated; its seed alone is drawn from if `random`.
        on: faults that are drawn; None lets the seed choose.
        story: whether events are kept.
    """

    def __init__(
        self,
        simulation: Simulation,
        tape: Tape,
        *,
        random: bool,
        on: Collection[str] | None = None,
        story: bool = False,
    ) -> None:
        self.simulation = simulation
        self.choices = Choices(tape, random=random)
        self.draws = Draws(tape.seed)
        self.ids = 0
        self._skewed_s = 0.0
        self.loop = SimulatedLoop(self.choices.of("order"), self._died, self._at_rest)
        self.faults = Faults(self.choices, on if random else (), self._fault)
        self.account = Account(simulation.expected)
        self.events: list[Event] | None = [] if story else None
        self.places: list[tuple[str, str, int]] = []
        self._raised: dict[tuple[str, str], str] = {}
        self._whereabouts: Whereabouts | None = None
        if story:
            self._whereabouts = Whereabouts(make_task)
            self.loop.set_task_factory(self._whereabouts.make)
        profile = PROFILES[simulation.broker]
        self.clock = NodeClock(self, self.loop.host)
        self.broker = Broker(profile, self.clock.now, self._stored, partial(self.faults.happens, "reorder"))
        self.broker_up = True
        self.lease_s = simulation.lease_s
        self.sessions: dict[Session, Link] = {}
        places = [(one, copy) for one in simulation.system.services for copy in range(1, simulation.processes + 1)]
        self.nodes = {
            node.name: node for node in (Node(one, number, copy) for number, (one, copy) in enumerate(places, 1))
        }
        self._disks: dict[str, Disk] = {}
        for service in simulation.system.services:
            self.disk_of(service.name)
        self.outside: dict[Any, Outside] = {}
        self.client = Lane("client", len(self.nodes) + 1, self)
        self._work: asyncio.Task[Any] | None = None
        self.always = list(simulation.always)
        self.eventually = list(simulation.eventually)
        self._asked: dict[Lane, list[Reply]] = {}
        self._busy: Line | Cursor | Disk | None = None

    # --- the run ---

    def run(self) -> Result:
        """Run to the end and judge.

        Raises: SimulationError E702 to E707.
        """
        collected = gc.isenabled()
        gc.disable()
        self.simulation.variables.begin()
        try:
            with interception.simulated(self):
                self._run()
        finally:
            outlived = tuple(self.simulation.variables.ended())
            self.loop.close()
            if collected:
                gc.enable()
        return Result(
            self.account.violations, self.choices.made(), self.loop.trace, self.loop.steps, self.loop.time(),
            dict(self.faults.fired), {node.name: node.steps + node.lane.steps for node in self.nodes.values()},
            self.choices.counts(), self.account.summary(), self.places, self.events or [],
            {} if self.events is None else self.account.messages, outlived,
        )  # fmt: skip

    def _run(self) -> None:
        try:
            self._start()
            self._go()
            self._judge()
        finally:
            self._forget()

    def _go(self) -> None:
        try:
            self.loop.run(HEAL_S)
            if not self._at_rest():
                self._heal()
                self.loop.run(self.loop.time() + self.simulation.rest_s + self._skewed_s)
        except EndlessError:
            text = f"not after {STEPS:,} steps: something goes round in circles"
            self.account.violations.append(Violation("comes to rest", text))

    def _start(self) -> None:
        for node in self.nodes.values():
            self._launch(node)
        self._work = self.spawn(self.client, self._use())

    async def _use(self) -> None:
        """Use the system, from outside."""
        clock = NodeClock(self, self.client)
        transport: Transport = load_adapter("trunkline.transports", f"sim:{self.simulation.broker}", clock)
        await transport.start((), ())
        await self.simulation.workload(Client(self, transport, clock))

    def spawn(self, lane: Lane, coroutine: Any) -> asyncio.Task[Any]:
        """Run a coroutine in a process."""
        return self.loop.create_task(coroutine, context=lane.context.copy())

    def asked(self, lane: Lane, reply: Reply) -> None:
        """Note who waits for an answer of a process."""
        self._asked.setdefault(lane, []).append(reply)

    def answered(self, lane: Lane, reply: Reply) -> None:
        """Note that an answer is on its way."""
        self._asked[lane].remove(reply)

    def _launch(self, node: Node) -> None:
        if self._at_rest():
            return
        lane = node.lane = Lane(node.name, node.number, self, node.service.name)
        lane.fuse = self.faults.fuse(node.name, CRASH_STEPS)
        skew = self._skew("clock_skew") if self.faults.happens("clock_skew", node.name) else 0.0
        node.clock = NodeClock(self, lane, skew)
        node.app = None
        self.note(node.name, "process", "starts")
        self.spawn(lane, self._live(node, lane))

    async def _live(self, node: Node, lane: Lane) -> None:
        url = f"sim:{self.simulation.broker}"
        app = App(System(node.service.name, [node.service]), url, store=url, clock=node.clock)
        if self.events is not None:
            app.hooks.add(lambda fact: self._fact(node.name, fact))
            app.hooks.raised = lambda one, error: self._raised.update({(node.name, one): raised_at(error)})
        try:
            await app.start()
            node.app = app
            await app.ended()
        except TransportError as error:
            self.note(node.name, "process", f"ends: {error}")
            self._died(lane)

    def _died(self, lane: Lane) -> None:
        """End a process in the middle of whatever it did, and start it again after a while."""
        node = self.nodes[lane.name]
        if lane.steps == lane.fuse:
            self.faults.note(CRASH, lane.name)
        if self._whereabouts is not None:
            self.note(lane.name, "cut short", ", ".join(self._whereabouts.of(lane)))
        node.steps += lane.steps
        lane.steps = 0
        node.app = None
        self.crash(lane)
        restart_s = self.choices.of("restart")
        self.loop.call_on_host(RESTARTS_S[restart_s(len(RESTARTS_S))], self._launch, node)

    def crash(self, lane: Lane) -> None:
        """End a process in the middle of whatever it did."""
        self.loop.kill(lane)
        self.simulation.variables.crashed(lane.service)
        self.disk_of(lane.service).crashed(lane)
        for session, link in list(self.sessions.items()):
            if link.owner is lane:  # what it has sent arrives all the same, and then the end of the connection
                self.loop.call_on_host(link.under_way_s(), self._hung_up, session, link)
        for reply in self._asked.pop(lane, ()):
            reply(None, ConnectionResetError(f"{lane.name} went away"))

    def _hung_up(self, session: Session, link: Link) -> None:
        link.up = False
        self.session_over(session)

    def session_over(self, session: Session) -> None:
        """Have the broker find out that a connection is gone: at once, or when the lease is over."""
        if self.sessions.pop(session, None) is not None:
            after_s = 0.0 if self.broker.profile.at_once or session.open is False else self.lease_s
            self.loop.call_on_host(after_s, self._gone, session)

    def _gone(self, session: Session) -> None:
        if self.events is not None and session.name in self.nodes:
            self.note("broker", "gone", session.name)
        self.broker.leave(session)

    def _over(self) -> bool:
        return self._work is not None and self._work.done()

    def _at_rest(self) -> bool:
        return self._over() and self.is_quiet()

    def is_quiet(self) -> bool:
        """Return whether nothing is left to be done but what the workload does."""
        lines, cursors = self.broker.lines, self.broker.cursors
        if self._busy is None or self._busy.is_finished():  # asked often, and then this one rarely is
            parts: list[Line | Cursor | Disk] = [*lines.values(), *cursors.values(), *self._disks.values()]
            self._busy = next((part for part in parts if not part.is_finished()), None)
        return self._busy is None and self.simulation.expected.types.keys() == lines.keys() | cursors.keys()

    def _heal(self) -> None:
        self.faults.heal()
        for node in self.nodes.values():
            node.lane.fuse = 0
            node.clock.skew_s = 0.0
        self.note("world", "process", "nothing goes wrong from here on")

    def _judge(self) -> None:
        account = self.account
        work = self._work
        error = work.exception() if work is not None and work.done() else None
        kind = "" if isinstance(error, Exception) else type(error).__name__  # of pytest.fail: Failed, of skip: Skipped
        if error is not None and (isinstance(error, AssertionError) or kind == "Failed"):
            account.violations.append(
                Violation(getattr(self.simulation.workload, "__name__", "workload"), _said(error))
            )
        elif error is not None and kind == "Skipped":
            raise error
        elif error is not None:
            raise SimulationError("E704", f"the workload failed: {type(error).__name__}: {error}") from error
        if not self._at_rest():
            account.violations.append(Violation("comes to rest", self._restless()))
        unsent = {subject(staged.message) for disk in self._disks.values() for staged in disk.store.unsent()}
        account.close(unsent, allow_dead=self.simulation.dead_letters)
        self.loop.errors += [
            {"message": f"task {task.get_coro()!r}", "exception": task.exception()}
            for task in self.loop.tasks
            if task._log_traceback  # noqa: SLF001 - nobody has asked how it ended
        ]
        for told in self.loop.errors:
            text = f"{told.get('message')}: {told.get('exception')}"
            account.violations.append(Violation("no unhandled error", text))
        if self._at_rest():
            for check in self.eventually:
                self._check(check, "eventually")

    def _check(self, check: Callable[..., Any], when: str) -> None:
        name, text = f"{when} {getattr(check, '__name__', check)}", ""
        try:
            answer = check(self.view()) if _looks(check) else check()
            if answer is False:
                text = "it returned False"
            elif inspect.iscoroutine(answer):
                answer.close()
                text = "it is async: a check looks at what is there and awaits nothing"
        except Exception as error:  # noqa: BLE001 - a check that cannot be made has failed
            text = f"{type(error).__name__}: {_said(error)}"
        if text:
            self.account.violations.append(Violation(name, text))
            self.note("world", "broken", name)

    def _restless(self) -> str:
        waiting = [
            f"{label}: {len(entries)} ({', '.join(self.account.named(e.message) for e in entries[:3])})"
            for label, entries in self.broker.waiting().items()
        ]
        stores = [
            f"{name}: {len(disk.store.unsent())} unsent, {disk.store.parked_count()} parked"
            for name, disk in self._disks.items()
            if disk.store.unsent() or disk.store.parked_count()
        ]
        work = [] if self._over() else ["the workload has not ended"]
        return f"after {self.loop.time():.0f} s: {'; '.join([*work, *waiting, *stores])}"

    def _forget(self) -> None:
        """Drop the run: what a crash left behind never runs."""
        for lane in (*[node.lane for node in self.nodes.values()], self.client, self.loop.host):
            lane.alive = False
            lane.queue.clear()
        for name, disk in self._disks.items():
            if (tables := disk.close()) is not None:
                self.simulation.tables[name] = tables
        self.loop.bury()

    # --- what the parts ask for ---

    def latency(self, who: str, choices: list[float]) -> float:
        """Return how long something takes."""
        return choices[self.choices.of(f"latency {who}")(len(choices))]

    def now(self) -> float:
        """Return seconds since the epoch, on the clock of the process that runs."""
        node = self.nodes.get(self.loop.running.name)
        return (self.clock if node is None else node.clock).now() + (self.loop.slept or 0.0)

    def disk_of(self, service: str) -> Disk:
        """Return the disk of a service."""
        disk = self._disks.get(service)
        if disk is None:
            disk = self._disks[service] = Disk(self, service, self.simulation.tables.pop(service, None))
        return disk

    def disks(self) -> list[Disk]:
        """Return the disks of all services."""
        return list(self._disks.values())

    def node_of(self, service: str) -> Node:
        """Return a place where a service runs, or runs again soon: where a request to it goes."""
        nodes = [node for node in self.nodes.values() if node.service.name == service]
        there = [node for node in nodes if node.app is not None] or nodes
        return there[self.choices.of("balance")(len(there))]

    def outside_of(self, cls: type) -> Outside:
        """Return the outside service that stands for a resource."""
        found = self.outside.get(cls)
        if found is None:
            found = self.outside[cls] = Outside(self, cls.__name__, self.simulation.override[cls]())
        return found

    def sent(self, who: str, to: str, text: str) -> None:
        """Note what arrived, for the story; and let a process stall, or the broker be away, now and then."""
        self.loop.mix(text)
        if self.events is not None:
            self.events.append(Event(self.loop.time(), who, "sent", text, to))
        if to != "broker" or not self.faults.at_broker:
            return
        if self.faults.happens("broker_restart", "broker"):
            self._restart_broker()
        if who in self.nodes and self.nodes[who].app is not None and self.faults.happens("stop", who):
            self._stop(self.nodes[who])
        if self.faults.happens("slow_consumer", who):
            self._pause(who)
        if self.faults.happens("lease_expiry", who):
            for session, link in list(self.sessions.items()):
                if link.owner.name == who:
                    self.broker.leave(session)
                    self.loop.call_on_host(self.faults.choose("lease_expiry", PAUSES_S), link.cut)

    def _stop(self, node: Node) -> None:
        """Have a process finish what it has begun and end."""
        app, node.app = node.app, None
        assert app is not None  # noqa: S101 - asked for before

        async def end(lane: Lane) -> None:
            await app.stop()
            self._died(lane)

        self.spawn(node.lane, end(node.lane))

    def _pause(self, who: str) -> None:
        """Let a process do nothing for a while."""
        lane = self.nodes[who].lane if who in self.nodes else self.client
        self.pause(lane)
        self.loop.call_on_host(self.faults.choose("slow_consumer", PAUSES_S), self.loop.resume, lane)

    def pause(self, lane: Lane) -> None:
        """Let a process do nothing until it is resumed; after the lease the broker takes it for dead."""
        self.loop.pause(lane)
        self.loop.call_on_host(self.lease_s, self._unheard, lane)

    def _unheard(self, lane: Lane) -> None:
        for session, link in list(self.sessions.items()):
            if link.owner is lane and lane.paused:
                self.broker.leave(session)
                link.cut()

    def _restart_broker(self) -> None:
        self.stop_broker()
        away_s: float = self.faults.choose("broker_restart", AWAY_S)
        self.loop.call_on_host(away_s, self.start_broker)

    def stop_broker(self) -> None:
        """Have the broker go away, and with it all connections; what it has stays."""
        self.broker_up = False
        for link in list(self.sessions.values()):
            link.cut()

    def start_broker(self) -> None:
        """Have the broker back."""
        self.broker_up = True
        self.note("broker", "process", "is back")

    def _stored(self, channel: Channel, message: Message, _position: int) -> None:
        self.account.was_stored(channel, message, self.broker.readers_of(channel))
        self.loop.mix(f"{message.type} {message.id} is stored on {channel.name}", message.data)
        if self.events is not None:
            self.note("broker", "stored", channel.name, about=(subject(message),))

    def offered(self, batch: list[Staged]) -> None:
        """Note what is on its way to the broker and not of a handler: that was committed before, or should be."""
        if self.events is not None:
            self.note(
                self.loop.running.name, "publish", "", "broker", tuple(subject(staged.message) for staged in batch)
            )
        for staged in batch:
            if staged.message.causationid is None:
                self.account.offered(staged.message)

    def confirmed(self, batch: list[Staged]) -> None:
        """Note what the broker has confirmed."""
        for staged in batch:
            self.account.confirmed.add(subject(staged.message))
        if self.events is not None:
            about = tuple(subject(staged.message) for staged in batch)
            self.note(self.loop.running.name, "confirmed", "", "broker", about)

    def committed(self, lane: Lane, unit: Unit) -> None:
        """Note a commit, and let the clock of its process jump now and then."""
        broken = len(self.account.violations)
        self.account.committed(unit)
        if self.events is not None:
            self._note_commit(lane.name, unit, broken)
        if self.faults.happens("clock_jump", lane.name):
            self.nodes[lane.name].clock.skew_s += self._skew("clock_jump")
        if not (self.always and (unit.deliveries or unit.staged or unit.owner)):
            return  # nobody looks, or nothing was written: a store only wanted to know that all before it was
        # Before the first start there are no tables; with a transaction open one would see what is not committed.
        if all(disk.is_made and not disk.is_held for disk in self._disks.values()):
            for check in self.always:
                self._check(check, "always")

    def _note_commit(self, node: str, unit: Unit, broken: int) -> None:
        about = tuple(subject(d.message) for d in unit.deliveries if d.message is not None)
        made = tuple(subject(staged.message) for staged in unit.staged)
        if about or made:
            kind = "known" if unit.duplicate else _COMMITS.get(unit.outcome, type(unit.outcome).__name__)
            self.note(node, kind, "", about=about, made=made)
        for violation in self.account.violations[broken:]:
            self.note(node, "broken", violation.promise, about=(violation.subject,))

    def _skew(self, kind: str) -> float:
        """Return by how much a clock is wrong; what is due by such a clock may be due so much later."""
        seconds: float = self.faults.choose(kind, SKEWS_S)
        self._skewed_s += abs(seconds)
        return seconds

    def _fact(self, service: str, fact: Fact) -> None:
        about = (fact.message_id,) if fact.message_id else ()
        where = self._raised.pop((service, fact.message_id), "")
        self.note(service, fact.kind, f"attempt {fact.attempt}: {fact.reason}", where, about=about)

    def _fault(self, kind: str, where: str) -> None:
        words = re.split("[ :]+", where)
        who = next((word for word in words if word in self.nodes), "client" if "client" in words else "broker")
        self.places.append((kind, who, self.nodes[who].lane.steps if who in self.nodes else 0))
        self.note(who, "fault", kind, where)

    def note(
        self, who: str, kind: str, text: str, to: str = "", about: tuple[str, ...] = (), made: tuple[str, ...] = ()
    ) -> None:
        """Keep an event for the story."""
        if self.events is not None:
            self.events.append(Event(self.loop.time(), who, kind, text, to, about, made))

    def view(self) -> View:
        """Return what checks may look at."""
        return View(self)


@lru_cache(maxsize=64)
def _looks(check: Callable[..., Any]) -> bool:
    """Return whether a check takes a view; `signature` costs more than most checks do."""
    return bool(inspect.signature(check).parameters)


def _said(error: BaseException) -> str:
    """Return what an error says, as can be written; of an assertion that says nothing, the line it stands in."""
    if text := f"{error}":
        return text.encode("utf-8", "backslashreplace").decode()
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.line} ({Path(last.filename).name}:{last.lineno})"


class View:
    """A run as checks see it: what is committed, and what outside services have.

    Attributes:
        now: virtual seconds since the run began.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.now = world.loop.time()

    def rows(self, service: str, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query on what a service has committed."""
        return self._world._disks[service].rows(sql, parameters)  # noqa: SLF001 - a window on it

    def outside(self, cls: type) -> Any:
        """Return the outside service that stands for a resource."""
        return self._world.outside_of(cls).service
