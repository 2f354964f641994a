"""Payload objects to bytes and back, compiled once per type.

Invariant: size and depth are checked before decoding; bytes that do not fit the type raise DecodeError,
never anything else. Never does: envelopes (message.py) or choosing types from the wire (channel.py).
Read next: channel.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol, is_typeddict

import msgspec

from trunkline.errors import DecodeError, DefinitionError, PayloadError


class Carrier(Protocol):
    """What has a payload: a Message."""

    @property
    def data(self) -> bytes:
        """Return the encoded payload."""


Encode = Callable[[Any], bytes]
Decode = Callable[[Carrier], Any]

MAX_PAYLOAD_BYTES = 1024 * 1024
"""Largest payload accepted, to publish or to read. Bigger data goes by reference (claim check)."""
MAX_DEPTH = 64
"""Deepest nesting of arrays and objects that is read."""

encode_json = msgspec.json.Encoder(order=None).encode
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def compile_codec(cls: type, name: str) -> tuple[Encode, Decode]:
    """Return (encode, decode) of JSON for `cls`, the latter with limits and errors as `checked_decode`.

    `encode` raises TypeError, ValueError or RecursionError for what has no JSON form; `make_message`, which alone calls
    it, makes errors of that and of the size: one call less for each message.

    Args:
        cls: msgspec Struct, dataclass, attrs class, TypedDict or pydantic model.
        name: of the message type, for errors.
    Raises: DefinitionError E119 if values of `cls` have no JSON form.
    """
    from trunkline.finite import may_hold_float, only_finite  # only who declares a type needs it

    if hasattr(cls, "model_validate_json"):
        encode = only_finite(_encode_pydantic, _dump_pydantic)
        return encode, checked_decode(cls.model_validate_json, name)
    fields = ("__struct_fields__", "__dataclass_fields__", "__attrs_attrs__")
    if not (is_typeddict(cls) or any(hasattr(cls, field) for field in fields)):
        raise DefinitionError(
            "E119",
            f"{cls.__name__} cannot be a message payload",
            "use a Struct, dataclass, attrs class, TypedDict or pydantic model",
        )
    try:
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(cls)
    except TypeError as error:
        raise DefinitionError("E119", f"{cls.__name__} has a field without a JSON form: {error}") from error
    from trunkline.depth import is_deep  # as above

    deep = is_deep(cls, MAX_DEPTH)
    encode = only_finite(encode_json) if may_hold_float(cls) else encode_json
    return encode, checked_decode(decoder.decode, name, deep=deep)


def _encode_pydantic(payload: Any) -> bytes:
    return payload.model_dump_json().encode()  # type: ignore[no-any-return]


def _dump_pydantic(payload: Any) -> Any:
    return payload.model_dump()


def not_encoded(name: str, error: Exception) -> PayloadError:
    """Return E301: what an encoder raised for a payload of the type `name`."""
    return PayloadError("E301", f"{name} cannot be encoded: {_first_line(error)}")


def too_large(name: str, size: int) -> PayloadError:
    """Return E302: a payload has more than MAX_PAYLOAD_BYTES."""
    return PayloadError(
        "E302",
        f"{name} is {size} bytes",
        f"at most {MAX_PAYLOAD_BYTES} are accepted; store it elsewhere and send a reference",
    )


def checked_decode(decode: Callable[[bytes], Any], name: str, *, deep: bool = True) -> Decode:
    """Return `decode` with the limits, for the payload of a message.

    Args:
        deep: whether the type lets values be nested deeper than MAX_DEPTH; if not, whatever is deeper is not of the
            type and is skipped unread.
    It raises: DecodeError E410 (size), E411 (depth) or E412 (not of the type).
    """

    def checked(message: Carrier) -> Any:
        data = message.data
        # Cheap upper bound first: only many brackets can nest deeply.
        if len(data) > MAX_PAYLOAD_BYTES or (deep and data.count(b"[") + data.count(b"{") > MAX_DEPTH):
            check_limits(data)
        try:
            return decode(data)
        except Exception as error:  # the user's own checks in it may raise anything
            raise DecodeError("E412", f"payload is not a valid {name}: {_first_line(error)}") from error

    return checked


def check_limits(data: bytes) -> None:
    """Refuse payload bytes that are too large or too deeply nested.

    Raises: DecodeError E410 (size) or E411 (depth).
    """
    if len(data) > MAX_PAYLOAD_BYTES:
        raise DecodeError("E410", f"payload of {len(data)} bytes", f"at most {MAX_PAYLOAD_BYTES} are read")
    if _depth(data) > MAX_DEPTH:
        raise DecodeError("E411", "payload is nested too deeply", f"at most {MAX_DEPTH} levels are read")


def _depth(data: bytes) -> int:
    deepest = level = 0
    for match in _TOKENS.finditer(data):
        token = match.group()
        if token in b"[{":
            level += 1
            deepest = max(deepest, level)
        elif token in b"]}":
            level -= 1
    return deepest


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
