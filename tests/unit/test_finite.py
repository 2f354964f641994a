"""NaN and infinities are refused at the publisher, and only types that may hold them are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple, TypedDict

import msgspec
import pydantic
import pytest

from trunkline import Context, Queue, Service, Stream, Struct
from trunkline.codec import compile_codec, encode_json
from trunkline.errors import PayloadError
from trunkline.finite import may_hold_float

NAN, INFINITE = float("nan"), float("inf")
prices = Stream("finite-prices")
bids = Queue("finite-bids")


@prices.event
class Price(Struct):
    amount: float
    note: str | None = None


@prices.event
class Ask(Struct):
    how: str


@bids.command
class Bid(Struct):
    amount: float


class Line(msgspec.Struct):
    sku: str
    count: int
    cost: Decimal
    parts: list[Line] | None = None
    more: msgspec.Raw | None = None


class Order(msgspec.Struct):
    lines: list[tuple[str, Price]]


class Tree(msgspec.Struct):
    children: list[Tree]
    weight: float | None = None


class Open(msgspec.Struct):
    anything: Any


class Point(NamedTuple):
    x: float


@dataclass
class Places:
    by_name: dict[str, Point]


class Shelf(TypedDict):
    height: float


class Model(pydantic.BaseModel):
    amount: float | None = None
    secret: pydantic.SecretStr | None = None


def test_a_type_without_floats_is_encoded_as_ever():
    assert not may_hold_float(Line)
    assert not may_hold_float(Ask)


@pytest.mark.parametrize("cls", [Price, Order, Tree, Open, Places, Shelf])
def test_a_type_with_a_float_anywhere_is_looked_at(cls):
    assert may_hold_float(cls)


@pytest.mark.parametrize(
    ("payload", "place"),
    [
        (Price(NAN), "amount is nan"),
        (Price(-INFINITE), "amount is -inf"),
        (Order([("a", Price(1.0)), ("b", Price(INFINITE))]), r"lines\[1\]\[1\]\.amount is inf"),
        (Tree([Tree([], NAN)]), r"children\[0\]\.weight is nan"),
        (Open({"large": 2**70, "list": [1.0, NAN]}), r"anything\.list\[1\] is nan"),
        (Open([msgspec.Raw(b"null"), NAN]), r"anything\[1\] is nan"),
        (Places({"home": Point(NAN)}), r"by_name\.home\[0\] is nan"),
        (Shelf(height=INFINITE), "height is inf"),
        (Model(amount=NAN, secret=pydantic.SecretStr("x")), "amount is nan"),
    ],
)
def test_a_number_that_json_cannot_say_is_refused_with_its_place(payload, place):
    encode, _ = compile_codec(Shelf if isinstance(payload, dict) else type(payload), "price")
    with pytest.raises(ValueError, match=rf"^{place}, .*finite number is needed"):
        encode(payload)


@pytest.mark.parametrize(
    "payload",
    [
        Price(1.5),
        Price(1.7976931348623157e308, "null"),
        Open({"key": None, "large": 2**70, "raw": msgspec.Raw(b"null")}),
        Open(b"\xcb\x7f\xf8 and null"),
        Open({"text": "\x7f", "numbers": [0.0, -0.0, 5e-324], "none": None}),
        Model(secret=pydantic.SecretStr("x")),
    ],
)
def test_finite_numbers_and_nulls_are_written(payload):
    encode, _ = compile_codec(type(payload), "price")
    expected = payload.model_dump_json().encode() if isinstance(payload, Model) else encode_json(payload)
    assert encode(payload) == expected


async def test_every_way_to_publish_refuses_it_and_nothing_is_sent(rig):
    service, seen = Service("teller"), []

    @service.handle
    async def keep(message: Price) -> None:
        seen.append(message)

    async with rig.run(service) as app:
        for attempt in (
            app.publish(Price(NAN)),
            app.publish_all([Price(1.0), Price(NAN)]),
            app.send(Bid(NAN)),
            app.schedule(Price(NAN), timedelta(seconds=1)),
        ):
            with pytest.raises(PayloadError, match="E301"):
                await attempt
        async with app.running("teller").unit_of_work() as ctx:
            for publish in (ctx.publish, partial(ctx.schedule, at=timedelta(seconds=1))):
                with pytest.raises(PayloadError, match="E301"):
                    publish(Price(NAN))
            with pytest.raises(PayloadError, match="E301"):
                ctx.send(Bid(NAN))
        await rig.clock.advance(5.0)
        await rig.idle()
    assert seen == []


async def test_a_handler_that_returns_or_publishes_it_has_failed(rig):
    service = Service("teller")

    @service.handle(publishes=(Price,))
    async def tell(ask: Ask, ctx: Context) -> Price | None:
        if ask.how == "return":
            return Price(NAN)
        ctx.publish(Price(NAN))
        return None

    async with rig.run(service) as app:
        await app.publish_all([Ask("return"), Ask("publish")])
        letters = await rig.buried(2)
    assert all("E301 price cannot be encoded: amount is nan" in letter.reason for letter in letters)
