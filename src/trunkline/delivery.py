"""The story of one delivery, from receipt to settlement.

Invariant: every delivery is settled exactly once, in `settle`; its inbox row, the handler's writes and its
messages are one commit. Never does: network sends (outbox.py, transports/) or SQL (stores/).
Read next: lanes.py, parking.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from trunkline.clock import Clock, offload
from trunkline.errors import FatalStoreError, LeaseLostError, PublishError
from trunkline.handler import Context, Handler, make_message, results
from trunkline.hooks import Fact, FactKind, Hooks
from trunkline.lanes import Resume
from trunkline.message import Message, unpack
from trunkline.outcome import ACK, PASSED, Ack, DeadLetter, Discard, Outcome, RetryLater, RetryNow
from trunkline.parking import BEHIND, Parking
from trunkline.policies.retry import Retry, describe
from trunkline.store import DuplicateSignal, Store, Unit
from trunkline.transport import LIVE, Delivery, Staged, Subscription

log = logging.getLogger("trunkline.delivery")

MAX_CRASHES = 3
"""After so many more crashes while a message was in its handler it is set aside."""

Call = Callable[[Any, Context | None], Any]


class Route:
    """A handler with everything about it decided: what one message needs is a lookup and a call.

    Attributes:
        decode: envelope → what the handler takes.
        call: starts the handler.
    """

    __slots__ = ("allowed", "call", "decode", "handler", "is_async", "name", "needs_context", "retry", "timeout_s")

    def __init__(
        self, handler: Handler, decode: Callable[[Message], Any], resources: Mapping[Any, Any]
    ) -> None:
        self.handler = handler
        self.name = handler.name
        self.decode = decode
        self.is_async = handler.is_async
        self.needs_context = handler.context is not None
        self.allowed = frozenset(handler.gives)
        self.retry: Retry = handler.options.retry
        self.timeout_s = handler.options.timeout_s
        self.call: Call = _compile_call(handler, resources)


class Deliverer:
    """Delivers the messages of one subscription to its handlers.

    Args:
        service: name of the service, the `source` of what its handlers publish.
        routes: CloudEvents type → Route.
        every: Route for a handler that takes every Message, or None.
        settled: called when a unit is committed, or with the error that undid it.
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
        self._strict = subscription.channel.kind == "queue"
        self._log = logging.getLogger(f"trunkline.handler.{service}")
        self.epoch = 0
        self.stopping = False

    async def deliver(self, delivery: Delivery) -> None:
        """Take one delivery from its bytes to its settlement."""
        unit = Unit((delivery,), self._settled)
        epoch = self.epoch
        outcome = self._known_outcome(delivery)
        if outcome is None:
            message = delivery.message
            route = self._routes.get(message.type) or self._every  # type: ignore[union-attr]
            if route is None:
                outcome = self._unknown(message)  # type: ignore[arg-type]
            else:
                unit.owner = route.name
                outcome = await self._handle(route, message, unit, delivery)
        if epoch != self.epoch:
            await self._store.rollback(unit)  # an earlier message of this subscription was undone meanwhile
            self._settled(unit, None)
            return
        self.settle(unit, outcome)

    def _known_outcome(self, delivery: Delivery) -> Outcome | None:
        """Return the outcome of what is not to be run: unreadable, expired, or behind a parked message."""
        message = delivery.message
        if message is None:
            try:
                delivery.message = message = unpack(delivery.raw)  # type: ignore[arg-type]
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                return DeadLetter("E400", f"not an envelope: {describe(error)}")
        if message.expirytime is not None and message.expirytime < self._clock.now():
            return Discard("expired")
        if self._parked and delivery.row == LIVE and delivery.partition >= 0 and delivery.key in self._parked:
            return BEHIND
        return None

    def _unknown(self, message: Message) -> Outcome:
        if not self._strict:
            return PASSED
        known = ", ".join(sorted(self._routes)) or "nothing"
        return DeadLetter("E415", f"no handler for type {message.type[:120]!r} on this queue (have: {known})")

    async def _handle(self, route: Route, message: Message | None, unit: Unit, delivery: Delivery) -> Outcome:
        """Run the handler until it has an outcome; immediate retries happen here."""
        while True:
            try:
                payload = route.decode(message)  # type: ignore[arg-type]
                context = self._context(route, unit, message, delivery) if route.needs_context else None
                value = await self._run(route, payload, context)
                if value is not None:
                    self._stage(route, unit, message, value)
            except DuplicateSignal:
                return await self._duplicate(unit)
            except asyncio.CancelledError:
                await self._undo(unit)
                raise
            except (FatalStoreError, LeaseLostError) as error:
                await self._undo(unit)
                return RetryNow(describe(error))
            except Exception as error:  # noqa: BLE001 - the policy decides about every failure
                await self._undo(unit)
                delivery.attempt += 1
                outcome = route.retry.verdict(error, delivery.attempt, self._clock.random())
                if not isinstance(outcome, RetryNow):
                    self._explain(route, delivery, error, outcome)
                    return outcome
                self._emit("retried", delivery, outcome.reason)
            else:
                return ACK

    async def _run(self, route: Route, payload: Any, context: Context | None) -> Any:
        """Call the handler. One that never suspends costs no task and no timer."""
        if not route.is_async:
            async with asyncio.timeout(route.timeout_s):
                return await offload(route.call, payload, context)
        coroutine: Coroutine[Any, Any, Any] = route.call(payload, context)
        try:
            waited_for = coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        try:
            async with asyncio.timeout(route.timeout_s):
                return await Resume(coroutine, waited_for)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.stopping or task is None:
                raise
            # The handler cancelled itself or was cancelled by a library: a failure like any other.
            task.uncancel()
            raise RuntimeError("the handler was cancelled") from None

    def _context(self, route: Route, unit: Unit, message: Message | None, delivery: Delivery) -> Context:
        return Context(
            unit=unit,
            store=self._store,
            clock=self._clock,
            source=self._source,
            message=message,
            attempt=delivery.attempt,
            allowed=route.allowed,
            log=self._log,
        )

    def _stage(self, route: Route, unit: Unit, message: Message | None, value: Any) -> None:
        for payload in results(value):
            if type(payload) not in route.allowed:
                raise PublishError(
                    "E304",
                    f"{route.name} returned {type(payload).__name__}, which its annotation does not say",
                    "add it to the return annotation",
                )
            channel, envelope = make_message(payload, self._clock, self._source, None, None, message, {})
            unit.staged.append(Staged(channel, envelope))

    async def _undo(self, unit: Unit) -> None:
        unit.staged.clear()
        await self._store.rollback(unit)

    async def _duplicate(self, unit: Unit) -> Outcome:
        await self._undo(unit)
        unit.duplicate = True
        return ACK

    def settle(self, unit: Unit, outcome: Outcome) -> None:
        """Act on an outcome: the only place that does. The store commits it with the next group."""
        unit.outcome = outcome
        for delivery in unit.deliveries:
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
                    self._settled(unit, None)
                    return
            self._parking.settled(delivery, outcome)
        self._store.submit(unit)

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
        unit = Unit(tuple(runnable), self._settled, route.name)
        outcome = await self._try_batch(route, unit, payloads)
        if outcome is not None:
            self.settle(unit, outcome)
        else:
            for delivery in runnable:
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
        """Return ACK, or None when the batch failed and each is to be tried alone."""
        first = unit.deliveries[0]
        try:
            context = self._context(route, unit, first.message, first) if route.needs_context else None
            value = await self._run(route, payloads, context)
            if value is not None:
                self._stage(route, unit, first.message, value)
        except DuplicateSignal:
            await self._undo(unit)
        except asyncio.CancelledError:
            await self._undo(unit)
            raise
        except (FatalStoreError, LeaseLostError) as error:
            await self._undo(unit)
            return RetryNow(describe(error))
        except Exception as error:  # noqa: BLE001 - the policy decides about every failure
            await self._undo(unit)
            if len(unit.deliveries) == 1:
                log.debug("%s failed alone: %s", route.name, error)
        else:
            return ACK
        return None

    async def _deliver_alone(self, route: Route, delivery: Delivery) -> None:
        unit = Unit((delivery,), self._settled, route.name)
        outcome: Outcome
        if self._parked and delivery.row == LIVE and delivery.key in self._parked and delivery.partition >= 0:
            outcome = BEHIND
        else:
            outcome = await self._handle(route, delivery.message, unit, delivery)
        self.settle(unit, outcome)

    def _explain(self, route: Route, delivery: Delivery, error: Exception, outcome: Outcome) -> None:
        """Add one line to the user's traceback: which message, handler, attempt and outcome."""
        message = delivery.message
        log.warning(
            "%s failed on %s %s, attempt %d: %s", route.name, "" if message is None else message.type,
            "" if message is None else message.id, delivery.attempt, type(outcome).__name__, exc_info=error,
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
    handlers: Sequence[Handler], resources: Mapping[Any, Any]
) -> tuple[dict[str, Route], Route | None]:
    """Return (type name → Route, Route for everything else) of one subscription's handlers."""
    routes: dict[str, Route] = {}
    every: Route | None = None
    for handler in handlers:
        if handler.raw:
            every = Route(handler, _as_list(_identity) if handler.batch else _identity, resources)
            continue
        for declared in handler.types:
            decode = declared.decode
            routes[declared.name] = Route(handler, _as_list(decode) if handler.batch else decode, resources)
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
