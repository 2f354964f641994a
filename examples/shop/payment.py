"""The payment service: charges the card, and gives the money back when there are no goods.

Invariant: Stripe is asked before the transaction opens, with the id of the message as idempotency
key. A process that dies in between asks again with the same key, and the money moves once.
Read next: clients/stripe.py; inventory.py, whose refusal starts the refund.
"""

from __future__ import annotations

from examples.shop.clients.stripe import Charges, Declined, open_charges
from examples.shop.contracts import OrderCreated, PaymentFailed, PaymentRefunded, PaymentSucceeded, StockRefused
from trunkline import Context, Queue, RejectError, Retry, Service, Struct

payment = Service("payment")
payment.provide(Charges, open_charges)
payment.schema(
    "CREATE TABLE IF NOT EXISTS payment ("
    " order_id TEXT PRIMARY KEY, amount_cents INTEGER NOT NULL CHECK (amount_cents >= 0),"
    " status TEXT NOT NULL CHECK (status IN ('paid', 'refused', 'refunding', 'refunded')),"
    " charge_id TEXT, refund_id TEXT, decline_code TEXT)",
)

STRIPE_AWAY = Retry(immediate=2, delays_s=(2.0, 10.0, 60.0, 300.0, 1800.0))
"""Stripe's library has already tried again by itself when a call fails."""

refunds = Queue("refunds", key="order_id")


@refunds.command
class RefundCharge(Struct):
    """Give one charge back. A message of its own: its id is the key under which Stripe refunds once."""

    order_id: str
    charge_id: str
    amount_cents: int


@payment.handle(retry=STRIPE_AWAY)
async def charge(order: OrderCreated, charges: Charges, ctx: Context) -> PaymentSucceeded | PaymentFailed:
    """Charge the card once, however often this is called for one message."""
    charge_id = decline_code = None
    if order.amount_cents > 0:
        try:
            charge_id = await charges.charge(order.order_id, order.amount_cents, order.card, ctx.message.id)
        except Declined as refusal:
            decline_code = refusal.code
    tx = await ctx.transaction()
    status = "paid" if decline_code is None else "refused"
    await tx.execute(
        "INSERT INTO payment (order_id, amount_cents, status, charge_id, decline_code) VALUES (?, ?, ?, ?, ?)",
        (order.order_id, order.amount_cents, status, charge_id, decline_code),
    )
    if decline_code is not None:
        return PaymentFailed(order.order_id, decline_code)
    return PaymentSucceeded(order.order_id, order.amount_cents, order.sku, order.quantity)


@payment.handle
async def compensate(refused: StockRefused, ctx: Context) -> RefundCharge | PaymentRefunded:
    """Ask for the refund; nothing is to be given back for an order of 0.00."""
    tx = await ctx.transaction()
    rows = await tx.fetch("SELECT charge_id, amount_cents FROM payment WHERE order_id = ?", (refused.order_id,))
    if not rows:
        raise RejectError(f"order {refused.order_id} has no payment here, and so nothing to refund")
    ((charge_id, amount_cents),) = rows
    status = "refunded" if charge_id is None else "refunding"
    await tx.execute("UPDATE payment SET status = ? WHERE order_id = ?", (status, refused.order_id))
    if charge_id is None:
        return PaymentRefunded(refused.order_id, amount_cents)
    return RefundCharge(refused.order_id, charge_id, amount_cents)


@payment.handle(retry=STRIPE_AWAY)
async def refund(job: RefundCharge, charges: Charges, ctx: Context) -> PaymentRefunded:
    """Refund the whole charge once, however often this is called for one message."""
    refund_id = await charges.refund(job.charge_id, ctx.message.id)
    tx = await ctx.transaction()
    await tx.execute(
        "UPDATE payment SET status = 'refunded', refund_id = ? WHERE order_id = ?", (refund_id, job.order_id)
    )
    return PaymentRefunded(job.order_id, job.amount_cents)
