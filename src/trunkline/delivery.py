"""The story of one delivery, from receipt to settlement.

Invariant: every delivery is settled exactly once, in `settle`, or handed to the store as it is where nothing has to
be done (`deliver`); its inbox row, the handler's writes and its messages are one commit. Never does: network sends
(outbox.py, transports/) or SQL (stores/).
Read next: lanes.py, parking.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any

import msgspec

from trunkline import wire
from trunkline.clock import Clock, offload
from trunkline.errors import (
    DecodeError,
    FatalStoreError,
    LeaseLostError,
    PublishError,
    StoreFullError,
    StoreLostError,
    TransportError,
)
from trunkline.handler import Context, Handler, make_message, results
from trunkline.hooks import Fact, FactKind, Hooks
from trunkline.lanes import NOTHING, Ended, Resume, new_driver
from trunkline.message import Message, unpack
from trunkline.outcome import ACK, PASSED, Ack, DeadLetter, Discard, Outcome, RetryLater, RetryNow
from trunkline.parking import BEHIND, Parking
from trunkline.policies.breaker import Circuit
from trunkline.policies.retry import Retry, describe
from trunkline.policies.timeout import Deadlines
from trunkline.store import DuplicateSignal, Store, Unit
from trunkline.transport import LIVE, Delivery, Subscription

log = logging.getLogger("trunkline.delivery")

MAX_CRASHES = 3
"""After so many more crashes while a message was in its handler it is set aside."""

NOT_OF_THE_HANDLER = (StoreFullError, StoreLostError, FatalStoreError, LeaseLostError)
"""What the store meets in the middle of a handler: the message is done again, and that is no failed try."""

_IN_WORDS = {RetryLater: "tried again later", DeadLetter: "set aside", Discard: "dropped"}

Call = Callable[[Any, Context | None], Any]


class Route:
    """A handler with everything about it decided: what one message needs is a lookup and a call.

    Attributes:
        decode: envelope → what the handler takes.
        call: starts the handler.
        plain: the handler itself, if it takes nothing but the message.
        must_publish: names of the types of which it has to return one.
    """

    __slots__ = (
        "allowed", "call", "deadlines", "decode", "handler", "is_async", "must_publish", "name", "needs_context",
        "plain", "retry",
    )  # fmt: skip

    def __init__(
        self, handler: Handler, decode: Callable[[Message], Any], resources: Mapping[Any, Any], clock: Clock
    ) -> None:
        self.handler = handler
        self.name = handler.name
        self.decode = decode
        self.is_async = handler.is_async
        self.needs_context = handler.context is not None
        self.allowed = frozenset(handler.gives)
        self.must_publish = () if handler.optional else tuple(cls.__name__ for cls in handler.returns)
        self.retry: Retry = handler.options.retry
        self.deadlines = Deadlines(handler.options.timeout_s, clock)
        self.plain = None if self.needs_context or handler.resources else handler.function
        self.call: Call = _compile_call(handler, resources)


class UndoneError(TransportError):
    """The commit before this one failed, so this unit is to be done again."""

    def __init__(self) -> None:
        super().__init__("E508", "an earlier message of the subscription is done again first")


class _Raised:
    """A handler that has raised."""

    __slots__ = ("_error",)

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from ()
        raise self._error


class Deliverer:
    """Delivers the messages of one subscription to its handlers.

    Args:
        service: name of the service, the `source` of what its handlers publish.
        routes: CloudEvents type → Route.
        every: Route for a handler that takes every Message, or None.
        settled: called when a unit is committed, or with the error that undid it.
        holds: whether a dead letter keeps the later messages of its key waiting.
        circuit: of the subscription's Breaker, if it has one.
    """

    def __init__(  # noqa: PLR0913 - wired by app only
        self,
        subscription: Subscription,
        *,
        service: str,
        routes: Mapping[str, Route],
        every: Route | None,
        store: Store,
        parking: Parking,
        hooks: Hooks,
        clock: Clock,
        settled: Callable[[Unit, BaseException | None], None],
        holds: bool,
        circuit: Circuit | None = None,
    ) -> None:
        self._subscription = subscription
        self._source = service
        self._routes = routes
        self._every = every
        self._store = store
        self._parking = parking
        self._parked = parking.keys
        self._hooks = hooks
        self._clock = clock
        self._settled = settled
        self._holds = holds
        self._circuit = circuit
        self._strict = subscription.channel.kind == "queue"
        self._log = logging.getLogger(f"trunkline.handler.{service}")
        self._driver = new_driver()
        self.epoch = 0
        self.stopping = False

    def deliver(  # noqa: C901, PLR0911, PLR0912 - the story in one place, and the hot path
        self, delivery: Delivery
    ) -> Coroutine[Any, Any, None] | None:
        """Take one delivery to its settlement; what cannot be finished at once is returned, to be awaited.

        A handler that never suspends is finished here, without a task.
        """
        message = delivery.message
        if message is None or self._parked or message.expirytime is not None:
            outcome = self._known_outcome(delivery)
            if outcome is not None:
                self.settle(Unit((delivery,), self._settled), outcome)
                return None
            message = delivery.message
        route = self._routes.get(message.type, self._every)  # type: ignore[union-attr]
        if route is None:
            self.settle(Unit((delivery,), self._settled), self._unknown(message))  # type: ignore[arg-type]
            return None
        if self._circuit is not None:
            self._circuit.begins()
        unit = Unit((delivery,), self._settled, route.name)
        if not route.is_async:
            return self._handle(route, unit, delivery, None)
        try:
            payload = route.decode(message)  # type: ignore[arg-type]
            if route.plain is not None:
                coroutine = route.plain(payload)
            else:
                coroutine = route.call(payload, self._context(route, unit, delivery) if route.needs_context else None)
            step = self._driver.send(coroutine)
        except BaseException as error:  # noqa: BLE001 - _handle decides about every failure
            self._driver = new_driver()
            return self._handle(route, unit, delivery, _Raised(error))
        if step is not NOTHING and not isinstance(step, Ended):
            begun, self._driver = Resume(self._driver, step), new_driver()
            return self._handle(route, unit, delivery, begun)
        if step is not NOTHING or route.must_publish:
            try:
                self._stage(route, unit, message, None if step is NOTHING else step.value)
            except Exception as error:  # noqa: BLE001 - as above
                return self._handle(route, unit, delivery, _Raised(error))
        if self._circuit is not None:
            self._circuit.handled()
        if unit.context is None and delivery.row == LIVE:
            self._store.submit(unit)  # the usual case: `settle` has nothing else to do
        else:
            self.settle(unit, ACK)
        return None

    def _known_outcome(self, delivery: Delivery) -> Outcome | None:
        """Return the outcome of what is not to be run: unreadable, expired, or behind a parked message."""
        if delivery.message is None and (unreadable := self._read(delivery)) is not None:
            return unreadable
        message: Message = delivery.message  # type: ignore[assignment]
        if self._is_behind(delivery):
            handled = self._every is not None or message.type in self._routes
            return BEHIND if handled else PASSED
        if message.expirytime is not None and message.expirytime < self._clock.now():
            return Discard("expired")
        return None

    def _is_behind(self, delivery: Delivery) -> bool:
        """Return whether an earlier message of its key is parked or set aside."""
        return delivery.key in self._parked and delivery.row == LIVE and delivery.partition >= 0

    def _read(self, delivery: Delivery) -> DeadLetter | None:
        """Read the envelope of a delivery; return what becomes of it if that cannot be done."""
        if delivery.unread is not None:
            return DeadLetter(*delivery.unread)
        raw: bytes = delivery.raw  # type: ignore[assignment]
        try:
            delivery.message = unpack(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if delivery.row == LIVE:
                return DeadLetter("E400", f"not an envelope: {describe(error)}")
            # Of a dead letter that is redriven, from a broker: its bytes are as another program sent them.
            channel, identity = self._subscription.channel, f"dead-letter/{self._clock.new_id()}"
            plain = channel.plain and wire.Plain(channel.plain, channel.name, identity, self._clock.now())
            try:
                delivery.message = wire.decode(raw, dict, plain or None)
            except DecodeError as unread:
                return DeadLetter(*wire.why_unread(unread))
        return None

    def _unknown(self, message: Message) -> Outcome:
        if not self._strict:
            return PASSED
        known = ", ".join(sorted(self._routes)) or "nothing"
        return DeadLetter("E415", f"no handler for type {message.type[:120]!r} on this queue (have: {known})")

    async def _handle(self, route: Route, unit: Unit, delivery: Delivery, started: Awaitable[Any] | None) -> None:
        """See a delivery through to its outcome; immediate retries happen here.

        Args:
            started: the first try, if it has begun.
        """
        epoch = self.epoch
        outcome: Outcome = ACK
        while True:
            try:
                value = await self._run(route, unit, delivery, started)
                self._stage(route, unit, delivery.message, value)
            except DuplicateSignal:
                await self._undo(unit)
                unit.duplicate = True
            except NOT_OF_THE_HANDLER as error:
                # Not a failure of the handler: it is done again when there is room, or by another process.
                await self._undo(unit)
                self._settled(unit, error)
                return
            except Exception as error:  # noqa: BLE001 - the policy decides about every failure
                await self._undo(unit)
                if self._hooks.raised is not None and delivery.message is not None:
                    self._hooks.raised(delivery.message.id, error)
                outcome = self._verdict(route, delivery, error)
                if isinstance(outcome, RetryNow):
                    self._emit("retried", delivery, outcome.reason)
                    started, outcome = None, ACK
                    continue
                self._explain(route, delivery, error, outcome)
            except BaseException:  # cancelled, or the process is to end: nothing of it may stay open
                await self._undo(unit)
                raise
            break
        if self._is_behind(delivery):  # only now: the commit of the one before it has failed
            await self._undo(unit)
            outcome = BEHIND
        if epoch == self.epoch:
            self.settle(unit, outcome)
        else:
            # An earlier message of this subscription was undone meanwhile: this one comes after it again.
            await self._undo(unit)
            self._settled(unit, UndoneError())

    def _verdict(self, route: Route, delivery: Delivery, error: Exception) -> Outcome:
        """Return what becomes of a message whose handler failed; while a circuit is open the try does not count."""
        random = self._clock.random()
        if self._circuit is not None and route.retry.tries_again(error):
            message = delivery.message
            wait_s = self._circuit.failed(message and message.identity, error, random)
            if wait_s is not None:
                return RetryLater(wait_s, f"the circuit is open; {describe(error)}")
        delivery.attempt += 1
        return route.retry.verdict(error, delivery.attempt, random)

    async def _run(  # noqa: C901 - every way a call can end
        self, route: Route, unit: Unit, delivery: Delivery, started: Awaitable[Any] | None
    ) -> Any:
        """Call the handler, or go on with its first try, within its time."""
        if started is None:
            payload = route.decode(delivery.message)  # type: ignore[arg-type]
            context = self._context(route, unit, delivery) if route.needs_context else None
            started = route.call(payload, context) if route.is_async else offload(route.call, payload, context)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - lanes run deliveries in tasks
        route.deadlines.enter(task)
        try:
            value = await started
        except asyncio.CancelledError:
            if route.deadlines.leave(task):
                task.uncancel()
                raise TimeoutError(f"no end after {route.deadlines.timeout_s} s") from None
            if self.stopping:
                raise
            # The handler cancelled itself or was cancelled by a library: a failure like any other.
            task.uncancel()
            raise RuntimeError("the handler was cancelled") from None
        except (Exception, DuplicateSignal, KeyboardInterrupt, GeneratorExit):
            if route.deadlines.leave(task):
                task.uncancel()
            if self.stopping and task.cancelling():
                raise asyncio.CancelledError from None  # what the stop's cancellation came out as: no failure
            raise
        except BaseException as error:
            route.deadlines.leave(task)
            # sys.exit() and the like: the way out of this message, not of the process with all the others.
            raise RuntimeError(f"the handler raised {type(error).__name__}: {error}") from error
        if route.deadlines.leave(task):
            task.uncancel()  # it ended in the same moment as its time
        if self._circuit is not None:
            self._circuit.handled()
        return value

    def _context(self, route: Route, unit: Unit, delivery: Delivery) -> Context:
        unit.context = context = Context(
            unit=unit,
            store=self._store,
            clock=self._clock,
            source=self._source,
            message=delivery.message,
            attempt=delivery.attempt,
            allowed=route.allowed,
            log=self._log,
        )
        return context

    def _stage(self, route: Route, unit: Unit, message: Message | None, value: Any) -> None:
        if value is None and route.must_publish:
            raise PublishError(
                "E304",
                f"{route.name} returned nothing, and its annotation says {', '.join(route.must_publish)}",
                "return it, or add None to the return annotation",
            )
        for payload in results(value):
            if type(payload) not in route.allowed:
                raise PublishError(
                    "E304",
                    f"{route.name} returned {type(payload).__name__}, which its annotation does not say",
                    "add it to the return annotation",
                )
            unit.stage(make_message(payload, self._clock, self._source, None, None, message, {}))

    async def _undo(self, unit: Unit) -> None:
        unit.end_context()
        unit.staged = ()
        if unit.transaction is not None:
            await self._store.rollback(unit)

    def settle(self, unit: Unit, outcome: Outcome) -> None:  # noqa: C901 - one match, every outcome
        """Act on an outcome: the only place that does. The store commits it with the next group."""
        if unit.context is not None:
            unit.end_context()
        if outcome is not ACK:
            if isinstance(outcome, DeadLetter) and not self._holds:
                outcome = msgspec.structs.replace(outcome, holds=False)
            unit.outcome = outcome
        for delivery in unit.deliveries:
            if outcome is ACK and delivery.row == LIVE:
                continue  # the usual case: nothing to note
            match outcome:
                case Ack():
                    pass
                case RetryLater():
                    if outcome is not BEHIND:
                        self._emit("parked", delivery, f"{outcome.reason}; again in {outcome.after_s:.1f} s")
                case DeadLetter():
                    self._emit("buried", delivery, f"{outcome.code} {outcome.reason}")
                case Discard():
                    if outcome is not PASSED:
                        self._emit("discarded", delivery, outcome.reason)
                case RetryNow():
                    return  # the store has failed for good: nothing is settled, everything comes again
            self._parking.settled(delivery, outcome)
        self._store.submit(unit)

    def broken_at_end(self, unit: Unit, error: BaseException) -> None:
        """Decide about a message that was handled, but at the commit broke a constraint of the user's."""
        (delivery,) = unit.deliveries
        self._parking.undone(delivery, unit.outcome)
        delivery.attempt += 1
        retry = self._retry_of(delivery.message)
        verdict = retry.verdict(error, delivery.attempt + retry.immediate, self._clock.random())
        self.settle(Unit((delivery,), self._settled, unit.owner), verdict)

    def _retry_of(self, message: Message | None) -> Retry:
        route = self._every if message is None else self._routes.get(message.type, self._every)
        return Retry() if route is None else route.retry

    async def deliver_batch(self, deliveries: Sequence[Delivery]) -> None:
        """Take several deliveries through one call of a `list[T]` handler; one that fails alone fails alone."""
        route = self._every or next(iter(self._routes.values()))
        runnable: list[Delivery] = []
        payloads: list[Any] = []
        for delivery in deliveries:
            outcome = self._known_outcome(delivery) or self._undecodable(route, delivery, payloads)
            if outcome is None:
                runnable.append(delivery)
            else:
                self.settle(Unit((delivery,), self._settled, route.name), outcome)
        if not runnable:
            return
        if self._circuit is not None:
            self._circuit.begins()
        unit = Unit(tuple(runnable), self._settled, route.name)
        epoch = self.epoch
        try:
            outcome = await self._try_batch(route, unit, payloads)
        except NOT_OF_THE_HANDLER as error:
            await self._undo(unit)
            self._settled(unit, error)
            return
        if epoch != self.epoch:
            await self._undo(unit)
            self._settled(unit, UndoneError())
        elif outcome is not None and not any(map(self._is_behind, runnable)):
            self.settle(unit, outcome)
        else:
            await self._undo(unit)
            await self._deliver_singly(route, runnable)

    async def _deliver_singly(self, route: Route, deliveries: Sequence[Delivery]) -> None:
        epoch = self.epoch
        for number, delivery in enumerate(deliveries):
            if epoch != self.epoch:
                # One before it is done again: the rest comes after that.
                self._settled(Unit(tuple(deliveries[number:]), self._settled, route.name), UndoneError())
                return
            await self._deliver_alone(route, delivery)

    def _undecodable(self, route: Route, delivery: Delivery, payloads: list[Any]) -> Outcome | None:
        message = delivery.message
        found = self._routes.get(message.type) or self._every  # type: ignore[union-attr]
        if found is None:
            return self._unknown(message)  # type: ignore[arg-type]
        try:
            payloads += found.decode(message)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the policy decides about every failure
            return route.retry.verdict(error, 1, 0.0)
        return None

    async def _try_batch(self, route: Route, unit: Unit, payloads: list[Any]) -> Outcome | None:
        """Return the outcome of all, or None when the batch failed and each is to be tried alone."""
        first = unit.deliveries[0]
        try:
            context = self._context(route, unit, first) if route.needs_context else None
            call = route.call(payloads, context) if route.is_async else offload(route.call, payloads, context)
            value = await self._run(route, unit, first, call)
            self._stage(route, unit, first.message, value)
            if unit.transaction is None and len(unit.deliveries) > 1:
                # A duplicate among them is told here, where the others can still be done alone.
                await self._store.transaction(unit)
        except DuplicateSignal:
            await self._undo(unit)
        except NOT_OF_THE_HANDLER:
            raise
        except Exception as error:  # noqa: BLE001 - the policy decides about every failure
            await self._undo(unit)
            if self._circuit is not None and self._circuit.is_open and route.retry.tries_again(error):
                return self._verdict(route, first, error)  # of all of them: one by one they would fail as well
            log.debug("%s failed, each is tried alone: %s", route.name, error)
        except BaseException:
            await self._undo(unit)
            raise
        else:
            return ACK
        return None

    async def _deliver_alone(self, route: Route, delivery: Delivery) -> None:
        unit = Unit((delivery,), self._settled, route.name)
        outcome = self._known_outcome(delivery)
        if outcome is None:
            await self._handle(route, unit, delivery, None)
        else:
            self.settle(unit, outcome)

    def _explain(self, route: Route, delivery: Delivery, error: Exception, outcome: Outcome) -> None:
        """Add one line to the user's traceback: which message, handler, attempt and outcome."""
        message = delivery.message
        became = _IN_WORDS.get(type(outcome), "done")
        log.warning(
            "%s failed on %s %s, attempt %d: %s", route.name, "" if message is None else message.type,
            "" if message is None else message.id, delivery.attempt, became, exc_info=error,
        )  # fmt: skip

    def _emit(self, kind: FactKind, delivery: Delivery, reason: str) -> None:
        message = delivery.message
        self._hooks.emit(
            Fact(
                kind,
                self._subscription.name,
                self._subscription.channel.name,
                "" if message is None else message.id,
                "" if message is None else message.type,
                delivery.attempt,
                reason,
            )
        )


def compile_routes(
    handlers: Sequence[Handler], resources: Mapping[Any, Any], clock: Clock
) -> tuple[dict[str, Route], Route | None]:
    """Return (type name → Route, Route for everything else) of one subscription's handlers."""
    routes: dict[str, Route] = {}
    every: Route | None = None
    for handler in handlers:
        if handler.raw:
            every = Route(handler, _as_list(_identity) if handler.batch else _identity, resources, clock)
            continue
        for declared in handler.types:
            decode = declared.decode
            routes[declared.name] = Route(handler, _as_list(decode) if handler.batch else decode, resources, clock)
    return routes, every


def _identity(message: Message) -> Message:
    return message


def _as_list(decode: Callable[[Message], Any]) -> Callable[[Message], list[Any]]:
    return lambda message: [decode(message)]


def _compile_call(handler: Handler, resources: Mapping[Any, Any]) -> Call:
    function = handler.function
    given = {parameter: resources[cls] for parameter, cls in handler.resources.items()}
    name = handler.context
    if name is None and not given:
        return lambda payload, _context: function(payload)
    if name is None:
        return lambda payload, _context: function(payload, **given)
    if not given:
        return lambda payload, context: function(payload, **{name: context})
    return lambda payload, context: function(payload, **given, **{name: context})
