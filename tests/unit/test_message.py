"""The envelope: what CloudEvents carries reads back equal, and nothing else is believed."""

import contextlib
import json
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline import Message
from trunkline.errors import DecodeError
from trunkline.message import (
    MAX_HEADER_BYTES,
    format_time,
    from_binary,
    from_structured,
    pack,
    parse_time,
    to_binary,
    to_structured,
    unpack,
)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
names = st.text(string.ascii_lowercase, min_size=3, max_size=12).map(lambda name: f"x{name}")
micros = st.integers(0, 4_000_000_000_000_000).map(lambda number: number / 1_000_000)
messages = st.builds(
    Message,
    id=texts,
    type=texts,
    source=texts,
    data=st.one_of(st.binary(max_size=60), st.just(b'{"a": [1, 2.5, null, "x"]}')),
    time=micros,
    partitionkey=st.none() | texts,
    correlationid=st.none() | texts,
    causationid=st.none() | texts,
    schemaversion=st.integers(1, 99),
    datacontenttype=st.sampled_from(["application/json", "application/octet-stream", "text/plain"]),
    subject=st.none() | texts,
    sequence=st.none() | texts,
    expirytime=st.none() | micros,
    priority=st.integers(0, 9),
    tenantid=st.none() | texts,
    extensions=st.none() | st.dictionaries(names, texts, min_size=1, max_size=3),
)


def same(read: Message, written: Message) -> bool:
    """Times are compared to the microsecond, which is what the wire carries."""
    rounded = {"time": format_time(written.time)}
    found = {"time": format_time(read.time)}
    if written.expirytime is not None:
        rounded["expiry"] = format_time(written.expirytime)
        found["expiry"] = format_time(read.expirytime)
    rest = {"time": 0.0, "expirytime": None}
    return found == rounded and msgspec.structs.replace(read, **rest) == msgspec.structs.replace(written, **rest)


@given(messages)
def test_binary_mode_reads_back_equal(message):
    assert same(from_binary(*to_binary(message)), message)


@given(messages)
def test_structured_mode_reads_back_equal(message):
    assert same(from_structured(to_structured(message)), message)


@given(messages)
def test_the_packed_form_reads_back_equal(message):
    assert unpack(pack(message)) == message


@given(messages)
def test_structured_mode_is_what_the_cloudevents_sdk_reads(message):
    event = json.loads(to_structured(message))
    assert event["specversion"] == "1.0"
    assert (event["id"], event["type"], event["source"]) == (message.id, message.type, message.source)
    assert ("data" in event) != ("data_base64" in event)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_decode_error(body):
    with contextlib.suppress(DecodeError):
        from_structured(body)


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=6), st.binary(max_size=20))
def test_any_headers_are_an_event_or_a_decode_error(headers, body):
    with contextlib.suppress(DecodeError):
        from_binary(headers, body)


REQUIRED = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "t"}


def test_header_names_are_read_in_any_case():
    assert from_binary({name.upper(): value for name, value in REQUIRED.items()}, b"").id == "1"


@pytest.mark.parametrize("name", ["ce-id", "ce-source", "ce-type"])
def test_a_required_attribute_that_is_missing_is_named(name):
    headers = {key: value for key, value in REQUIRED.items() if key != name}
    with pytest.raises(DecodeError, match=f"E403.*{name[3:]}"):
        from_binary(headers, b"")


def test_another_version_of_cloudevents_is_refused():
    with pytest.raises(DecodeError, match=r"E401.*'0\.3'"):
        from_binary({**REQUIRED, "ce-specversion": "0.3"}, b"")


def test_headers_beyond_the_limit_are_refused():
    with pytest.raises(DecodeError, match="E405"):
        from_binary({**REQUIRED, "ce-subject": "x" * MAX_HEADER_BYTES}, b"")


@pytest.mark.parametrize("text", ["yesterday", "2026-01-31", "2026-01-31T12:00:00", "2026-13-01T00:00:00Z", ""])
def test_a_time_without_zone_or_sense_is_refused(text):
    with pytest.raises(DecodeError, match="E402"):
        parse_time(text)


@pytest.mark.parametrize("value", ["-1", "1.5", "many", "٣", "9" * 30])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(DecodeError, match="E409"):
        from_binary({**REQUIRED, "ce-priority": value}, b"")


def test_headers_of_other_kinds_change_nothing():
    odd = {"Reply-To": "evil", "X-Control": "stop", "CE_ID": "2", "traceparent": "x", "Content-Type": "text/plain"}
    assert from_binary({**REQUIRED, **odd}, b"") == msgspec.structs.replace(
        from_binary(REQUIRED, b""), datacontenttype="text/plain"
    )
