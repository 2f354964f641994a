"""Types on channels: versions, and types that name themselves."""

from __future__ import annotations

import pytest

from trunkline import Message, Queue, Stream, Struct
from trunkline.channel import message_type
from trunkline.errors import DecodeError

prices = Stream("channel-prices")


@prices.event(version=2)
class Price(Struct):
    cents: int


def test_an_old_version_that_nothing_upcasts_is_refused_even_if_its_fields_fit():
    with pytest.raises(DecodeError, match="E413"):
        message_type(Price).decode(Message("i", "price", "s", b'{"cents":5}', 0.0, schemaversion=1))


def test_the_own_version_is_read():
    assert message_type(Price).decode(Message("i", "price", "s", b'{"cents":5}', 0.0, schemaversion=2)) == Price(5)


class Node(Struct):
    children: list[Node]


def test_a_type_that_names_itself_is_declared_after_its_class():
    Queue("channel-nodes").command(Node)
    read = message_type(Node).decode(Message("i", "node", "s", b'{"children":[{"children":[]}]}', 0.0))
    assert read == Node([Node([])])
