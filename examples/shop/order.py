"""The order service: takes orders over REST, follows them to their end, shows them on a web page.

Invariant: an order and the event that tells of it are one commit, so no order is accepted and then
forgotten. The client gives the order its id: placing it again is the same order. A status only moves
forward; every order ends confirmed or cancelled.
Read next: web.py, which speaks HTTP; contracts.py.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import msgspec

from examples.shop.contracts import (
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    PaymentFailed,
    PaymentRefunded,
    PaymentSucceeded,
    StockRefused,
    StockReserved,
)
from examples.shop.orders import CARDS, STOCK
from trunkline import Context, RejectError, Running, Service

order = Service("order")
order.schema(
    "CREATE TABLE IF NOT EXISTS shop_order ("
    " number INTEGER PRIMARY KEY, order_id TEXT NOT NULL UNIQUE, customer_id TEXT NOT NULL, sku TEXT NOT NULL,"
    " quantity INTEGER NOT NULL, amount_cents INTEGER NOT NULL, card TEXT NOT NULL, email TEXT NOT NULL,"
    " phone TEXT NOT NULL, status TEXT NOT NULL"
    "  CHECK (status IN ('placed', 'paid', 'refunding', 'confirmed', 'cancelled')),"
    " reason TEXT, placed REAL NOT NULL, ended REAL)",
    "CREATE INDEX IF NOT EXISTS shop_order_status ON shop_order (status, amount_cents)",
)

Status = Literal["placed", "paid", "refunding", "confirmed", "cancelled"]


# --- what a client sends and gets ---


SMALLEST_CENTS = 50
"""Stripe charges no less; an order of 0 is paid without a charge."""

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class NewOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /orders`. Attributes are named as in the table `shop_order`."""

    order_id: Name
    customer_id: Name
    sku: str
    quantity: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    amount_cents: Annotated[int, msgspec.Meta(ge=0, le=99_999_999)]
    card: str
    email: Annotated[str, msgspec.Meta(pattern=r"^[!-?A-~]{1,64}@[A-Za-z0-9.-]{1,190}$")]
    phone: Annotated[str, msgspec.Meta(pattern=r"^\+[1-9][0-9]{6,14}$")]

    def __post_init__(self) -> None:
        if 0 < self.amount_cents < SMALLEST_CENTS:
            raise ValueError(f"amount_cents is {self.amount_cents}; allowed: 0, or {SMALLEST_CENTS} and more")
        # Here, before anything is charged: what is found out later is charged first, and then refunded.
        for name, value, allowed in (("sku", self.sku, STOCK), ("card", self.card, CARDS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value[:40]!r}; allowed: {', '.join(allowed)}")


class Order(msgspec.Struct, frozen=True):
    """An order as it stands.

    Attributes:
        number: rises with each order of this shop.
        reason: why it was cancelled.
        placed: seconds since the epoch.
        ended: seconds since the epoch; None while it is under way.
    """

    number: int
    order_id: str
    customer_id: str
    sku: str
    quantity: int
    amount_cents: int
    card: str
    email: str
    phone: str
    status: Status
    reason: str | None
    placed: float
    ended: float | None


class Tally(msgspec.Struct, frozen=True):
    """How many orders have a status, and their cents."""

    orders: int
    cents: int


class Overview(msgspec.Struct, frozen=True):
    """The answer of `GET /orders`: a tally per status and the newest orders first."""

    tally: dict[str, Tally]
    orders: list[Order]


class OtherOrderError(Exception):
    """The id is taken by an order with other contents."""


# --- what the web part asks for ---


async def place(running: Running, new: NewOrder) -> tuple[Order, bool]:
    """Store a new order and publish OrderCreated, in one commit.

    Returns: the order as it stands, and whether it is new.
    Raises: OtherOrderError.
    """
    async with running.unit_of_work() as ctx:
        tx = await ctx.transaction()
        is_new = await tx.execute(
            "INSERT INTO shop_order"
            " (order_id, customer_id, sku, quantity, amount_cents, card, email, phone, status, placed)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'placed', ?) ON CONFLICT (order_id) DO NOTHING",
            (*msgspec.structs.astuple(new), time.time()),
        )
        stored = _order(await tx.fetch("SELECT * FROM shop_order WHERE order_id = ?", (new.order_id,)))
        if is_new:
            ctx.publish(OrderCreated(new.order_id, new.sku, new.quantity, new.amount_cents, new.card))
        elif any(getattr(stored, name) != getattr(new, name) for name in new.__struct_fields__):
            raise OtherOrderError(f"order {new.order_id} exists with other contents; give a new order a new id")
    return stored, bool(is_new)


async def find(running: Running, order_id: str) -> Order | None:
    """Return one order, or None."""
    async with running.unit_of_work() as ctx:
        rows = await (await ctx.transaction()).fetch("SELECT * FROM shop_order WHERE order_id = ?", (order_id,))
    return _order(rows) if rows else None


async def overview(running: Running, limit: int) -> Overview:
    """Return the tally and the `limit` newest orders."""
    async with running.unit_of_work() as ctx:
        tx = await ctx.transaction()
        tally = await tx.fetch("SELECT status, count(*), sum(amount_cents) FROM shop_order GROUP BY status")
        newest = await tx.fetch("SELECT * FROM shop_order ORDER BY number DESC LIMIT ?", (limit,))
    return Overview({status: Tally(n, cents) for status, n, cents in tally}, [Order(*row) for row in newest])


def _order(rows: list[tuple[Any, ...]]) -> Order:
    return Order(*rows[0])


@order.background(publishes=(OrderCreated,))
async def site(running: Running) -> None:
    """Serve REST and the page while the service runs."""
    from examples.shop.web import serve

    await serve(running)


# --- following the order ---


@order.handle
async def paid(event: PaymentSucceeded, ctx: Context) -> None:
    """Note it, unless the order has gone further already: the next event comes on another Stream."""
    tx = await ctx.transaction()
    await tx.execute(
        "UPDATE shop_order SET status = 'paid' WHERE order_id = ? AND status = 'placed'", (event.order_id,)
    )


@order.handle
async def sold_out(event: StockRefused, ctx: Context) -> None:
    """Note that the money is on its way back."""
    tx = await ctx.transaction()
    await tx.execute(
        "UPDATE shop_order SET status = 'refunding' WHERE order_id = ? AND status IN ('placed', 'paid')",
        (event.order_id,),
    )


@order.handle
async def reserved(event: StockReserved, ctx: Context) -> OrderConfirmed:
    """Paid and reserved: confirm."""
    ended = await _end(ctx, event.order_id, "confirmed", None)
    return OrderConfirmed(ended.order_id, ended.amount_cents, ended.email, ended.phone)


@order.handle
async def refused(event: PaymentFailed, ctx: Context) -> OrderCancelled:
    """No payment: cancel."""
    return await _cancel(ctx, event.order_id, "payment refused")


@order.handle
async def refunded(event: PaymentRefunded, ctx: Context) -> OrderCancelled:
    """No goods, and the money is back: cancel."""
    return await _cancel(ctx, event.order_id, "out of stock")


async def _cancel(ctx: Context, order_id: str, reason: str) -> OrderCancelled:
    ended = await _end(ctx, order_id, "cancelled", reason)
    return OrderCancelled(ended.order_id, ended.amount_cents, reason, ended.email, ended.phone)


async def _end(ctx: Context, order_id: str, status: Status, reason: str | None) -> Order:
    tx = await ctx.transaction()
    rows = await tx.fetch(
        "UPDATE shop_order SET status = ?, reason = ?, ended = ?"
        " WHERE order_id = ? AND status NOT IN ('confirmed', 'cancelled') RETURNING *",
        (status, reason, time.time(), order_id),
    )
    if not rows:
        # Each order has one ending by design; a second one is for a person to look at.
        raise RejectError(f"order {order_id} is unknown here or has ended before; it cannot become {status}")
    return _order(rows)
