"""Handlers: what a signature says, compiled once, and the Context a handler may ask for.

Invariant: everything about a signature is checked when it is declared; per message nothing is inspected.
Never does: run handlers (delivery.py). Read next: service.py.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import types
import typing
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from trunkline.channel import Channel, MessageType, Queue, declared_types, message_type
from trunkline.clock import Clock
from trunkline.codec import MAX_PAYLOAD_BYTES, not_encoded, too_large
from trunkline.errors import DefinitionError, PublishError, TransactionError, UnroutableError
from trunkline.message import Message, checked
from trunkline.policies.breaker import Breaker
from trunkline.policies.retry import Retry
from trunkline.store import Store, Transaction, Unit
from trunkline.transport import Delivery, Staged, Start

if TYPE_CHECKING:
    from sqlite3 import Connection

R = TypeVar("R")


class Batch(msgspec.Struct, frozen=True):
    """How many messages a `list[T]` handler gets at once.

    Attributes:
        size: most messages of one call.
        wait_s: how long to wait for more once there is one, in seconds.
    """

    size: int = 100
    wait_s: float = 0.0


class Options(msgspec.Struct, frozen=True):
    """What `@service.handle(...)` says beyond the signature.

    Attributes:
        subscription: name of the reader; default: the service's.
        from_: channel to read, where it is not the type's home.
        publishes: types that the handler publishes through its Context.
        retry: what to do when it fails.
        timeout_s: longest run of one call, in seconds.
        concurrency: calls under way at once in one process.
        batch: sizes for a `list[T]` handler.
        after_dead_letter: `hold` keeps the later messages of a dead letter's key waiting; `continue` does not.
        parked_limit: on Streams, most parked messages with a key; when reached the subscription pauses.
        start: where a new reader of a Stream begins: `earliest`, `latest` or a moment, an aware datetime.
        breaker: when to pause because what it calls is away; None never does.
    """

    subscription: str | None = None
    from_: Channel | None = None
    publishes: tuple[type, ...] = ()
    retry: Retry = Retry()
    timeout_s: float | None = 300.0
    concurrency: int = 64
    batch: Batch = Batch()
    after_dead_letter: typing.Literal["hold", "continue"] = "hold"
    parked_limit: int = 100_000
    start: Start = "earliest"
    breaker: Breaker | None = None


class Handler:
    """A declared handler.

    Attributes:
        function: the user's function, unchanged.
        name: `module.function`, for messages to people.
        types: what is declared for the types it takes.
        takes: payload types; empty when it takes every Message of `channel`.
        gives: payload types it may publish, from its annotation and `publishes=`.
        returns: of these, the ones of the return annotation.
        optional: whether it may return nothing.
        batch: whether it takes a list.
        is_async: whether it runs on the loop; else in a thread.
        resources: parameter name → type to be provided.
        context: name of the Context parameter, or None.
    """

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        self.function = function
        self.options = options
        if not hasattr(function, "__qualname__"):
            raise DefinitionError("E107", f"{function!r} is no function", "write a def or async def that calls it")
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.is_async = inspect.iscoroutinefunction(function)
        hints = _hints(function, self.name)
        parameters = list(inspect.signature(function).parameters.values())
        if not parameters:
            raise DefinitionError("E107", f"{self.name} takes no message", "its first parameter is the message")
        first = parameters[0].name
        if first not in hints:
            raise DefinitionError(
                "E107", f"{self.name}: parameter {first!r} has no type", "annotate it with the message type it handles"
            )
        self.batch, self.takes = _taken(hints[first], self.name)
        self.raw = not self.takes
        self.context: str | None = None
        self.resources: dict[str, Any] = {}
        for parameter in parameters[1:]:
            self._parameter(parameter, hints)
        self.returns, self.optional = _given(hints.get("return", None), self.name, "return" in hints)
        self.gives = tuple(dict.fromkeys((*self.returns, *options.publishes)))
        self.types = tuple(declaration(cls, f"{self.name} takes", E="E101") for cls in self.takes)
        self.channel = self._channel()
        for cls in self.gives:
            declaration(cls, f"{self.name} publishes", E="E102")

    def _parameter(self, parameter: inspect.Parameter, hints: dict[str, Any]) -> None:
        hint = hints.get(parameter.name)
        if hint is None:
            if parameter.default is not inspect.Parameter.empty:
                return
            raise DefinitionError(
                "E107",
                f"{self.name}: parameter {parameter.name!r} has no type",
                "annotate it with Context or a resource",
            )
        if hint is Context:
            self.context = parameter.name
        elif parameter.default is inspect.Parameter.empty:
            self.resources[parameter.name] = hint

    def _channel(self) -> Channel:
        if self.options.from_ is not None:
            return self.options.from_
        homes = {declared.channel.name: declared.channel for declared in self.types}
        if not homes:
            raise DefinitionError(
                "E107", f"{self.name} takes every Message but names no channel", "say which: handle(from_=channel)"
            )
        if len(homes) > 1:
            raise DefinitionError(
                "E114",
                f"{self.name} takes types of several channels: {', '.join(sorted(homes))}",
                "write one handler per channel",
            )
        return self.types[0].channel


class Context:
    """What a handler may do beyond returning messages. All of it joins the unit of work.

    Attributes:
        message: the envelope being handled, the first one of a batch; in a unit of work outside a handler
            there is none, and this is None although the type does not say so.
        attempt: failures so far; 0 at the first try.
        log: a logger that carries the service's name.
    """

    __slots__ = (
        "_allowed", "_clock", "_ended", "_loop", "_opening", "_source", "_store", "_unit", "attempt", "log", "message",
    )  # fmt: skip

    def __init__(
        self,
        *,
        unit: Unit,
        store: Store,
        clock: Clock,
        source: str,
        message: Message | None,
        attempt: int,
        allowed: frozenset[type] | None,
        log: logging.Logger,
    ) -> None:
        self._unit = unit
        self._store = store
        self._clock = clock
        self._source = source
        self._allowed = allowed
        self._ended = False
        self._opening = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self.message: Message = message  # type: ignore[assignment]  # handlers need no check for None
        self.attempt = attempt
        self.log = log

    def publish(self, payload: Any, *, to: Channel | None = None, key: str | None = None, **attributes: Any) -> str:
        """Stage a message; it leaves when the unit of work commits.

        Args:
            payload: an object of a declared type.
            to: channel, where it is not the type's home.
            key: partition key, where it is not the type's key field.
            attributes: further CloudEvents attributes: `subject`, `priority`, `expirytime`, `tenantid`, …
        Returns: the message's id.
        Raises: UnroutableError E303, PayloadError E301 or E302, PublishError E304 for an undeclared publication.
        """
        staged = self._stage(payload, to, key, None, attributes)
        return staged.message.id

    def send(self, payload: Any, *, to: Channel | None = None, key: str | None = None, **attributes: Any) -> str:
        """Stage a command; like `publish`, for Queues.

        Raises: UnroutableError E305 if the type's home is no Queue; else see `publish`.
        """
        declared = message_type(type(payload))
        if declared is not None and not isinstance(to or declared.channel, Queue):
            raise UnroutableError(
                "E305", f"{declared.name} lives on {declared.channel!r}", "events are published: ctx.publish(...)"
            )
        return self.publish(payload, to=to, key=key, **attributes)

    def schedule(
        self,
        payload: Any,
        at: datetime | timedelta,
        *,
        to: Channel | None = None,
        key: str | None = None,
        **attributes: Any,
    ) -> str:
        """Stage a message that leaves at a time, or so long from now.

        Raises: PublishError E306 for a time without zone; else see `publish`.
        """
        check_schedules(self._store)
        due = due_time(at, self._clock.now())
        return self._stage(payload, to, key, due, attributes).message.id

    async def transaction(self) -> Transaction:
        """Open this unit's transaction; your statements commit with its messages, or not at all.

        Await other services before this, not after: while it is open, nothing else is committed.
        """
        unit = self._unit
        self._check_open()
        if unit.transaction is None:
            async with self._opening:  # a second task of the handler waits for the first one's
                await self._open_transaction()
        return typing.cast("Transaction", unit.transaction)

    async def _open_transaction(self) -> None:
        if self._unit.transaction is None:
            await self._store.transaction(self._unit)
            if self._ended:  # the handler's time ran out while a thread of it waited here
                await self._store.rollback(self._unit)
                self._check_open()

    def _end(self) -> None:
        """Refuse everything from now on: the handler has returned, failed or run out of time."""
        self._ended = True

    def _check_open(self) -> None:
        if self._ended:
            raise TransactionError("E509", "the context ended with its handler", "use it before the handler returns")

    def connection(self) -> Connection:
        """Open the transaction from a `def` handler; return it as a DB-API 2.0 connection.

        Raises: RuntimeError on the event loop, where `await ctx.transaction()` is the way.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            opened = asyncio.run_coroutine_threadsafe(self.transaction(), self._loop)
            return typing.cast("Connection", opened.result().connection())
        raise RuntimeError("in an async handler use: (await ctx.transaction()).connection()")

    def _stage(
        self, payload: Any, to: Channel | None, key: str | None, due: float | None, attributes: dict[str, Any]
    ) -> Staged:
        self._check_open()
        check_allowed(payload, self._allowed, self._unit.owner, background=self.message is None)
        staged = make_message(payload, self._clock, self._source, to, key, self.message, attributes)
        if due is not None:
            staged = Staged(staged.channel, staged.message, due)
        self._unit.stage(staged)
        return staged


def check_allowed(payload: Any, allowed: frozenset[type] | None, owner: str, *, background: bool) -> None:
    """Refuse what the declaration of `owner`, a handler or background function, does not say.

    Raises: PublishError E304.
    """
    if allowed is not None and type(payload) not in allowed:
        name = type(payload).__name__
        raise PublishError(
            "E304",
            f"{owner} publishes {name}, which its declaration does not say",
            f"add it to background(publishes=({name},))"
            if background
            else f"add it to the return annotation or to handle(publishes=({name},))",
        )


def make_message(
    payload: Any,
    clock: Clock,
    source: str,
    to: Channel | None,
    key: str | None,
    cause: Message | None,
    attributes: dict[str, Any],
) -> Staged:
    """Return a payload in its envelope, on its way to `to` or its home channel.

    A ready-made Message passes through unchanged, if `to` says where.
    Raises: UnroutableError E303, PayloadError E301 or E302, PublishError E307 for a wrong attribute.
    """
    declared = declared_types.get(payload.__class__)
    if to is not None or key is not None:
        _check_target(to, key)
    if declared is None:
        return _undeclared(payload, to)
    if key is None and declared.key_of is not None:
        key = declared.key_of(payload)
        if key.__class__ is not str and key is not None:
            key = str(key)
    try:
        data = declared.encode(payload)
    except (TypeError, ValueError, RecursionError) as error:
        raise not_encoded(declared.name, error) from error
    if len(data) > MAX_PAYLOAD_BYTES:
        raise too_large(declared.name, len(data))
    message_id, now = clock.stamp()
    if cause is None:
        message = Message(message_id, declared.name, source, data, now, key, None, None, declared.version)
    else:
        correlation = cause.correlationid or cause.id
        message = Message(message_id, declared.name, source, data, now, key, correlation, cause.id, declared.version)
        if cause.tenantid is not None:
            attributes = {"tenantid": cause.tenantid, **attributes}
    if attributes:
        return Staged(to or declared.channel, _with_attributes(message, attributes), None, "id" not in attributes)
    return Staged(to or declared.channel, message, None, True)  # noqa: FBT003 - positional for speed


def _check_target(to: Any, key: Any) -> None:
    if to is not None and not isinstance(to, Channel):
        raise UnroutableError("E303", f"to={to!r} is no channel", "give the Queue, Topic or Stream itself")
    if key is not None and not _is_text(key):
        raise PublishError("E307", f"key={key!r}", "a key is text; convert it with str(...)")


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _undeclared(payload: Any, to: Channel | None) -> Staged:
    if not isinstance(payload, Message):
        raise UnroutableError(
            "E303",
            f"{type(payload).__name__} is not declared on any channel",
            "declare it with @channel.event or @queue.command",
        )
    if to is None:
        raise UnroutableError("E303", "a Message has no home channel", "say to=channel")
    return Staged(to, checked(payload))


_SETTABLE = frozenset(
    {
        "id",
        "subject",
        "priority",
        "expirytime",
        "tenantid",
        "traceparent",
        "correlationid",
        "causationid",
        "dataschema",
        "extensions",
    }
)


def _with_attributes(message: Message, attributes: dict[str, Any]) -> Message:
    unknown = set(attributes) - _SETTABLE
    if unknown:
        raise PublishError(
            "E307",
            f"no attribute {', '.join(sorted(unknown))}",
            f"settable are: {', '.join(sorted(_SETTABLE))}; others go into extensions={{...}}",
        )
    expiry = attributes.get("expirytime")
    if isinstance(expiry, datetime | timedelta):
        attributes["expirytime"] = due_time(expiry, message.time)
    return checked(msgspec.structs.replace(message, **attributes))


def check_schedules(store: Store) -> None:
    """Refuse a message for later where nothing keeps it until then.

    Raises: PublishError E312.
    """
    if not store.keeps:
        raise PublishError("E312", "a message for later needs a store to wait in, and there is none", "name a store")


def due_time(at: datetime | timedelta, now: float) -> float:
    """Return a time or a wait as seconds since the epoch.

    Raises: PublishError E306 for a time without zone, or what is neither.
    """
    if isinstance(at, timedelta):
        return now + at.total_seconds()
    if not isinstance(at, datetime):
        raise PublishError("E306", f"{at!r} is no time", "use datetime(..., tzinfo=UTC) or timedelta(seconds=...)")
    if at.tzinfo is None:
        raise PublishError("E306", f"{at!r} has no time zone", "use datetime(..., tzinfo=UTC)")
    return at.timestamp()


def results(value: Any) -> Sequence[Any]:
    """Return what a handler returned as a sequence of payloads."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return [item for item in value if item is not None]
    return (value,)


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError as error:
        raise DefinitionError("E107", f"{name}: {error}", "import the type where the handler is defined") from error


def _taken(hint: Any, name: str) -> tuple[bool, tuple[type, ...]]:
    """Return (is a batch, payload types) of a first parameter's annotation."""
    batch = typing.get_origin(hint) is list
    if batch:
        (hint,) = typing.get_args(hint)
    members = _members(hint)
    if members == (Message,):
        return batch, ()
    for member in members:
        if not isinstance(member, type):
            raise DefinitionError("E101", f"{name} takes {member!r}", "a declared message type is needed")
    return batch, members


def _given(hint: Any, name: str, annotated: bool) -> tuple[tuple[type, ...], bool]:  # noqa: FBT001 - internal
    """Return (payload types, may return nothing) of a return annotation."""
    if not annotated:
        raise DefinitionError(
            "E107", f"{name} does not say what it returns", "annotate it: the message types it publishes, or None"
        )
    found: list[type] = []
    optional = False
    for member in _members(hint):
        if member is type(None) or member is None:
            optional = True
        elif typing.get_origin(member) in (list, tuple, Sequence):
            optional = optional or typing.get_origin(member) is not tuple
            for inner in typing.get_args(member):
                types_inside, _ = ((), True) if inner is Ellipsis else _given(inner, name, annotated)
                found += types_inside
        elif isinstance(member, type):
            found.append(member)
        else:
            raise DefinitionError("E102", f"{name} returns {member!r}", "a declared message type is needed")
    return tuple(dict.fromkeys(found)), optional


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def declaration(cls: type, who: str, *, E: str) -> MessageType:  # noqa: N803 - the error's code
    """Return what is declared for a class.

    Raises: DefinitionError of code `E` if nothing is; `who` begins its text.
    """
    declared = message_type(cls)
    if declared is None:
        raise DefinitionError(
            E,
            f"{who} {cls.__name__}, which is not declared on any channel",
            "declare it with @channel.event or @queue.command",
        )
    return declared


__all__ = ["Batch", "Context", "Delivery", "Handler", "Options", "due_time", "make_message", "results"]
