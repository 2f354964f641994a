"""Messages as brokers carry them: CloudEvents 1.0, structured to write, structured or binary to read.

Invariant: `decode(encode(message))` equals `message`; whatever bytes come, the answer is a Message or a DecodeError.
Never does: payload typing (codec.py). Read next: transport.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

import msgspec

from trunkline.errors import DecodeError
from trunkline.message import JSON, MAX_HEADER_BYTES, Message, from_attributes, from_structured, to_structured

CONTENT_TYPE = "application/cloudevents+json; charset=UTF-8"
"""What every message that is written says of itself, in the header that the broker's binding has for it."""

MAX_WIRE_BYTES = 2 * 1024 * 1024
"""Largest message read: a payload at its limit, as base64, and its attributes."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_PREFIXES = ("ce-", "ce_", "cloudevents:", "cloudevents_")
_NOTHING = msgspec.Raw(b"")


_Required = Annotated[str, msgspec.Meta(min_length=1)]


class _Event(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """The JSON event format with the attributes that a Message has; others take the long way."""

    specversion: Literal["1.0"]
    id: _Required
    type: _Required
    source: _Required
    time: datetime
    datacontenttype: str = JSON
    partitionkey: str | None = None
    correlationid: str | None = None
    causationid: str | None = None
    schemaversion: int = 1
    dataschema: str | None = None
    subject: str | None = None
    sequence: str | None = None
    replyto: str | None = None
    expirytime: datetime | None = None
    priority: int = 0
    tenantid: str | None = None
    traceparent: str | None = None
    data: msgspec.Raw = _NOTHING


_write = msgspec.json.Encoder().encode
_read = msgspec.json.Decoder(_Event).decode
_is_json = msgspec.json.Decoder(msgspec.Raw).decode


def encode(message: Message) -> bytes:
    """Return `message` in the CloudEvents JSON event format.

    Source: CloudEvents JSON event format 1.0.2 §3.
    """
    data = message.data
    if message.extensions or message.datacontenttype != JSON or not data:
        return to_structured(message)
    try:
        _is_json(data)
    except msgspec.DecodeError:
        return to_structured(message)
    expiry = message.expirytime
    return _write(
        _Event(
            "1.0", message.id, message.type, message.source, _moment(message.time), JSON, message.partitionkey,
            message.correlationid, message.causationid, message.schemaversion, message.dataschema, message.subject,
            message.sequence, message.replyto, None if expiry is None else _moment(expiry), message.priority,
            message.tenantid, message.traceparent, msgspec.Raw(data),
        )
    )  # fmt: skip


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def decode(body: bytes, headers: Callable[[], Mapping[str, str]], plain: Plain | None = None) -> Message:
    """Read what a broker brought.

    Args:
        headers: gives the broker's headers; asked only when the body is no structured event by itself.
        plain: how to read what is no CloudEvent at all; None refuses it.
    Raises: DecodeError E401 to E409 if it is not a CloudEvent and `plain` is None, E416 if it is too large.
    """
    try:
        event = _read(body)
        expiry = event.expirytime
        return Message(
            event.id, event.type, event.source, bytes(event.data), (event.time - _EPOCH) / _SECOND,
            event.partitionkey, event.correlationid, event.causationid, event.schemaversion, event.datacontenttype,
            event.dataschema, event.subject, event.sequence, event.replyto,
            None if expiry is None else (expiry - _EPOCH) / _SECOND, event.priority, event.tenantid,
            event.traceparent,
        )  # fmt: skip
    except (ValueError, TypeError, RecursionError):  # msgspec's errors are ValueErrors; a time without zone: TypeError
        return _decode_slowly(body, headers(), plain)


def header_text(value: bytes) -> str:
    """Return a header's bytes as text; what is no UTF-8 is escaped, for `decode` to refuse."""
    return value.decode("utf-8", "surrogateescape")


def why_unread(error: DecodeError) -> tuple[str, str]:
    """Return code and text of what `decode` refused, as a Delivery tells them."""
    return error.code, f"{error.message}; {error.hint}" if error.hint else error.message


def _decode_slowly(body: bytes, headers: Mapping[str, str], plain: Plain | None) -> Message:
    if len(body) > MAX_WIRE_BYTES:
        raise DecodeError("E416", f"message of {len(body)} bytes", f"at most {MAX_WIRE_BYTES} are read")
    found = _binary_attributes(headers)
    if found is not None:
        return from_attributes(found, body)
    try:
        return from_structured(body)
    except DecodeError:
        if plain is None:
            raise
        return plain.message(body, headers)


def _binary_attributes(headers: Mapping[str, str]) -> dict[str, str] | None:
    """Return the attributes of a binary-mode event, or None if it is none.

    Raises: DecodeError E404 for one that is no UTF-8 (see `header_text`, or an identity in which a client has
        replaced something, for two could become one), E405 if they are too large.
    """
    found: dict[str, str] = {}
    content_type = None
    size = 0
    for name, value in headers.items():
        size += len(name) + len(value)
        lower = name.lower()
        if lower == "content-type":
            content_type = value
            continue
        for prefix in _PREFIXES:
            if lower.startswith(prefix):
                found[lower.removeprefix(prefix)] = value
                break
    if "specversion" not in found:
        return None
    if size > MAX_HEADER_BYTES:
        raise DecodeError("E405", f"headers of {size} bytes", f"at most {MAX_HEADER_BYTES} are read")
    if content_type is not None:
        found["datacontenttype"] = content_type
    for name, value in found.items():
        if not (_is_text(name) and _is_text(value)) or (name in {"id", "source"} and "\ufffd" in value):
            raise DecodeError("E404", f"header {name[:64]!a} is not UTF-8")
    return found


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Plain(msgspec.Struct, frozen=True):
    """How a channel reads messages that are no CloudEvents.

    Attributes:
        type: the CloudEvents type they are taken for.
        source: who is taken for their producer.
        id: identifies this one; the same for every redelivery of it. Its place is not enough: on another server, or
            when the channel was made anew, places begin again, and the inbox would take new messages for old ones.
        time: seconds since the epoch when the broker got it.
        key: what the broker says it is ordered by, or None.
    """

    type: str
    source: str
    id: str
    time: float
    key: str | None = None

    def message(self, body: bytes, headers: Mapping[str, str]) -> Message:
        """Return `body` as the payload of a message of this type."""
        said = (value for name, value in headers.items() if name.lower() == "content-type" and _is_text(value))
        content_type = next(said, JSON)
        return Message(self.id, self.type, self.source, body, self.time, self.key, datacontenttype=content_type)
