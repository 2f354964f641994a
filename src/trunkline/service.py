"""Services and systems: what a user declares. Nothing here runs.

Invariant: a wrong declaration is refused where it is written, or in `System.check` before anything starts.
Never does: I/O (app.py). Read next: app.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import msgspec

from trunkline.channel import Channel, MessageType, Queue, Stream, check_name, message_type
from trunkline.clock import system_clock
from trunkline.errors import DefinitionError
from trunkline.handler import Batch, Handler, Options, declaration
from trunkline.policies.breaker import Breaker
from trunkline.policies.retry import Retry
from trunkline.transport import Start

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from trunkline.app import Running

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Background(msgspec.Struct, frozen=True):
    """A function that runs beside the handlers.

    Attributes:
        gives: payload types it may publish; empty when nothing was said, and then it may publish any.
    """

    function: Callable[[Running], Coroutine[Any, Any, None]]
    gives: tuple[type, ...] = ()

    @property
    def name(self) -> str:
        """Return `module.function`, for messages to people."""
        function = self.function
        return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


class Service:
    """Handlers of one bounded context.

    Args:
        name: also the default name of its subscriptions and its CloudEvents `source`; rules as for channels.
    Raises: DefinitionError E113.
    """

    def __init__(self, name: str) -> None:
        check_name("service", name)
        self.name = name
        self.handlers: list[Handler] = []
        self.factories: dict[Any, Callable[[], Any]] = {}
        self.statements: list[str] = []
        self.backgrounds: list[Background] = []

    @overload
    def handle(self, function: F, /) -> F: ...
    @overload
    def handle(
        self,
        /,
        *,
        subscription: str | None = None,
        from_: Channel | None = None,
        publishes: Sequence[type] = (),
        retry: Retry = ...,
        timeout_s: float | None = ...,
        concurrency: int = ...,
        batch: Batch = ...,
        after_dead_letter: Literal["hold", "continue"] = ...,
        parked_limit: int = ...,
        start: Start = ...,
        breaker: Breaker | None = ...,
    ) -> Callable[[F], F]: ...
    def handle(self, function: Any = None, /, **options: Any) -> Any:
        """Declare a handler: its first parameter's type is its subscription, its return type its publications.

        Args:
            options: see Options.
        Returns: the function, unchanged, so that a unit test can call it.
        Raises: DefinitionError E101, E102, E103, E107, E113, E114 or E120.
        """

        def register(function: F) -> F:
            self._register(Handler(function, _options(options)))
            return function

        return register if function is None else register(function)

    def _register(self, handler: Handler) -> None:
        if handler.options.subscription is not None:
            check_name("subscription", handler.options.subscription)
        if handler.options.start != "earliest" and not isinstance(handler.channel, Stream):
            raise DefinitionError(
                "E120",
                f"handle(start={_shown(handler.options.start)}) on {handler.channel.kind} {handler.channel.name!r}",
                "only a Stream keeps what was handled; leave it out",
            )
        for other in self.handlers:
            if self.reader_of(other) != self.reader_of(handler):
                continue
            shared = set(other.takes) & set(handler.takes)
            if other.batch or handler.batch:
                raise DefinitionError(
                    "E114",
                    f"{other.name} and {handler.name} share a subscription, and one takes a list",
                    'give the list its own: handle(subscription="..."); order per key could not hold across both',
                )
            if shared or other.raw or handler.raw:
                names = ", ".join(sorted(cls.__name__ for cls in shared)) or "every message"
                raise DefinitionError(
                    "E103",
                    f"{other.name} and {handler.name} both handle {names}"
                    f" of subscription {self.reader_of(handler)[0]!r}",
                    "a command has one handler; publish an event if several react"
                    if isinstance(handler.channel, Queue)
                    else 'give the second one its own: handle(subscription="...")',
                )
        self.handlers.append(handler)

    def reader_of(self, handler: Handler) -> tuple[str, str]:
        """Return (subscription name, channel name) of a handler."""
        return handler.options.subscription or self.name, handler.channel.name

    def provide(self, cls: type[T], factory: Callable[[], Any]) -> None:
        """Say how a resource is made: opened at start, closed at stop, given to handlers by its type.

        Args:
            cls: the type that parameters are annotated with.
            factory: a function, or a generator or context manager whose exit closes it; sync or async.
        """
        self.factories[cls] = factory

    def override(self, cls: type[T], factory: Callable[[], Any]) -> None:
        """Replace a resource, in a test or another deployment.

        Raises: DefinitionError E108 if nothing of that type is provided.
        """
        if cls not in self.factories:
            raise DefinitionError(
                "E108", f"{self.name} provides no {cls.__name__} to override", f"it provides: {_names(self.factories)}"
            )
        self.factories[cls] = factory

    def schema(self, *statements: str) -> None:
        """Declare the service's own tables; run at each start, so write CREATE TABLE IF NOT EXISTS."""
        self.statements += statements

    @overload
    def background(self, function: F, /) -> F: ...
    @overload
    def background(self, /, *, publishes: Sequence[type] = ()) -> Callable[[F], F]: ...
    def background(self, function: Any = None, /, *, publishes: Sequence[type] = ()) -> Any:
        """Run `function(running)` beside the handlers while the service is up, such as a web server.

        When it fails the service stops with its error; when the service stops it is cancelled.

        Args:
            publishes: types it publishes; `running` then refuses others, and a topology shows them.
        Raises: DefinitionError E102 for a type that is not declared.
        """

        def register(function: F) -> F:
            background = Background(function, tuple(publishes))
            for cls in background.gives:
                declaration(cls, f"{background.name} publishes", E="E102")
            self.backgrounds.append(background)
            return function

        return register if function is None else register(function)

    def check(self) -> None:
        """Refuse what cannot run.

        Raises: DefinitionError E108 for a parameter that nothing provides, E111 for a gap in upcasters.
        """
        for handler in self.handlers:
            for parameter, cls in handler.resources.items():
                if cls not in self.factories:
                    raise DefinitionError(
                        "E108",
                        f"{handler.name}: nothing provides parameter {parameter!r} of type {_name(cls)}",
                        f"add {self.name}.provide({_name(cls)}, factory); provided are: {_names(self.factories)}",
                    )
            for cls in handler.takes:
                _check_upcasters(message_type(cls))

    def __repr__(self) -> str:
        return f"Service({self.name!r})"


class System:
    """Services that are deployed or simulated together.

    Args:
        name: of the system.
        services: each with a name of its own.
    Raises: DefinitionError E112 for two services of one name, none at all, or what is no Service.
    """

    def __init__(self, name: str, services: Iterable[Service]) -> None:
        check_name("system", name)
        self.name = name
        self.services = list(services)
        if not self.services:
            raise DefinitionError(
                "E112",
                f"system {name!r} has no services",
                "give it at least one; one that only publishes is Service(...) without handlers",
            )
        for given in self.services:
            if not isinstance(given, Service):
                raise DefinitionError(
                    "E112", f"system {name!r} has {given!r}, which is no Service", "write Service(...)"
                )
        names = [service.name for service in self.services]
        for service in names:
            if names.count(service) > 1:
                raise DefinitionError("E112", f"two services are named {service!r}", "rename one of them")

    def only(self, names: Iterable[str]) -> System:
        """Return a system of some of the services.

        Raises: DefinitionError E112 for an unknown name.
        """
        wanted = list(names)
        known = {service.name: service for service in self.services}
        for name in wanted:
            if name not in known:
                raise DefinitionError("E112", f"no service {name!r}", f"there are: {', '.join(known)}")
        return System(self.name, [known[name] for name in wanted])

    def check(self) -> None:
        """Refuse what cannot run, before anything starts.

        Raises: DefinitionError E104 (two readers of a Queue), E105 (a cycle without end), E108, E111.
        """
        for service in self.services:
            service.check()
        self._check_owners()
        self._check_cycles()

    def _check_owners(self) -> None:
        """Refuse a second reader of a Queue: each message would go to one of them, with a handler for it or without."""
        readers: dict[str, tuple[Service, Handler]] = {}
        for service in self.services:
            for handler in service.handlers:
                queue = handler.channel
                if not isinstance(queue, Queue):
                    continue
                first, other = readers.setdefault(queue.name, (service, handler))
                if first.reader_of(other) != service.reader_of(handler):
                    raise _two_readers(queue, first.reader_of(other)[0], other, service.reader_of(handler)[0], handler)

    def _check_cycles(self) -> None:
        """A type is endless if each handler that takes it must go on with an endless type."""
        handlers = [handler for service in self.services for handler in service.handlers if handler.takes]
        # Greatest fixed point: start from all, drop what can come to an end.
        endless = [
            (cls, handler) for handler in handlers if handler.returns and not handler.optional for cls in handler.takes
        ]
        while True:
            going = {cls for cls, _ in endless}
            kept = [(cls, handler) for cls, handler in endless if going.issuperset(handler.returns)]
            if len(kept) == len(endless):
                break
            endless = kept
        if endless:
            names = list(dict.fromkeys(cls.__name__ for cls, _ in endless))
            raise DefinitionError(
                "E105",
                f"a cycle without end: {' → '.join([*names, names[0]])}"
                f" ({', '.join(sorted({handler.name for _, handler in endless}))})",
                "let one of these handlers return None or another type at some point",
            )

    def __repr__(self) -> str:
        return f"System({self.name!r}, {[service.name for service in self.services]})"


def _options(given: dict[str, Any]) -> Options:
    if "publishes" in given:
        given = {**given, "publishes": tuple(given["publishes"])}
    try:
        options = Options(**given)
    except TypeError as error:
        raise DefinitionError(
            "E120", f"handle(): {error}", f"options are: {', '.join(Options.__struct_fields__)}"
        ) from error
    positive = {
        "concurrency": options.concurrency,
        "batch.size": options.batch.size,
        "parked_limit": options.parked_limit,
        "timeout_s": 1 if options.timeout_s is None else options.timeout_s,
    }
    for name, value in positive.items():
        if not value > 0:
            raise DefinitionError("E120", f"handle({name}={value!r})", "it must be more than 0")
    if options.batch.wait_s < 0:
        raise DefinitionError("E120", f"batch.wait_s is {options.batch.wait_s}", "it must be 0 or more")
    if options.after_dead_letter not in ("hold", "continue"):
        raise DefinitionError(
            "E120", f"handle(after_dead_letter={options.after_dead_letter!r})", "one of hold, continue"
        )
    _check_start(options.start)
    return options


def _two_readers(queue: Queue, one: str, first: Handler, other: str, second: Handler) -> DefinitionError:
    shared = ", ".join(sorted(_name(cls) for cls in set(first.takes) & set(second.takes)))
    if shared:
        return DefinitionError(
            "E104",
            f"{shared} on queue {queue.name!r} has two owners: {first.name} and {second.name}",
            "a command has one owner; publish an event if several services react",
        )
    return DefinitionError(
        "E104",
        f"queue {queue.name!r} has two readers: {first.name} of {one!r} and {second.name} of {other!r}",
        "each message would go to one of them at random; give each its own queue",
    )


def _check_start(start: Start) -> None:
    if isinstance(start, datetime):
        if start.utcoffset() is None:
            raise DefinitionError(
                "E120",
                f"handle(start={_shown(start)}) has no time zone",
                "name it, such as datetime(2026, 11, 1, tzinfo=UTC)",
            )
        # Not at start, by the App's clock: a simulated one is years behind.
        if start.timestamp() > system_clock.now():
            raise DefinitionError(
                "E120",
                f"handle(start={_shown(start)}) is still to come",
                "a time that is over, or one of earliest, latest",
            )
    elif start not in ("earliest", "latest"):
        raise DefinitionError(
            "E120", f"handle(start={start!r})", "one of earliest, latest, or a datetime with a time zone"
        )


def _shown(start: Start) -> str:
    return start.isoformat() if isinstance(start, datetime) else repr(start)


def _check_upcasters(declared: MessageType | None) -> None:
    if declared is None or not declared.upcasters:
        return
    oldest = min(declared.upcasters)
    missing = [version for version in range(oldest, declared.version) if version not in declared.upcasters]
    if missing:
        raise DefinitionError(
            "E111",
            f"{declared.name} version {declared.version} has no upcaster from version {missing[0]}",
            f"add @{declared.channel.variable}.upcast({declared.cls.__name__}, version={missing[0]})",
        )


def _name(cls: Any) -> str:
    return getattr(cls, "__name__", repr(cls))


def _names(classes: Iterable[Any]) -> str:
    return ", ".join(sorted(_name(cls) for cls in classes)) or "nothing"


def as_system(given: System | Service) -> System:
    """Return a System; of a Service one with just that.

    Raises: DefinitionError E112 for anything else.
    """
    if isinstance(given, Service):
        return System(given.name, [given])
    if not isinstance(given, System):
        raise DefinitionError("E112", f"{given!r} is to run", "give a Service, or System('shop', [payment, mail])")
    return given
