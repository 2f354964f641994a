"""Channels and the types they carry: Queue, Topic, Stream.

Invariant: a type has one home channel and one name there; only registered types are ever decoded.
Never does: I/O. Read next: handler.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    dataclass_transform,
    get_type_hints,
    is_typeddict,
    overload,
)

import msgspec

from trunkline.codec import Decode, Encode, checked_decode, compile_codec, encode_json
from trunkline.errors import DecodeError, DefinitionError
from trunkline.message import Message

C = TypeVar("C", bound=type)
Upcaster = Callable[[dict[str, Any]], dict[str, Any]]

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,118}[a-z0-9])?")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|[a-z0-9]+")


if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
    class _StructMeta(msgspec.StructMeta):
        """Tells type checkers that subclasses are frozen without saying so; at run time they inherit it."""

    class Struct(msgspec.Struct, metaclass=_StructMeta, frozen=True):
        """Base for message payloads: an immutable msgspec Struct."""

else:

    class Struct(msgspec.Struct, frozen=True):
        """Base for message payloads: an immutable msgspec Struct."""


class MessageType:
    """One payload class on its home channel.

    Attributes:
        cls: the payload class.
        name: CloudEvents `type`.
        version: schema version, 1 or more.
        kind: `event` (may have many readers) or `command` (one owner).
        key: field that gives the partition key, if the channel orders by key.
        upcasters: from version → function on the plain dict, giving the next version.
        decode: gives the payload of a Message, upcast to this class when an older version wrote it; raises DecodeError.
    """

    __slots__ = (
        "_decode",
        "channel",
        "cls",
        "decode",
        "encode",
        "key",
        "key_of",
        "kind",
        "name",
        "upcasters",
        "version",
    )

    def __init__(self, cls: type, name: str, version: int, channel: Channel, kind: str, key: str | None) -> None:
        self.cls = cls
        self.name = name
        self.version = version
        self.channel = channel
        self.kind = kind
        self.key = key
        self.encode: Encode
        self._decode: Decode
        try:
            self.encode, self._decode = compile_codec(cls, name)
            self.key_of = _key_getter(cls, key)
        except NameError as error:
            call = f"{channel.variable}.{kind}({cls.__name__})"
            raise DefinitionError(
                "E119",
                f"{cls.__name__}: {error}",
                f"a type that names itself or a later one is declared after it: {call}",
            ) from error
        self.upcasters: dict[int, Upcaster] = {}
        self.decode: Callable[[Any], Any] = self._decode if version == 1 else self._decode_any_version

    def add_upcaster(self, version: int, function: Upcaster) -> None:
        """Read schema `version` too: `function` makes the next version of it."""
        self.upcasters[version] = function
        self.decode = self._decode_any_version

    def _decode_any_version(self, message: Message) -> Any:
        if message.schemaversion < self.version:
            message = msgspec.structs.replace(message, data=self._upcast(message))
        return self._decode(message)

    def _upcast(self, message: Message) -> bytes:
        plain = _decode_plain(message)
        for version in range(message.schemaversion, self.version):
            upcast = self.upcasters.get(version)
            if upcast is None:
                raise DecodeError(
                    "E413",
                    f"{self.name} has schema version {message.schemaversion} and nothing upcasts version {version}",
                    f"add @{self.channel.variable}.upcast({self.cls.__name__}, version={version})",
                )
            try:
                plain = upcast(plain)
            except Exception as error:
                raise self._not_upcast(version, error) from error
        try:
            return encode_json(plain)
        except Exception as error:  # what the last one gave has no JSON form
            raise self._not_upcast(self.version - 1, error) from error

    def _not_upcast(self, version: int, error: Exception) -> DecodeError:
        return DecodeError("E414", f"upcasting {self.name} from version {version} failed: {error!r}")

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name} v{self.version} on {self.channel.name}>"


_decode_plain = checked_decode(msgspec.json.Decoder(dict[str, Any]).decode, "JSON object")
declared_types: dict[type, MessageType] = {}
"""Payload class → what is declared for it, for the whole process."""


def message_type(cls: type) -> MessageType | None:
    """Return what is declared for a payload class, or None."""
    return declared_types.get(cls)


def message_types() -> tuple[MessageType, ...]:
    """Return everything that was declared in this process, in the order of declaration."""
    return tuple(declared_types.values())


class Channel:
    """A named, typed place. Use Queue, Topic or Stream.

    Args:
        name: lower-case letters, digits, `-`, `_` and `.`, up to 120 characters; the same on every transport.
        key: field of the payloads that gives the partition key.
        plain: CloudEvents type that messages of other programs are taken for which are no CloudEvents; without it
            they are dead letters.
    Raises: DefinitionError E113 for a name outside these rules.
    """

    kind: ClassVar[Literal["queue", "topic", "stream"]]

    def __init__(self, name: str, *, key: str | None = None, plain: str | None = None) -> None:
        check_name("channel", name)
        self.name = name
        self.key = key
        self.plain = plain
        self.types: dict[str, MessageType] = {}

    @property
    def variable(self) -> str:
        """Return the name as a Python variable, for hints in errors."""
        return re.sub(r"\W", "_", self.name)

    def _declare(self, cls: C, kind: str, name: str | None, version: int, key: str | None) -> C:
        type_name = name or _default_type_name(cls.__name__)
        known = declared_types.get(cls)
        if known is not None:
            raise DefinitionError(
                "E106",
                f"{cls.__name__} already has its home on channel {known.channel.name!r}",
                f"declare another class for {self.name!r}, or publish with to={self.variable}",
            )
        if type_name in self.types:
            raise DefinitionError(
                "E109",
                f"type {type_name!r} is declared twice on channel {self.name!r}",
                "give one of them type=...; an older form of the same type is read by an upcaster",
            )
        if version < 1:
            raise DefinitionError("E120", f"version {version} of {type_name!r}", "versions start at 1")
        declared = MessageType(cls, type_name, version, self, kind, key or self.key)
        self.types[type_name] = declared
        declared_types[cls] = declared
        return cls

    def upcast(self, cls: type, *, version: int) -> Callable[[Upcaster], Upcaster]:
        """Register how a plain dict of schema `version` becomes one of `version` + 1.

        Raises: DefinitionError E111 if `cls` is not declared here or `version` is not an older one.
        """
        declared = declared_types.get(cls)
        if declared is None or declared.channel is not self:
            raise DefinitionError("E111", f"{cls.__name__} is not declared on channel {self.name!r}")
        if not 1 <= version < declared.version:
            raise DefinitionError(
                "E111",
                f"upcaster of {declared.name!r} from version {version}",
                f"the class is version {declared.version}; upcasters start from 1 to {declared.version - 1}",
            )

        def register(function: Upcaster) -> Upcaster:
            declared.add_upcaster(version, function)
            return function

        return register

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class _EventChannel(Channel):
    @overload
    def event(self, cls: C, /) -> C: ...
    @overload
    def event(
        self,
        /,
        *,
        type: str | None = None,
        version: int = 1,
        key: str | None = None,
    ) -> Callable[[C], C]: ...
    def event(
        self,
        cls: Any = None,
        /,
        *,
        type: str | None = None,  # noqa: A002 - the CloudEvents attribute's name
        version: int = 1,
        key: str | None = None,
    ) -> Any:
        """Declare a class as an event of this channel.

        Args:
            type: CloudEvents type; default from the class name, `OrderCreated` → `order.created`.
            version: schema version of this class.
            key: field that gives the partition key, instead of the channel's.
        Raises: DefinitionError E106, E109, E110, E119.
        """
        if cls is not None:
            return self._declare(cls, "event", type, version, key)
        return lambda decorated: self._declare(decorated, "event", type, version, key)


class Queue(Channel):
    """Work distribution: each message goes to one receiver; its processes compete.

    Args:
        name: see Channel.
        key: messages of one key run one after the other inside one process.
        priority: whether `priority` 0-9 lets messages overtake.
    """

    kind = "queue"

    def __init__(self, name: str, *, key: str | None = None, plain: str | None = None, priority: bool = False) -> None:
        super().__init__(name, key=key, plain=plain)
        self.priority = priority

    @overload
    def command(self, cls: C, /) -> C: ...
    @overload
    def command(
        self,
        /,
        *,
        type: str | None = None,
        version: int = 1,
        key: str | None = None,
    ) -> Callable[[C], C]: ...
    def command(
        self,
        cls: Any = None,
        /,
        *,
        type: str | None = None,  # noqa: A002 - the CloudEvents attribute's name
        version: int = 1,
        key: str | None = None,
    ) -> Any:
        """Declare a class as a command sent over this queue; one service owns it.

        Raises: DefinitionError E106, E109, E110, E119.
        """
        if cls is not None:
            return self._declare(cls, "command", type, version, key)
        return lambda decorated: self._declare(decorated, "command", type, version, key)


class Topic(_EventChannel):
    """Publish/subscribe: each subscription gets each message once."""

    kind = "topic"


class Stream(_EventChannel):
    """A partitioned log: order per key, offsets, replay.

    Args:
        name: see Channel.
        key: field of the payloads that gives the partition key.
        partitions: how many processes of one subscription can share the work, 1 to 1024.
        retention_s: seconds that messages stay readable; None keeps them.
    Raises: DefinitionError E113 or E120.
    """

    kind = "stream"

    def __init__(
        self,
        name: str,
        *,
        key: str | None = None,
        plain: str | None = None,
        partitions: int = 16,
        retention_s: float | None = None,
    ) -> None:
        super().__init__(name, key=key, plain=plain)
        if not 1 <= partitions <= 1024:  # noqa: PLR2004
            raise DefinitionError("E120", f"stream {name!r} with {partitions} partitions", "1 to 1024 are possible")
        self.partitions = partitions
        self.retention_s = retention_s


def check_name(what: str, name: str) -> None:
    """Refuse a name that some transport could not carry.

    Raises: DefinitionError E113.
    """
    if not _NAME.fullmatch(name):
        raise DefinitionError(
            "E113",
            f"{what} name {name[:130]!r}",
            "use lower-case letters, digits, '-', '_' and '.', starting and ending with a letter or digit, up to 120",
        )


def _default_type_name(class_name: str) -> str:
    return ".".join(_WORD.findall(class_name)).lower()


def _key_getter(cls: type, key: str | None) -> Callable[[Any], Any] | None:
    if key is None:
        return None
    names = set(get_type_hints(cls))
    if key not in names:
        raise DefinitionError(
            "E110",
            f"{cls.__name__} has no field {key!r} to order by",
            f"fields are: {', '.join(sorted(names)) or 'none'}; name one with key=",
        )
    return itemgetter(key) if is_typeddict(cls) else attrgetter(key)
