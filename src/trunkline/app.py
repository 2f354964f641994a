"""A system at work: start, supervise, stop.

Invariant: what a transport or store cannot keep is refused before anything is received; stopping loses nothing.
Never does: deliver (consumer.py, delivery.py). Read next: consumer.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from trunkline.channel import Channel, Queue, message_type, message_types
from trunkline.clock import Clock, offload, system_clock
from trunkline.consumer import Consumer
from trunkline.delivery import Deliverer, compile_routes
from trunkline.errors import ConfigurationError, DefinitionError, TransportError, TrunklineError
from trunkline.handler import Context, Handler, check_allowed, check_schedules, due_time, make_message
from trunkline.hooks import Hooks
from trunkline.inspection import RUN_ON_IT, left_over
from trunkline.outbox import Relay
from trunkline.parking import Parking
from trunkline.policies.retry import describe
from trunkline.service import Background, Service, System, as_system
from trunkline.store import INBOX_WINDOW_S, Store, Unit, dead_letter_queue, resolve
from trunkline.tasks import spawn
from trunkline.transport import Backlog, Staged, Subscription, Transport, load_adapter, parse_address

log = logging.getLogger("trunkline.app")
T = TypeVar("T")

GRACE_S = 30.0
"""How long a stop waits for handlers to finish."""
START_S = 1.0
"""How long a start goes on that a signal stops: what is nearly done is not interrupted."""
TIDY_S = 60.0


class App:
    """A System (or one Service) on a transport and a store.

    Args:
        system: what to run.
        transport: URL such as `sqlite:///shop.db` or `memory:`.
        store: URL; default: the transport's own database.
        clock: another one in tests.
        grace_s: how long a stop waits for handlers, in seconds.
    Raises: DefinitionError E112 for what is neither; ConfigurationError for a URL that says nothing known.

    Use it as an async context manager (started inside, stopped at the end), or call `run`.
    """

    def __init__(
        self,
        system: System | Service,
        transport: str,
        *,
        store: str | None = None,
        clock: Clock = system_clock,
        grace_s: float = GRACE_S,
    ) -> None:
        self.system = as_system(system)
        self.hooks = Hooks()
        self.clock = clock
        self._grace_s = grace_s
        self.transport_url = transport
        self.store_url = store or transport
        self.transport: Transport = load_adapter("trunkline.transports", transport, clock)
        self.store: Store = load_adapter("trunkline.stores", self.store_url, clock)
        self._consumers: list[Consumer] = []
        self._backgrounds: list[asyncio.Task[None]] = []
        self._relay: Relay
        self._relaying: asyncio.Task[None] | None = None
        self._tidying: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._engines: list[Any] = []
        self._resources = contextlib.AsyncExitStack()
        self._running: dict[str, Running] = {}
        self._started = False
        self._is_up = False  # messages can be published: from the start to near the end of the stop
        self._stopping = asyncio.Lock()

    # --- start and stop ---

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Check, connect, open resources, receive.

        Raises: DefinitionError, ConfigurationError or TransportError; then nothing was received.
        """
        self.system.check()
        check_promises(self)
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
        plans = list(plans_of(self.system))
        subscriptions = [subscription for _, subscription, _ in plans]
        channels = channels_of(self.system)
        if not self.store.keeps:
            for subscription in subscriptions:
                queue = dead_letter_queue(subscription.name)
                channels.setdefault(queue.name, queue)
        await self.transport.start(channels.values(), subscriptions)
        self._started = True
        try:
            shared = await self.store.start(self.transport, subscriptions)
        except BaseException:
            self._started = False
            await self.transport.stop()
            raise
        self._is_up = True
        try:
            await self._open(plans, channels, shared)
            if not shared and self.store_url != self.transport_url:
                await self._look_for_left_over()
        except BaseException:
            await self.stop()
            raise

    async def _look_for_left_over(self) -> None:
        """Warn of messages in the store's database that came there when it was the transport too."""
        try:
            found = await left_over(self.store_url, self.clock)
        except TrunklineError as error:
            found = ""
            log.info("whether older messages wait in the store is not known: %s", error)
        if found:
            log.warning("%s; nobody reads them here: %s", found, RUN_ON_IT)

    async def _open(
        self,
        plans: list[tuple[Service, Subscription, list[Handler]]],
        channels: dict[str, Channel],
        shared: bool,  # noqa: FBT001
    ) -> None:
        for part in (self.transport, self.store):
            engine = getattr(part, "engine", None)
            if engine is not None and engine not in self._engines:
                self._engines.append(engine)
                engine.on_failure.append(self._fail)
                if engine.failure is not None:
                    self._fail(engine.failure)
        for service in self.system.services:
            await self._run_schema(service)
            self._running[service.name] = Running(self, service, await self._open_resources(service))
        alone = asyncio.Lock()
        for service, subscription, handlers in plans:
            self._consumers.append(self._consumer(service, subscription, handlers, shared=shared, alone=alone))
        # Units of work outside handlers may publish to any channel, so the relay must know them all.
        self._relay = Relay(self.store, self.transport, known_channels(self.system) | channels, self.clock)
        self._relaying = spawn(self._relay.work(), self._fail)
        self._tidying = spawn(self._tidy(), self._fail)
        for service in self.system.services:
            for background in service.backgrounds:
                resources = self._running[service.name].resources
                running = Running(self, service, resources, background)
                self._backgrounds.append(spawn(self._background(background.function, running), self._fail))

    async def _run_schema(self, service: Service) -> None:
        try:
            await self.store.run_schema(service.statements)
        except TrunklineError:
            raise
        except Exception as error:  # whatever the driver of the database raises
            raise DefinitionError(
                "E121", f"the schema of service {service.name!r} is refused: {describe(error)}",
                f"mend the statement in {service.name}.schema(...)",
            ) from error  # fmt: skip

    def _consumer(
        self,
        service: Service,
        subscription: Subscription,
        handlers: list[Handler],
        *,
        shared: bool,
        alone: asyncio.Lock,
    ) -> Consumer:
        options = handlers[0].options
        parking = Parking(
            subscription,
            store=self.store,
            transport=self.transport,
            clock=self.clock,
            hooks=self.hooks,
            run=lambda deliveries: consumer.run_parked(deliveries),  # noqa: PLW0108 - made below
            limit=options.parked_limit,
        )
        consumer = Consumer(
            subscription,
            options,
            batch=handlers[0].batch,
            transport=self.transport,
            store=self.store,
            clock=self.clock,
            parking=parking,
            shared=shared,
            alone=alone,
            failed=self._fail,
        )
        self.store.on_change(parking.notify)
        routes, every = compile_routes(handlers, self._running[service.name].resources, self.clock)
        consumer.start(
            Deliverer(
                subscription,
                service=service.name,
                routes=routes,
                every=every,
                store=self.store,
                parking=parking,
                hooks=self.hooks,
                clock=self.clock,
                settled=consumer.settled,
                holds=options.after_dead_letter == "hold",
                circuit=consumer.circuit,
            )
        )
        return consumer

    async def stop(self) -> None:
        """Stop receiving, finish what is under way, flush the outbox, settle, close; nothing if it does not run."""
        async with self._stopping:
            if self._started:
                self._started = False
                await self._stop()

    async def _stop(self) -> None:
        for task in self._backgrounds:
            task.cancel()
        await asyncio.gather(*self._backgrounds, return_exceptions=True)
        self._backgrounds.clear()
        await self.transport.drain()
        await asyncio.gather(*(consumer.drain(self._grace_s) for consumer in self._consumers))
        for consumer in self._consumers:
            await consumer.stop()
        self._consumers.clear()
        for worker in (self._relaying, self._tidying):
            if worker is not None:
                worker.cancel()
                await asyncio.gather(worker, return_exceptions=True)
        if self._relaying is not None:
            await self._flush()
        self._relaying = self._tidying = None
        await self._resources.aclose()
        self._is_up = False
        await self.store.stop()
        await self.transport.stop()
        for engine in self._engines:
            engine.on_failure.remove(self._fail)
        self._engines.clear()

    async def _flush(self) -> None:
        """Send what the last units staged; what cannot be sent now waits in the outbox for the next process."""
        try:
            async with asyncio.timeout(self._grace_s):
                await self._relay.flush()
        except (TimeoutError, TrunklineError) as error:
            log.warning("the outbox is not empty at stop, the next process sends it: %s", describe(error))

    def run(self) -> None:
        """Run until SIGTERM or SIGINT; a second signal stops at once.

        Raises: what ended the system, if it did not end by a signal.
        """
        try:
            import uvloop
        except ImportError:
            asyncio.run(self.serve())
        else:
            uvloop.run(self.serve())

    async def serve(self) -> None:
        """Run inside an event loop until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        # Before the start: a signal in the middle of it stops as well as any other.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        try:
            if not await self._start_unless_told_to_stop():
                return
            services = ", ".join(service.name for service in self.system.services)
            log.info("%s runs on %s: %s", self.system.name, self._places(), services)
            if not any(service.handlers or service.backgrounds for service in self.system.services):
                log.warning(
                    "%s has nothing to do, no handler is declared: import the modules that do so", self.system.name
                )
            try:
                await self.ended()
            finally:
                self._second_signal_kills()
                await self.stop()
        finally:
            self._second_signal_kills()

    async def _start_unless_told_to_stop(self) -> bool:
        """Start; return False if a signal came while the broker or the store kept it waiting.

        Raises: as start, and the error that ended the system meanwhile.
        """
        assert self._ended is not None  # noqa: S101 - set by serve
        starting = asyncio.create_task(self.start())
        try:
            await asyncio.wait({starting, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                await asyncio.wait({starting}, timeout=START_S)
        finally:
            starting.cancel()  # nothing to do if it has ended
            await asyncio.wait({starting})
        if starting.cancelled():
            self._ended.result()  # it may have failed, and not been told to stop
            return False
        starting.result()
        return True

    def _places(self) -> str:
        shown, store = parse_address(self.transport_url).shown, parse_address(self.store_url).shown
        return shown if self.store_url == self.transport_url else f"{shown} with the store {store}"

    def _second_signal_kills(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    def _signalled(self, number: int) -> None:
        log.info("signal %s: stopping; a second one stops at once", signal.Signals(number).name)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    async def ended(self) -> None:
        """Wait until the system is told to stop.

        Raises: the error that ended it.
        """
        assert self._ended is not None  # noqa: S101 - set by start
        await asyncio.shield(self._ended)

    def _fail(self, error: BaseException) -> None:
        log.error("%s stops: %s", self.system.name, error, exc_info=error)
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # seen here; `ended` raises it again for whoever waits

    async def _tidy(self) -> None:
        """Let the store and the transport forget what nobody needs any more."""
        while True:
            await self.clock.sleep(TIDY_S)
            try:
                await self.store.tidy()
                await self.transport.tidy()
            except TransportError as error:
                log.warning("tidying failed, trying again in %.0f s: %s", TIDY_S, error)

    async def _background(self, function: Callable[[Running], Any], running: Running) -> None:
        await function(running)

    # --- publishing from outside handlers ---

    async def publish(
        self,
        payload: Any,
        *,
        to: Channel | None = None,
        key: str | None = None,
        within: Any = None,
        **attributes: Any,
    ) -> str:
        """Publish one message; it is confirmed when this returns.

        Args:
            within: a database connection of yours with a transaction open: the message leaves when you commit it, and
                never if you do not. Only a store in the same database can do that.
        Returns: the message's id.
        Raises: UnroutableError, PayloadError or PublishError before anything is sent; TransportError if it was refused,
            E520 before the start and after the stop; ConfigurationError E250 if the store cannot join `within`.
        """
        if not self._is_up:
            self._check_up()
        staged = make_message(payload, self.clock, self.system.name, to, key, None, attributes)
        if within is None:
            await self.transport.send((staged,))
        else:
            await self._stage_within(within, staged)
        return staged.message.id

    async def _stage_within(self, connection: Any, staged: Staged) -> None:
        stage = getattr(self.store, "stage_within", None)
        if stage is None:
            raise ConfigurationError(
                "E250",
                f"{parse_address(self.store_url).shown} cannot publish within another connection's transaction",
                "only a postgresql: store in the same database can",
            )
        await stage(connection, (staged,))

    async def publish_all(self, payloads: Sequence[Any]) -> list[str]:
        """Publish messages in order, as one batch; all are confirmed when this returns.

        Raises: as `publish`.
        """
        self._check_up()
        made = [make_message(payload, self.clock, self.system.name, None, None, None, {}) for payload in payloads]
        await self.transport.send(made)
        return [staged.message.id for staged in made]

    async def send(self, payload: Any, **options: Any) -> str:
        """Send a command; like `publish`, for Queues."""
        return await self.publish(payload, **options)

    async def schedule(self, payload: Any, at: datetime | timedelta, **attributes: Any) -> str:
        """Store a message that is published at a time, or so long from now; it is stored when this returns."""
        check_schedules(self.store)
        due = due_time(at, self.clock.now())
        staged = make_message(payload, self.clock, self.system.name, None, None, None, attributes)
        await self.commit([Staged(staged.channel, staged.message, due)])
        return staged.message.id

    async def commit(self, staged: Sequence[Staged]) -> None:
        """Commit staged messages through the store.

        Raises: TransportError if it was refused, E520 before the start and after the stop.
        """
        self._check_up()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        unit = Unit((), partial(resolve, future))
        unit.staged = tuple(staged)
        self.store.submit(unit)
        await future

    def _check_up(self) -> None:
        """Refuse what is published before the start or after the stop.

        Raises: TransportError E520.
        """
        if not self._is_up:
            shown = parse_address(self.transport_url).shown
            raise TransportError(
                "E520", f"{shown}: publishing before the start or after the stop", "publish in between"
            )

    async def backlog(self) -> dict[str, Backlog]:
        """Return how far each subscription of this App is behind, by label (`name@channel`).

        Raises: TransportError if the broker does not answer.
        """
        subscriptions = [consumer.subscription for consumer in self._consumers]
        return {one.label: await self.transport.backlog(one) for one in subscriptions}

    def running(self, service: Service | str) -> Running:
        """Return one service at work: its resources and units of work.

        Raises: DefinitionError E112 if it is not part of this system.
        """
        name = service if isinstance(service, str) else service.name
        if name not in self._running:
            raise DefinitionError("E112", f"no service {name!r} runs here", f"there are: {', '.join(self._running)}")
        return self._running[name]

    # --- checks and resources ---

    async def _open_resources(self, service: Service) -> dict[Any, Any]:
        opened: dict[Any, Any] = {}
        for cls, factory in service.factories.items():
            try:
                opened[cls] = await _open_resource(self._resources, factory)
            except (ConfigurationError, TransportError):
                raise
            except Exception as error:
                raise ConfigurationError(
                    "E208",
                    f"{service.name}: {getattr(cls, '__name__', cls)} could not be opened:"
                    f" {type(error).__name__}: {error}",
                    "see the cause above",
                ) from error
        return opened


class Running:
    """One service at work, as its background tasks see it.

    Attributes:
        resources: what `provide` opened, by type.

    Handed to a background function that declares what it `publishes`, it refuses other types.
    """

    def __init__(
        self, app: App, service: Service, resources: dict[Any, Any], background: Background | None = None
    ) -> None:
        self.app = app
        self.service = service
        self.resources = resources
        self._owner = service.name if background is None else background.name
        self._allowed = frozenset(background.gives) if background is not None and background.gives else None

    def resource(self, cls: type[T]) -> T:
        """Return the resource provided for `cls`.

        Raises: DefinitionError E108 if there is none.
        """
        if cls not in self.resources:
            raise DefinitionError("E108", f"{self.service.name} provides no {cls.__name__}", "add service.provide(...)")
        return self.resources[cls]  # type: ignore[no-any-return]

    async def publish(self, payload: Any, **options: Any) -> str:
        """Publish one message, confirmed when this returns; see App.publish.

        Raises: PublishError E304 if its background function does not declare the type; else as App.publish.
        """
        check_allowed(payload, self._allowed, self._owner, background=True)
        return await self.app.publish(payload, **options)

    @contextlib.asynccontextmanager
    async def unit_of_work(self) -> AsyncIterator[Context]:
        """Commit your statements and publications together, outside a handler.

        The commit is done when the block ends; an exception undoes all of it.
        Raises: TransportError if the commit was refused, E520 before the start and after the stop.
        """
        self.app._check_up()  # noqa: SLF001 - its other half
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        unit = Unit((), partial(resolve, future), self._owner)
        unit.context = context = Context(
            unit=unit,
            store=self.app.store,
            clock=self.app.clock,
            source=self.service.name,
            message=None,
            attempt=0,
            allowed=self._allowed,
            log=logging.getLogger(f"trunkline.handler.{self.service.name}"),
        )
        try:
            yield context
            self.app._check_up()  # noqa: SLF001 - as above
        except BaseException:
            unit.end_context()
            await self.app.store.rollback(unit)
            raise
        unit.end_context()
        self.app.store.submit(unit)
        await future


def check_promises(app: App) -> None:
    """Refuse what neither the transport nor the store of an App can keep.

    Raises: DefinitionError E115, E116 or E117.
    """
    capabilities = app.transport.capabilities
    for service in app.system.services:
        for handler in service.handlers:
            channel = handler.channel
            if isinstance(channel, Queue) and channel.priority and not capabilities.priority:
                raise DefinitionError(
                    "E116",
                    f"queue {channel.name!r} asks for priority,"
                    f" which {parse_address(app.transport_url).shown} cannot keep",
                    "use another transport or declare the queue without priority",
                )
            if channel.kind == "stream" and handler.options.after_dead_letter == "hold" and not app.store.keeps:
                raise DefinitionError(
                    "E117",
                    f"{handler.name} holds a key behind its dead letter, and {app.store_url} keeps nothing",
                    'name a store, or say handle(after_dead_letter="continue")',
                )
            if handler.options.retry.longest_s >= INBOX_WINDOW_S:
                raise DefinitionError(
                    "E115",
                    f"{handler.name} retries for up to {handler.options.retry.longest_s:.0f} s, longer than the"
                    f" inbox remembers ({INBOX_WINDOW_S:.0f} s)",
                    "shorten delays_s",
                )


def plans_of(system: System) -> list[tuple[Service, Subscription, list[Handler]]]:
    """Return the subscriptions of a system with their handlers."""
    found: dict[tuple[str, str], tuple[Service, Subscription, list[Handler]]] = {}
    for service in system.services:
        for handler in service.handlers:
            name, channel = service.reader_of(handler)
            plan = found.get((name, channel))
            if plan is None:
                subscription = Subscription(name, handler.channel, handler.options.start)
                found[name, channel] = (service, subscription, [handler])
            elif plan[0] is not service:
                raise DefinitionError(
                    "E103",
                    f"services {plan[0].name!r} and {service.name!r} share subscription {name!r} of {channel!r}",
                    "give each its own name",
                )
            else:
                plan[2].append(handler)
    return list(found.values())


def channels_of(system: System) -> dict[str, Channel]:
    """Return every channel that a system reads or publishes to, by name."""
    channels: dict[str, Channel] = {}
    for service in system.services:
        gives = [cls for handler in service.handlers for cls in handler.gives]
        gives += [cls for background in service.backgrounds for cls in background.gives]
        found = [handler.channel for handler in service.handlers]
        found += [declared.channel for cls in gives if (declared := message_type(cls)) is not None]
        for channel in found:
            if channels.setdefault(channel.name, channel) is not channel:
                raise DefinitionError(
                    "E109", f"two channels are named {channel.name!r}", "share one object, or rename one of them"
                )
    return channels


def known_channels(system: System) -> dict[str, Channel]:
    """Return every channel that this process could publish to, by name: those of `system` and whatever is imported."""
    return {declared.channel.name: declared.channel for declared in message_types()} | channels_of(system)


async def _open_resource(stack: contextlib.AsyncExitStack, factory: Callable[[], Any]) -> Any:
    if inspect.isasyncgenfunction(factory):
        return await stack.enter_async_context(contextlib.asynccontextmanager(factory)())
    if inspect.isgeneratorfunction(factory):
        return stack.enter_context(contextlib.contextmanager(factory)())
    made = factory()
    if inspect.isawaitable(made):
        made = await made
    if hasattr(made, "__aenter__"):
        return await stack.enter_async_context(made)
    if hasattr(made, "__enter__"):
        return stack.enter_context(made)
    return made


__all__ = ["App", "Running", "offload"]
