"""A System as it is simulated: what is replaced, what it is given to do, and what must hold.

Read next: world.py.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from trunkline.app import Running
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, DefinitionError, TransportError
from trunkline.handler import make_message
from trunkline.service import Service, System, as_system
from trunkline.testing.simulator.account import expected_of
from trunkline.testing.simulator.broker import PROFILES
from trunkline.testing.simulator.faults import KINDS
from trunkline.testing.simulator.loop import LANE
from trunkline.testing.simulator.outside import Reply, exchange
from trunkline.testing.simulator.tables import Tables
from trunkline.testing.simulator.variables import Variables
from trunkline.transport import Transport

Check = Callable[..., Any]
Workload = Callable[["Client"], Awaitable[None]]

QUIET_S = 0.25
"""How often a workload looks whether everything has come to rest."""
AGAIN_S = 1.0
"""How long whoever uses the system waits before it asks again."""


class Simulation:
    """What `trunkline simulate` and `@simulate` run.

    Args:
        system: as it is deployed; a Service alone will do.
        workload: gives it something to do, such as `await sim.publish(OrderPlaced(...))`.
        broker: whose promises the simulated one keeps: rabbitmq, kafka, nats, redis, postgres or sqlite.
        override: resource type → class of a stand-in with plain methods; see outside.py.
        leave_out: background functions that are not run, such as a web server.
        always: checks after every commit. eventually: checks at the end. Each is called with a View, or with nothing;
            it fails by an assertion or by returning False.
        faults: those that may happen; default: all.
        dead_letters: whether a message may be set aside.
        processes: how many there are of each service.
        lease_s: how long the broker waits for a silent process, in virtual seconds.
        tables: service → its empty tables, kept from one run to the next: to make them takes a fifth of a run.
        rest_s: virtual seconds within which the system comes to rest once nothing goes wrong any more.
    Raises: ConfigurationError E701 for a broker or fault that does not exist; DefinitionError E108 for an override of
        what no service provides.
    """

    def __init__(  # noqa: PLR0913 - each says something else about one thing
        self,
        system: System | Service,
        workload: Workload,
        *,
        broker: str = "sqlite",
        override: Mapping[type, Callable[[], Any]] | None = None,
        leave_out: Collection[Any] = (),
        always: Sequence[Check] = (),
        eventually: Sequence[Check] = (),
        faults: Collection[str] | None = None,
        dead_letters: bool = False,
        processes: int = 1,
        lease_s: float = 10.0,
        rest_s: float = 3600.0,
    ) -> None:
        _check(broker, faults)
        whole = as_system(system)
        self.override = dict(override or {})
        self.system = System(whole.name, [self._simulated(service, leave_out) for service in whole.services])
        for cls in self.override:
            if not any(cls in service.factories for service in whole.services):
                raise DefinitionError(
                    "E108", f"no service of {whole.name} provides {cls.__name__} to override", "leave it out"
                )
        self.system.check()
        self.expected = expected_of(self.system)
        self.workload = workload
        self.broker = broker
        self.always = always
        self.eventually = eventually
        self.faults = faults
        self.dead_letters = dead_letters
        self.processes = processes
        self.lease_s = lease_s
        self.rest_s = rest_s
        self.tables: dict[str, Tables] = {}
        self.variables = Variables(whole, alone=processes == 1)

    def on(self, broker: str, faults: Collection[str] | None = None) -> Simulation:
        """Return the same simulation on another broker, and with other faults if they are given.

        Raises: ConfigurationError E701 for a broker or fault that does not exist.
        """
        _check(broker, faults)
        one = copy.copy(self)
        one.broker = broker
        one.faults = self.faults if faults is None else faults
        return one

    def _simulated(self, service: Service, leave_out: Collection[Any]) -> Service:
        """Return a service with stand-ins in place of what leaves the simulation."""
        one = copy.copy(service)
        one.factories = {
            cls: (lambda of=cls: LANE.get().world.outside_of(of).seen_by(LANE.get()))  # type: ignore[misc]
            if cls in self.override
            else factory
            for cls, factory in service.factories.items()
        }
        one.backgrounds = [each for each in service.backgrounds if each.function not in leave_out]
        return one


def _check(broker: str, faults: Collection[str] | None) -> None:
    if broker not in PROFILES:
        raise ConfigurationError("E701", f"no simulated broker {broker!r}", f"there are: {', '.join(PROFILES)}")
    for kind in faults or ():
        if kind not in KINDS:
            raise ConfigurationError("E701", f"no fault {kind!r}", f"there are: {', '.join(KINDS)}")


class Client:
    """Whoever uses the system: what a workload acts through.

    It never crashes, and asks again until it knows that what it wanted is done.

    Attributes:
        clock: of whoever uses the system: virtual time, and ids that the seed repeats.
    """

    def __init__(self, world: Any, transport: Transport, clock: Clock) -> None:
        self._world = world
        self._transport = transport
        self.clock = clock

    async def publish(self, payload: Any, **options: Any) -> str:
        """Publish one message, again with the same id until it is confirmed; return the id. See App.publish."""
        to, key = options.pop("to", None), options.pop("key", None)
        staged = make_message(payload, self.clock, "client", to, key, None, options)
        self._world.account.offered(staged.message)
        while True:
            try:
                await self._transport.send((staged,))
            except TransportError:
                await self.clock.sleep(AGAIN_S)
            else:
                return staged.message.id

    async def request(self, service: str, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Await `function(running, *args)` in a process of `service`, as a web request would; again until it ends.

        Returns: what it returns. Raises: what it raises, unless that is a connection that broke or the store's refusal.
        """
        while True:
            try:
                return await self._ask(service, function, args)
            except (ConnectionError, TransportError):
                await self.clock.sleep(AGAIN_S)

    async def _ask(self, service: str, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        world = self._world
        node = world.node_of(service)

        def act(reply: Reply) -> None:
            if node.app is None:
                reply(None, ConnectionRefusedError(f"{service} is not there"))
                return
            lane, running = node.lane, node.app.running(service)
            world.asked(lane, reply)
            world.spawn(lane, answer(running, lane, reply))

        async def answer(running: Running, lane: Any, reply: Reply) -> None:
            try:
                result, error = await function(running, *args), None
            except Exception as raised:  # noqa: BLE001 - its answer
                result, error = None, raised
            world.answered(lane, reply)
            reply(result, error)

        name = getattr(function, "__name__", "request")
        return await exchange(world, LANE.get(), service, name, act, ConnectionResetError)

    async def rest(self) -> None:
        """Wait until every message is finished and every outbox empty; after that a workload can check the end."""
        while not self._world.is_quiet():
            await self.sleep(QUIET_S)

    async def sleep(self, seconds: float) -> None:
        """Wait for so many virtual seconds."""
        await self.clock.sleep(seconds)

    def eventually(self, check: Check) -> None:
        """Check this at the end of the run too."""
        self._world.eventually.append(check)

    def always(self, check: Check) -> None:
        """Check this after every commit from now on."""
        self._world.always.append(check)

    @property
    def random(self) -> Any:
        """Randomness that the seed repeats (`random.Random`)."""
        return self._world.draws

    @property
    def seed(self) -> int:
        """The seed of this run: 0 in sweeps."""
        seed: int = self._world.choices.tape.seed
        return seed

    def rows(self, service: str, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query on what a service has committed."""
        rows: list[tuple[Any, ...]] = self._world.view().rows(service, sql, parameters)
        return rows

    def outside(self, cls: type) -> Any:
        """Return the stand-in for a resource, to look at or to change."""
        return self._world.outside_of(cls).service
