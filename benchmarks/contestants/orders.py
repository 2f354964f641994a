"""The payload that all contestants carry: an order of about 250 bytes of JSON.

Invariant: depends on msgspec only, so that peers can use it. Read next: floors.py.
"""

from __future__ import annotations

import msgspec


class Customer(msgspec.Struct, frozen=True):
    """Who orders."""

    name: str
    email: str


class Line(msgspec.Struct, frozen=True):
    """One article of an order."""

    sku: str
    quantity: int
    price_cents: int


class OrderCreated(msgspec.Struct, frozen=True):
    """A customer has ordered."""

    order_id: str
    customer: Customer
    lines: list[Line]
    total_cents: int
    note: str


class OrderPriced(msgspec.Struct, frozen=True):
    """What a handler publishes in answer."""

    order_id: str
    total_cents: int


def order(number: int) -> OrderCreated:
    """Return the order of that number."""
    lines = [Line("SKU-1009-BLUE-M", 2, 1999), Line("SKU-2044-GREY-L", 1, 4950)]
    customer = Customer("Ada Lovelace", "ada@example.com")
    return OrderCreated(f"order-{number:08d}", customer, lines, 8948, "ring twice")


encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(OrderCreated).decode
