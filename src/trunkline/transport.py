"""The contract of a transport: carry channels on a broker.

Invariant: `send` returns only when the broker has confirmed every message of the batch.
Never does: inbox, dead letters or retries (store.py, delivery.py). Read next: store.py.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Awaitable, Iterable, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec

from trunkline.channel import Channel
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, StoreFullError, TrunklineError
from trunkline.message import Message

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

LIVE = 0

Start = Literal["earliest", "latest"] | datetime
"""Where a new reader of a Stream begins: at its first message, with what is published from now on, or at a moment."""


class Subscription:
    """A named reader of a channel; processes of one service share it and compete.

    Attributes:
        name: of the reader, by default the service's name.
        channel: what it reads.
        start: where a new reader of a Stream begins.
        since_s: seconds since the epoch of a `start` that is a moment, rounded down, for not every broker knows more;
            else None. It begins in each partition with the first message that was stored then or later.
        label: `name@channel`, unique in a store.
    """

    __slots__ = ("channel", "label", "name", "since_s", "start")

    def __init__(self, name: str, channel: Channel, start: Start = "earliest") -> None:
        self.name = name
        self.channel = channel
        self.start = start
        self.since_s = max(1, int(start.timestamp())) if isinstance(start, datetime) else None
        self.label = f"{name}@{channel.name}"

    def __repr__(self) -> str:
        return f"<Subscription {self.label}>"


class Delivery(msgspec.Struct, eq=False, gc=False):
    """One message handed to one subscription.

    Attributes:
        subscription: who receives it.
        message: the envelope, or None while only `raw` is known.
        raw: the envelope's bytes as stored; None when the message was handed over in memory.
        key: partition key, or None.
        position: where the transport keeps it (log position or queue row).
        partition: of a Stream, else -1.
        attempt: failures so far.
        row: the parked row it comes from, or LIVE.
        suspect: it may have been in a handler when a process died.
        fresh: it cannot have been handled before, so the inbox need not be asked.
        unread: code and text of why `raw` is no message, from an adapter that has tried to read it.
    """

    subscription: Subscription
    message: Message | None
    raw: bytes | None
    key: str | None
    position: int
    partition: int = -1
    attempt: int = 0
    row: int = LIVE
    suspect: bool = False
    fresh: bool = False
    unread: tuple[str, str] | None = None


class Staged(msgspec.Struct, frozen=True, gc=False):
    """A message on its way to a channel.

    Attributes:
        due: seconds since the epoch before which it is not sent; None sends at once.
        fresh: its id was made just now, so nobody can have handled it before.
    """

    channel: Channel
    message: Message
    due: float | None = None
    fresh: bool = False


def told_first(before: TrunklineError | None, error: TrunklineError) -> TrunklineError:
    """Return what the caller of a batch is told: the first refusal, but before all that there is no room.

    That one message is wrong says nothing of the others; without room others of its channel are not tried.
    """
    no_room = isinstance(error, StoreFullError) and not isinstance(before, StoreFullError)
    return error if before is None or no_room else before


class Backlog(msgspec.Struct, frozen=True):
    """How far one subscription is behind.

    Attributes:
        waiting: messages not yet handled, those in flight included.
        in_flight: of these, handed to a process.
    """

    waiting: int
    in_flight: int = 0


class Capabilities(msgspec.Struct, frozen=True):
    """What a transport keeps by itself; start-up refuses what neither it nor the Store can keep.

    Attributes:
        durable: what was confirmed survives the end of every process.
        processes: several processes can share a subscription.
        priority: a Queue may let urgent messages overtake.
        ordered_streams: a Stream keeps the order of each key, whichever process reads it.
        description: in a line, for `doctor`.
        foreign: other programs can publish to its channels.
    """

    durable: bool
    processes: bool
    priority: bool
    ordered_streams: bool
    description: str
    foreign: bool = False


class Transport(Protocol):
    """Carries channels on a broker. Implementations are found by entry point `trunkline.transports`."""

    capabilities: Capabilities

    async def start(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Connect, declare channels and subscriptions that are missing, begin to receive.

        `channels` are those that the App's handlers read and publish to; others are declared at their first message.
        Raises: TransportError if it cannot be reached; ConfigurationError if something exists otherwise.
        """

    def send(self, batch: Sequence[Staged]) -> Awaitable[None]:
        """Return an awaitable that ends when the broker has confirmed all of `batch`.

        Raises: PublishError or TransportError; then `err.unsent` lists what was not confirmed.
        """

    async def receive(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return 1 to `limit` deliveries; wait while there are none.

        Returns none at once after `assignment` has changed, so that what is parked for new partitions is looked at.
        """

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Confirm that `deliveries` need not come again."""

    def owns(self, subscription: Subscription, partition: int) -> bool:
        """Return whether this process currently reads `partition` for `subscription`."""

    def assignment(self, subscription: Subscription) -> int:
        """Return a number that changes whenever this process gets or gives up a partition."""

    async def backlog(self, subscription: Subscription) -> Backlog:
        """Return how far `subscription` is behind."""

    async def tidy(self) -> None:
        """Remove messages whose retention has passed, a bounded number at a time."""

    async def drain(self) -> None:
        """Stop receiving; what was received may still be settled."""

    async def stop(self) -> None:
        """Give back what was not settled and disconnect."""


class Credentials(msgspec.Struct, frozen=True):
    """User and password of a URL: read anew each time, for what a variable holds may have changed.

    Attributes:
        written: user and password as the URL has them, each None where there is none.
        shown: the URL without them.
    """

    written: tuple[str | None, str | None] = (None, None)
    shown: str = ""

    @property
    def user(self) -> str | None:
        """Return who signs in, or None.

        Raises: ConfigurationError E249 for a variable that is not set any more.
        """
        return self._read(self.written[0])

    @property
    def password(self) -> str | None:
        """Return the password of `user`, or None.

        Raises: as `user`.
        """
        return self._read(self.written[1])

    def _read(self, text: str | None) -> str | None:
        if text is None:
            return None
        # What a variable holds is taken as it is, other text decoded.
        return _expand(text, self.shown) if _VARIABLE.search(text) else unquote(text)


class Address(msgspec.Struct, frozen=True):
    """A transport or store URL taken apart.

    Attributes:
        scheme: which implementation.
        path: what stands between scheme and options, decoded; for a broker only what stands after its hosts.
        options: the query, each name once.
        shown: the URL without secrets, for logs and errors.
        hosts: (name or address, port or None) of each host; of a broker there may be several.
        credentials: who signs in.
    """

    scheme: str
    path: str
    options: dict[str, str]
    shown: str
    hosts: tuple[tuple[str, int | None], ...] = ()
    credentials: Credentials = Credentials()

    @property
    def user(self) -> str | None:
        """Return who signs in, or None; see Credentials."""
        return self.credentials.user

    @property
    def password(self) -> str | None:
        """Return the password of `user`, or None; see Credentials."""
        return self.credentials.password


def parse_address(url: str) -> Address:
    """Take a URL apart.

    Raises: ConfigurationError E201 if it is not one, E206 if a file stands in it where none is looked for.
    """
    parts = urlsplit(url)
    if not parts.scheme:
        raise ConfigurationError(
            "E201", f"{url!r} is not a URL", "such as sqlite:///shop.db, sqlite:////var/lib/shop.db or memory:"
        )
    if parts.scheme == "sqlite":
        _check_slashes(url.partition(":")[2].partition("?")[0])
        _check_name(unquote(parts.netloc + parts.path).lstrip("/"), parts.fragment)
        return Address(
            parts.scheme, unquote(parts.netloc + parts.path), dict(parse_qsl(parts.query, keep_blank_values=True)),
            f"{parts.scheme}:{'//' if '://' in url else ''}{parts.hostname or ''}{parts.path}",
        )  # fmt: skip
    return _broker_address(parts)


def _broker_address(parts: SplitResult) -> Address:
    """Take apart `scheme://user:password@host:port,host:port/path?options`; `${NAME}` is a variable's value.

    Raises: ConfigurationError E201 for a port that is none, E249 for a variable that is not set.
    """
    credentials, _, places = parts.netloc.rpartition("@")
    user, colon, password = credentials.partition(":")
    shown = f"{parts.scheme}:{'//' if parts.netloc else ''}{places}{parts.path}"
    hosts = tuple(_host(place, shown) for place in _expand(places, shown).split(",") if place)
    options = parse_qsl(parts.query, keep_blank_values=True) if parts.query else []
    for text in (user, password):
        _expand(text, shown)
    return Address(
        parts.scheme,
        unquote(_expand(parts.path, shown)),
        {name: _expand(value, shown) for name, value in options},
        shown,
        hosts,
        Credentials((user or None, password if colon else None), shown),
    )


_VARIABLE = re.compile(r"\$\{(\w+)\}")


def _expand(text: str, shown: str) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name not in os.environ:
            raise ConfigurationError(
                "E249", f"the URL of {shown} names the environment variable {name}, which is not set", f"set {name}"
            )
        return os.environ[name]

    return _VARIABLE.sub(value, text) if "$" in text else text


def _host(place: str, shown: str) -> tuple[str, int | None]:
    name, colon, port = place.rpartition(":")
    if place.startswith("[") and place.endswith("]"):
        name, colon, port = place, "", ""
    if not colon:
        return (port or name).strip("[]"), None
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):  # noqa: PLR2004
        raise ConfigurationError("E201", f"{shown} has the port {port!r}", "a port is a number from 1 to 65535")
    return name.strip("[]"), int(port)


def _check_slashes(place: str) -> None:
    """Refuse one or two slashes before a file: whether a relative or an absolute path is meant nobody can tell."""
    slashes = len(place) - len(place.lstrip("/"))
    if slashes in (1, 2) and len(place) > slashes:
        name = place.lstrip("/")
        raise ConfigurationError(
            "E206",
            f"sqlite:{place} has {slashes} slash{'es' * (slashes > 1)} before the file; three are needed",
            f"write sqlite:///{name} for a file in the current folder, sqlite:////{name} for an absolute path",
        )


def _check_name(name: str, fragment: str) -> None:
    """Refuse what SQLite would take for something else than a file of that name."""
    if name == ":memory:":
        raise ConfigurationError("E206", "sqlite:///:memory: names no file", "use memory: to keep nothing")
    if "\0" in name:
        raise ConfigurationError("E206", f"{name!r} has a zero byte in it", "name another file")
    if fragment:
        raise ConfigurationError(
            "E206", f"sqlite:///{name}#{fragment} has a part after '#'", "write %23 for a '#' in the name of the file"
        )


def load_adapter(group: str, url: str, clock: Clock) -> Any:
    """Return the transport or store that `url` names, not yet started.

    Args:
        group: entry point group, `trunkline.transports` or `trunkline.stores`.
    Raises: ConfigurationError E201, E202 or E206.
    """
    address = parse_address(url)
    point = find_adapter(group, address)
    try:
        adapter = _named_by(point)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "trunkline" or not point.extras:
            raise
        raise ConfigurationError(
            "E242",
            f"{address.shown} needs {error.name}, which is not installed",
            f"pip install 'trunkline[{point.extras[0]}]'",
        ) from error
    return adapter(address, clock)


@cache
def _named_by(point: EntryPoint) -> Any:
    """Return what an entry point names."""
    return point.load()


_ALSO_CALLED = {
    "postgres": "postgresql", "psql": "postgresql", "pg": "postgresql", "rabbitmq": "amqp", "rabbit": "amqp",
    "rabbitmqs": "amqps", "kafkas": "kafka+ssl", "kafka+tls": "kafka+ssl", "nats+tls": "tls", "redis+tls": "rediss",
    "file": "sqlite",
}  # fmt: skip
"""What people write for a scheme that is installed under another name."""


def _meant(scheme: str, installed: Iterable[str]) -> str:
    """Return a question that ends in a space, or nothing where no name is near."""
    installed = list(installed)
    base = scheme.partition("+")[0]
    named = _ALSO_CALLED.get(scheme) or _ALSO_CALLED.get(base, base)
    near = [named] if named in installed else difflib.get_close_matches(scheme, installed, 1)
    slashes = "" if near and near[0] in ("memory", "none", "sqlite") else "//"
    return f"did you mean {near[0]}:{slashes}? " if near else ""


@cache
def adapters(group: str) -> dict[str, EntryPoint]:
    """Return what is installed in a group of entry points, by scheme."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=group)}


def find_adapter(group: str, address: Address) -> EntryPoint:
    """Return where the transport or store of an address is.

    Raises: ConfigurationError E202 if nothing that is installed brings it.
    """
    found = adapters(group)
    if address.scheme not in found:
        if group == "trunkline.stores" and address.scheme in adapters("trunkline.transports"):
            raise ConfigurationError(
                "E243",
                f"{address.shown} carries messages, but keeps no state of a service",
                "name a store too: sqlite:///shop.db for processes of one machine, postgresql://… for more, or none:",
            )
        shown = sorted(found.keys() - {"sim"})  # which nobody can name outside of a simulation
        raise ConfigurationError(
            "E202",
            f"no {group.rpartition('.')[2].removesuffix('s')} for {address.scheme!r}",
            f"{_meant(address.scheme, shown)}installed are: {', '.join(shown)}; another comes with a package"
            f" that has an entry point in the group {group}",
        )
    return found[address.scheme]
