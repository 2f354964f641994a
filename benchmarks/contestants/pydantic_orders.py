"""The order of orders.py as pydantic models, for peers that decode with pydantic."""

from __future__ import annotations

from pydantic import BaseModel

from benchmarks.contestants.orders import encode, order


class Customer(BaseModel):
    """Who orders."""

    name: str
    email: str


class Line(BaseModel):
    """One article of an order."""

    sku: str
    quantity: int
    price_cents: int


class Order(BaseModel):
    """A customer has ordered."""

    order_id: str
    customer: Customer
    lines: list[Line]
    total_cents: int
    note: str


def pydantic_order(number: int) -> Order:
    """Return the order of that number."""
    return Order.model_validate_json(encode(order(number)))
