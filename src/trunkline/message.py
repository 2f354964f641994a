"""The immutable envelope and its CloudEvents 1.0 forms.

Invariant: a Message never changes; what the wire carries in either CloudEvents mode reads back equal.
Never does: payload typing (codec.py). Read next: channel.py.
"""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, unquote_to_bytes
from zlib import crc32

import msgspec

from trunkline.errors import DecodeError, PublishError

JSON = "application/json"
MAX_HEADER_BYTES = 64 * 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ATTRIBUTES = ("id", "source", "type", "datacontenttype", "dataschema", "subject")
_TEXT_EXTENSIONS = (
    "partitionkey", "sequence", "correlationid", "causationid", "replyto", "tenantid", "traceparent",
)  # fmt: skip
_TIMES = ("time", "expirytime")
_NUMBERS = ("schemaversion", "priority")


_NAMES = frozenset({"specversion", "data", "data_base64", *_ATTRIBUTES, *_TEXT_EXTENSIONS, *_TIMES, *_NUMBERS})
"""What an extension cannot be called: on the wire all attributes stand side by side."""


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False, kw_only=False):
    """One message: CloudEvents 1.0 context attributes, registered extensions and the payload bytes.

    Attributes:
        id: UUIDv7 when made here; any non-empty text from others.
        type: name of the message's type, such as `order.created`.
        source: URI reference of the producer; with `id` it identifies the message.
        data: the payload, encoded as `datacontenttype` says.
        time: seconds since the epoch, UTC.
        partitionkey: messages of one key stay in order on a Stream.
        sequence: position in the Stream, set by the transport.
        correlationid: shared by everything one first message caused.
        causationid: id of the message whose handling produced this one.
        schemaversion: version of the payload's schema, 1 or more.
        expirytime: seconds since the epoch after which it is no longer delivered.
        priority: 0 (normal) to 9 (first); Queues with priority only.
        extensions: further CloudEvents extension attributes, as text.

    Source: CloudEvents 1.0.2 §3 and its extensions partitioning, sequence, distributed-tracing, expirytime.
    """

    id: str
    type: str
    source: str
    data: bytes
    time: float
    partitionkey: str | None = None
    correlationid: str | None = None
    causationid: str | None = None
    schemaversion: int = 1
    datacontenttype: str = JSON
    dataschema: str | None = None
    subject: str | None = None
    sequence: str | None = None
    replyto: str | None = None
    expirytime: float | None = None
    priority: int = 0
    tenantid: str | None = None
    traceparent: str | None = None
    extensions: dict[str, str] | None = None

    @property
    def identity(self) -> str:
        """Return what makes two deliveries the same message: a UUID alone, else source and id.

        Source: CloudEvents 1.0.2 §3.1.1: `source` + `id` is unique for each distinct event.
        """
        text = self.id
        if len(text) == 36 and text[8] == text[13] == text[18] == text[23] == "-":  # noqa: PLR2004
            return text
        return f"{self.source}\n{text}"


pack = msgspec.msgpack.Encoder().encode
"""Encode a Message as one compact byte string (the form the embedded engine stores)."""

unpack = msgspec.msgpack.Decoder(Message).decode
"""Read `pack` back. Raises msgspec.DecodeError for anything else."""


def read_packed(raw: bytes) -> Message | None:
    """Return the message of an envelope as stored, or None if it is unreadable."""
    try:
        return unpack(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def partition_of(message: Message, partitions: int) -> int:
    """Return in which partition of a Stream a message belongs: the same for each key, any without a key."""
    return crc32((message.partitionkey or message.id).encode()) % partitions


def checked(message: Message) -> Message:
    """Return `message` if its attributes have their types, so that it can be stored and read again.

    Raises: PublishError E307 if one has not.
    """
    try:
        for name in ("id", "type", "source"):
            if not getattr(message, name):
                raise ValueError(f"{name} is empty")  # noqa: TRY301 - one refusal for all of them
        unpack(pack(message))
        _check_values(message)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        wrong = _PLACE.sub(lambda found: f"attribute {Message.__struct_fields__[int(found[1])]}", str(error))
        raise PublishError("E307", f"this cannot be in an envelope: {wrong}", _TYPES) from error
    return message


def _check_values(message: Message) -> None:
    for name in _TIMES:
        seconds = getattr(message, name)
        try:
            if seconds is not None:
                format_time(seconds)
        except (ValueError, OverflowError, OSError) as error:
            raise ValueError(f"attribute {name} is {seconds}, which is no time from year 1 to 9999") from error
    taken = sorted(_NAMES.intersection(message.extensions or ()))
    if taken:
        raise ValueError(f"extensions has {', '.join(taken)}, the name of an attribute of its own")


_PLACE = re.compile(r"at `\$\[(\d+)\][^`]*`")
_TYPES = "attributes are text, priority and schemaversion whole numbers, time and expirytime seconds since the epoch"


def format_time(seconds: float) -> str:
    """Return `seconds` since the epoch as an RFC 3339 timestamp in UTC, to the microsecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_time(text: str) -> float:
    """Return the seconds since the epoch of an RFC 3339 timestamp.

    Raises: DecodeError if `text` is not one.
    """
    try:
        parsed = datetime.fromisoformat(text)
        # A time without zone has no offset to subtract: TypeError.
        return (parsed - _EPOCH).total_seconds()
    except (ValueError, OverflowError, TypeError) as error:
        raise DecodeError(
            "E402", f"time {text[:64]!r} is not an RFC 3339 timestamp", 'such as "2026-01-31T12:00:00Z"'
        ) from error


def attributes(message: Message) -> dict[str, str]:
    """Return the context attributes that are set, as text, by their CloudEvents name."""
    found: dict[str, str] = {"specversion": "1.0"}
    for name in (*_ATTRIBUTES, *_TEXT_EXTENSIONS):
        value = getattr(message, name)
        if value is not None:
            found[name] = value
    found["time"] = format_time(message.time)
    if message.expirytime is not None:
        found["expirytime"] = format_time(message.expirytime)
    found["schemaversion"] = str(message.schemaversion)
    if message.priority:
        found["priority"] = str(message.priority)
    found.update(message.extensions or {})
    return found


def from_attributes(found: dict[str, str], data: bytes) -> Message:
    """Build a Message from attribute texts, as `attributes` gives them.

    Raises: DecodeError if a required attribute is missing or one has a wrong form.
    """
    rest = dict(found)
    _check_version(rest.pop("specversion", None))
    for name in ("id", "source", "type"):
        if not rest.get(name):
            raise DecodeError("E403", f"CloudEvents attribute {name!r} is missing or empty")
    values: dict[str, Any] = {"data": data, "time": 0.0}
    for name in (*_ATTRIBUTES, *_TEXT_EXTENSIONS):
        if name in rest:
            values[name] = rest.pop(name)
    for name in _TIMES:
        if name in rest:
            values[name] = parse_time(rest.pop(name))
    for name in _NUMBERS:
        if name in rest:
            values[name] = _number(name, rest.pop(name))
    return Message(**values, extensions=rest or None)


def _check_version(version: str | None) -> None:
    if version is None:
        raise DecodeError("E406", "no CloudEvent: it has no specversion", "only CloudEvents 1.0 is read")
    if version != "1.0":
        raise DecodeError("E401", f"specversion is {version[:64]!r}", "only CloudEvents 1.0 is read")


def to_binary(message: Message) -> tuple[dict[str, str], bytes]:
    """Return (headers, body) in CloudEvents binary mode.

    Source: CloudEvents HTTP protocol binding 1.0.2 §3.1; values percent-encoded as its §3.1.3.2 says.
    """
    headers = {
        f"ce-{name}": quote(value, safe=" !#$&'()*+,-./:;<=>?@[]^_`{|}~")
        for name, value in attributes(message).items()
        if name != "datacontenttype"
    }
    headers["content-type"] = message.datacontenttype
    return headers, message.data


def from_binary(headers: dict[str, str], body: bytes) -> Message:
    """Read a CloudEvents binary-mode message; header names in any case, others than `ce-*` ignored.

    Raises: DecodeError if it is not one, or its headers exceed MAX_HEADER_BYTES.
    """
    found: dict[str, str] = {}
    size = 0
    for name, value in headers.items():
        size += len(name) + len(value)
        lower = name.lower()
        if lower == "content-type":
            found["datacontenttype"] = value
        elif lower.startswith("ce-"):
            try:
                found[lower[3:]] = unquote_to_bytes(value).decode()
            except UnicodeDecodeError as error:
                raise DecodeError("E404", f"header {name[:64]!r} is not UTF-8") from error
    if size > MAX_HEADER_BYTES:
        raise DecodeError("E405", f"headers of {size} bytes", f"at most {MAX_HEADER_BYTES} are read")
    return from_attributes(found, body)


def to_structured(message: Message) -> bytes:
    """Return the CloudEvents JSON event format (structured mode).

    Source: CloudEvents JSON event format 1.0.2 §3; JSON data inline, other data as `data_base64`.
    """
    event: dict[str, Any] = dict(attributes(message))
    event["schemaversion"] = message.schemaversion
    if message.priority:
        event["priority"] = message.priority
    if message.datacontenttype == JSON and _is_json(message.data):
        event["data"] = msgspec.Raw(message.data)
    else:
        event["data_base64"] = base64.b64encode(message.data).decode()
    return msgspec.json.encode(event)


def from_structured(body: bytes) -> Message:
    """Read the CloudEvents JSON event format.

    Raises: DecodeError if it is not one.
    """
    try:
        event = _structured.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DecodeError("E406", f"not a CloudEvents JSON document: {error}") from error
    encoded = event.pop("data_base64", None)
    inline = event.pop("data", None)
    found: dict[str, str] = {}
    for name, raw in event.items():
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise DecodeError("E406", f"attribute {name[:64]!r} is not JSON: {error}") from error
        if value is None:
            continue
        if isinstance(value, bool):
            found[name] = "true" if value else "false"
        elif isinstance(value, str | int):
            found[name] = str(value)
        else:
            raise DecodeError("E407", f"attribute {name[:64]!r} is a {type(value).__name__}, not text")
    if encoded is None:
        return from_attributes(found, b"" if inline is None else bytes(inline))
    try:
        data = base64.b64decode(msgspec.json.decode(encoded, type=str), validate=True)
    except (ValueError, msgspec.DecodeError) as error:
        raise DecodeError("E408", f"data_base64 is not base64: {error}") from error
    return from_attributes(found, data)


_structured = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _is_json(data: bytes) -> bool:
    try:
        msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return True


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):  # noqa: PLR2004
        raise DecodeError("E409", f"attribute {name!r} is {text[:64]!r}", "a whole number is needed")
    return int(text)
