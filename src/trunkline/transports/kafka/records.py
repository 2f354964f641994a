"""Kafka's records as wire.py takes them.

Source: CloudEvents Kafka protocol binding 1.0.2. Read next: reader.py.
"""

from __future__ import annotations

from operator import methodcaller
from typing import Any
from zlib import crc32

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, TIMESTAMP_NOT_AVAILABLE, Message

from trunkline import wire
from trunkline.errors import DecodeError

LAST_MS = 253_402_300_799_999
"""The end of the year 9999."""
_headers_of = methodcaller("headers")
"""For a name that is no UTF-8 the client returns a broken list and sets an error: a call by C code is checked for that,
one by Python code that runs often is not, and ends the process."""


def text_headers(record: Message) -> dict[str, str]:
    """Return the headers of a record; what is no UTF-8 in their values is escaped, for wire.py to refuse.

    Raises: DecodeError E404 for a name that is no UTF-8.
    """
    try:
        headers: Any = _headers_of(record)
    except (SystemError, UnicodeDecodeError) as error:
        raise DecodeError("E404", "the name of a header is not UTF-8") from error
    return {
        name: value if isinstance(value, str) else wire.header_text(value)
        for name, value in headers or ()
        if value is not None
    }


def key_of(record: Message) -> str | None:
    """Return the key of a record that has one which is text.

    Source: CloudEvents Kafka protocol binding 1.0.2 §3.1: the key is the partitionkey.
    """
    key: Any = record.key()
    try:
        return str(key, "utf-8") if isinstance(key, bytes) else key
    except UnicodeDecodeError:
        return None


def plain_of(record: Message, type_name: str) -> wire.Plain:
    """Return how a record that is no CloudEvent is read.

    A moment that the producer gave is nobody's in particular: beside it the content is part of the id.
    """
    kind, milliseconds = record.timestamp()
    value: Any = record.value() or b""
    content = "" if kind == TIMESTAMP_LOG_APPEND_TIME else f"/{crc32(value):08x}"
    return wire.Plain(
        type_name,
        str(record.topic()),
        f"{record.topic()}/{record.partition()}/{record.offset()}/{milliseconds}{content}",
        milliseconds / 1000 if kind != TIMESTAMP_NOT_AVAILABLE and 0 <= milliseconds <= LAST_MS else 0.0,
        key_of(record),
    )
