"""What the shop's services say to each other: three Streams and their events.

Invariant: money is whole cents; an event carries what its readers need, so no service reads another's
tables. Events of one order stay in order on one Stream, not between two.
Read next: order.py, payment.py, inventory.py, notification.py.
"""

from __future__ import annotations

from trunkline import Stream, Struct

order_events = Stream("order-events", key="order_id")
payment_events = Stream("payment-events", key="order_id")
inventory_events = Stream("inventory-events", key="order_id")


@order_events.event
class OrderCreated(Struct):
    """A customer has ordered; nothing is paid yet.

    Attributes:
        amount_cents: what the whole order costs; 0 is paid without a charge.
        card: a payment method, such as `pm_card_visa`.
    """

    order_id: str
    sku: str
    quantity: int
    amount_cents: int
    card: str


@order_events.event
class OrderConfirmed(Struct):
    """Paid and reserved: the order is good."""

    order_id: str
    amount_cents: int
    email: str
    phone: str


@order_events.event
class OrderCancelled(Struct):
    """The order has ended without a sale, and no money is kept.

    Attributes:
        reason: for the customer to read, `payment refused` or `out of stock`.
    """

    order_id: str
    amount_cents: int
    reason: str
    email: str
    phone: str


@payment_events.event
class PaymentSucceeded(Struct):
    """The money is there; carries what was paid for, so that it can be reserved."""

    order_id: str
    amount_cents: int
    sku: str
    quantity: int


@payment_events.event
class PaymentFailed(Struct):
    """The card was refused; no money has moved.

    Attributes:
        code: the issuer's, such as `insufficient_funds`, or `resource_missing` for a card that nobody knows.
    """

    order_id: str
    code: str


@payment_events.event
class PaymentRefunded(Struct):
    """The customer has all the money back."""

    order_id: str
    amount_cents: int


@inventory_events.event
class StockReserved(Struct):
    """The goods are set aside for this order."""

    order_id: str
    sku: str
    quantity: int


@inventory_events.event
class StockRefused(Struct):
    """There are not enough units; nothing is reserved."""

    order_id: str
    sku: str
    quantity: int
