"""Messages as brokers carry them."""

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.errors import DecodeError
from trunkline.message import JSON, MAX_HEADER_BYTES, Message, attributes, from_structured
from trunkline.wire import MAX_WIRE_BYTES, Plain, decode, encode

TEXT = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
TIMES = st.integers(0, 4_000_000_000_000_000).map(lambda microseconds: microseconds / 1e6)
MESSAGES = st.builds(
    Message,
    id=TEXT,
    type=TEXT,
    source=TEXT,
    data=st.one_of(
        st.binary(max_size=50), st.recursive(st.integers(), st.lists, max_leaves=5).map(msgspec.json.encode)
    ),
    time=TIMES,
    partitionkey=st.none() | TEXT,
    correlationid=st.none() | TEXT,
    causationid=st.none() | TEXT,
    schemaversion=st.integers(1, 1000),
    datacontenttype=st.sampled_from([JSON, "application/octet-stream"]),
    subject=st.none() | TEXT,
    expirytime=st.none() | TIMES,
    priority=st.integers(0, 9),
    tenantid=st.none() | TEXT,
    extensions=st.none() | st.dictionaries(st.sampled_from(["one", "two"]), TEXT, min_size=1),
)


def no_headers() -> dict[str, str]:
    return {}


def rounded(message: Message) -> Message:
    """A time on the wire has microseconds; floats of today's times have about four of them to one."""
    expiry = message.expirytime
    return msgspec.structs.replace(
        message, time=round(message.time, 6), expirytime=None if expiry is None else round(expiry, 6)
    )


@given(MESSAGES)
def test_what_is_written_reads_back_equal(message):
    assert rounded(decode(encode(message), no_headers)) == rounded(message)


@given(MESSAGES)
def test_what_is_written_is_the_json_event_format(message):
    assert rounded(from_structured(encode(message))) == rounded(message)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_decode_error(body):
    try:
        decode(body, no_headers)
    except DecodeError:
        return


@pytest.mark.parametrize("prefix", ["ce-", "ce_", "cloudEvents:", "cloudEvents_", "CE-"])
def test_binary_mode_is_read_under_every_prefix_of_the_bindings(prefix):
    message = Message("1", "order.created", "shop", b"\x00\x01", 1.5, "k", datacontenttype="application/x-raw")
    headers = {f"{prefix}{name}": value for name, value in attributes(message).items() if name != "datacontenttype"}
    assert decode(message.data, lambda: {**headers, "Content-Type": "application/x-raw"}) == message


def test_an_attribute_we_do_not_know_becomes_an_extension():
    event = {
        "specversion": "1.0",
        "id": "1",
        "type": "t",
        "source": "s",
        "time": "2026-01-31T12:00:00Z",
        "colour": "red",
    }
    assert decode(msgspec.json.encode(event), no_headers).extensions == {"colour": "red"}


def test_an_event_without_a_time_is_read():
    event = {"specversion": "1.0", "id": "1", "type": "t", "source": "s", "data": {"a": 1}}
    assert decode(msgspec.json.encode(event), no_headers).data == b'{"a":1}'


def test_binary_data_travels_as_base64():
    event = {
        "specversion": "1.0",
        "id": "1",
        "type": "t",
        "source": "s",
        "data_base64": base64.b64encode(b"\xff").decode(),
    }
    assert decode(msgspec.json.encode(event), no_headers).data == b"\xff"


@pytest.mark.parametrize("body", [b"hello", b'{"order": 1}', b'{"specversion":"0.3","id":"1","type":"t","source":"s"}'])
def test_what_is_no_event_is_refused_without_plain_mode(body):
    with pytest.raises(DecodeError):
        decode(body, no_headers)


def test_plain_mode_takes_it_for_a_message_of_its_type():
    plain = Plain("legacy.order", "amqp://broker", "orders/0/17", 12.5, "k")
    message = decode(b'{"order": 1}', no_headers, plain)
    assert (message.id, message.type, message.source, message.data, message.time, message.partitionkey) == (
        "orders/0/17", "legacy.order", "amqp://broker", b'{"order": 1}', 12.5, "k",
    )  # fmt: skip


def test_plain_mode_still_reads_events():
    message = Message("1", "order.created", "shop", b"{}", 1.5)
    assert decode(encode(message), no_headers, Plain("legacy", "x", "1", 0.0)) == message


def test_plain_mode_does_not_hide_a_broken_event_in_binary_mode():
    headers = {"ce-specversion": "1.0", "ce-id": "1"}
    with pytest.raises(DecodeError, match="E403"):
        decode(b"{}", lambda: headers, Plain("legacy", "x", "1", 0.0))


def test_what_is_too_large_is_refused_before_it_is_read():
    with pytest.raises(DecodeError, match="E416"):
        decode(b" " * (MAX_WIRE_BYTES + 1), no_headers)


def test_headers_are_asked_for_only_when_the_body_is_no_event():
    def forbidden() -> dict[str, str]:
        raise AssertionError("asked for headers")

    decode(encode(Message("1", "t", "s", b"{}", 1.0)), forbidden)


@pytest.mark.parametrize("name", ["id", "type", "source"])
def test_a_structured_event_with_an_empty_attribute_is_refused(name):
    event = {"specversion": "1.0", "id": "1", "type": "t", "source": "s", "time": "2026-01-31T12:00:00Z", name: ""}
    with pytest.raises(DecodeError, match=f"E403 .*'{name}'"):
        decode(msgspec.json.encode(event), no_headers)


HEADERS = {"ce-specversion": "1.0", "ce-id": "1", "ce-type": "t", "ce-source": "s"}


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("ce-id", b"\xff".decode("utf-8", "surrogateescape"), "E404"),
        ("ce-id", "a\ufffd", "E404"),
        ("ce-subject", b"\xff".decode("utf-8", "surrogateescape"), "E404"),
        ("content-type", b"\xff".decode("utf-8", "surrogateescape"), "E404"),
        ("ce-note", "x" * MAX_HEADER_BYTES, "E405"),
        ("ce-specversion", "0.3", "E401"),
    ],
)
def test_a_binary_event_with_headers_that_cannot_be_is_refused(name, value, code):
    with pytest.raises(DecodeError, match=code):
        decode(b"{}", lambda: {**HEADERS, name: value})


def test_what_is_no_event_is_not_called_one_of_another_version():
    with pytest.raises(DecodeError, match="E406 no CloudEvent"):
        decode(b'{"a": 1}', no_headers)


def test_a_content_type_that_is_no_text_does_not_spoil_a_plain_message():
    said = {"content-type": b"\xff".decode("utf-8", "surrogateescape")}
    assert decode(b"x", lambda: said, Plain("t", "s", "1", 1.0)).datacontenttype == JSON
