"""Payloads made from types alone, and the workload that publishes them."""

import dataclasses
import datetime as dt
import decimal
import enum
import uuid
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest
from msgspec import Meta

from tests.unit.testing.simulator.shipping import SaleMade, SendParcel, post, system, till
from trunkline import Service, System
from trunkline.clock import Draws
from trunkline.errors import ConfigurationError
from trunkline.testing.simulator.payloads import make, outside_types, workload_of


class Colour(enum.Enum):
    red = "r"
    green = "g"


class Line(msgspec.Struct):
    sku: str
    quantity: Annotated[int, Meta(ge=1, le=5)]


class Card(msgspec.Struct, tag=True):
    number: str


class Cash(msgspec.Struct, tag="cash"):
    cents: int


class Place(msgspec.Struct, array_like=True):
    street: str
    number: int


class Tree(msgspec.Struct):
    leaves: list["Tree"]
    up: "Tree | None" = None


class Everything(msgspec.Struct, rename="camel"):
    order_id: str
    total_cents: int
    lines: list[Line]
    paid_with: Card | Cash
    colour: Colour
    place: Place
    size: Literal["s", "m"]
    share: Annotated[float, Meta(gt=0, lt=1)]
    even: Annotated[int, Meta(multiple_of=2, gt=10)]
    code: Annotated[str, Meta(min_length=5, max_length=6)]
    raw: bytes
    when: dt.datetime
    aware: Annotated[dt.datetime, Meta(tz=True)]
    naive: Annotated[dt.datetime, Meta(tz=False)]
    day: dt.date
    at: dt.time
    lasts: dt.timedelta
    key: uuid.UUID
    price: decimal.Decimal
    labels: dict[str, int]
    tags: set[str]
    frozen: frozenset[int]
    pair: tuple[int, str]
    many: tuple[int, ...]
    flag: bool
    nothing: None
    anything: Any
    maybe: str | None
    tree: Tree


@dataclasses.dataclass
class Plain:
    plain_id: str
    email: str
    count: int = 0


class Typed(TypedDict):
    customer_id: str
    customer_name: str
    currency: str


@pytest.mark.parametrize("cls", [Everything, Plain, Typed, Line, SaleMade])
def test_what_is_made_is_of_its_type_and_survives_the_wire(cls):
    for seed in range(50):
        made = make(cls, Draws(seed), 1)
        assert msgspec.json.decode(msgspec.json.encode(made), type=cls) == made


def test_the_same_seed_makes_the_same_payloads_and_another_seed_others():
    assert make(Everything, Draws(7), 1) == make(Everything, Draws(7), 1)
    assert make(Everything, Draws(7), 1) != make(Everything, Draws(8), 1)


def test_values_are_plausible():
    made = make(Everything, Draws(1), 3)
    assert made.order_id == "order-3"
    assert 100 <= made.total_cents <= 100_000
    assert made.even % 2 == 0
    assert make(Plain, Draws(1), 2).email.endswith("@example.org")
    assert make(Typed, Draws(1), 2)["currency"] == "EUR"


def test_ids_of_one_name_are_equal_across_types_and_differ_from_one_number_to_the_next():
    draws = Draws(1)
    assert make(SaleMade, draws, 2).sale_id == make(SendParcel, draws, 2).sale_id
    assert make(SaleMade, draws, 2).sale_id != make(SaleMade, draws, 3).sale_id


class Patterned(msgspec.Struct):
    iban: Annotated[str, Meta(pattern="^[A-Z]{2}")]


@dataclasses.dataclass
class Choosy:
    amount: int

    def __post_init__(self):
        raise ValueError("never good enough")


class Foreign:
    """A class that msgspec knows nothing of."""


@dataclasses.dataclass
class Holds:
    foreign: Foreign


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Patterned, r"iban must match '\^\[A-Z\]\{2\}'"),
        (Choosy, "never good enough"),
        (Holds, "foreign is Custom"),
    ],
)
def test_a_type_that_does_not_say_what_it_may_be_is_refused_with_what_to_do(cls, why):
    with pytest.raises(ConfigurationError, match=f"E710 no {cls.__name__} can be made from its type: {why}") as caught:
        make(cls, Draws(1), 1)
    assert "write a Simulation with a workload" in caught.value.hint


def test_what_comes_from_outside_is_what_is_handled_and_not_published():
    assert outside_types(system) == [SaleMade]
    assert outside_types(System("post", [post])) == [SendParcel]
    assert outside_types(System("till", [till])) == [SaleMade]


async def test_a_workload_publishes_a_few_of_each_type_that_comes_from_outside():
    class Client:
        seed = 4

        def __init__(self):
            self.published = []

        async def publish(self, payload):
            self.published.append(payload)

    clients = [Client(), Client()]
    for client in clients:
        await workload_of(system)(client)
    assert [sale.sale_id for sale in clients[0].published] == ["sale-1", "sale-2", "sale-3"]
    assert clients[0].published == clients[1].published


def test_a_system_to_which_nothing_comes_from_outside_needs_a_workload():
    with pytest.raises(ConfigurationError, match="E713 nothing comes into empty from outside"):
        workload_of(System("empty", [Service("idle")]))
