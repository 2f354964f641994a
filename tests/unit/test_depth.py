"""Which types let values be nested deeply, and that only those are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec
import pytest

from trunkline import Message
from trunkline.codec import MAX_DEPTH, compile_codec
from trunkline.depth import is_deep
from trunkline.errors import DecodeError


class Line(msgspec.Struct):
    sku: str


class Order(msgspec.Struct):
    lines: list[Line]
    notes: dict[str, tuple[int, ...]] | None = None


@dataclass
class Address:
    street: str


class Shelf(TypedDict):
    place: Address


class Tree(msgspec.Struct):
    children: list[Tree]


class Open(msgspec.Struct):
    anything: Any


class Raw(msgspec.Struct):
    later: dict[str, msgspec.Raw]


@pytest.mark.parametrize("cls", [Line, Order, Address, Shelf])
def test_a_type_of_plain_fields_is_shallow(cls):
    assert not is_deep(cls, MAX_DEPTH)


@pytest.mark.parametrize("cls", [Tree, Open, Raw])
def test_a_type_that_is_open_or_contains_itself_is_deep(cls):
    assert is_deep(cls, MAX_DEPTH)


def test_a_type_nested_deeper_than_the_limit_is_deep():
    assert is_deep(Order, 1)


def message(data: bytes) -> Message:
    return Message("i", "t", "s", data, 0.0)


def test_a_deep_payload_of_a_deep_type_is_refused_before_it_is_decoded():
    decode = compile_codec(Tree, "tree")[1]
    with pytest.raises(DecodeError, match="E411"):
        decode(message(b'{"children":[' * 40 + b"]}" * 40))


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 100_000])
def test_what_is_deeper_than_a_shallow_type_is_skipped_unread_or_refused(levels):
    decode = compile_codec(Line, "line")[1]
    nested = message(b'{"sku":"a","more":' + b"[" * levels + b"]" * levels + b"}")
    if levels <= MAX_DEPTH + 1:
        assert decode(nested) == Line("a")
    else:
        with pytest.raises(DecodeError, match="E412"):
            decode(nested)
