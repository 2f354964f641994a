"""The notification service: keeps the history of every order, sends e-mail and SMS at its end.

Invariant: one mail and one SMS for each ended order. The mail's Message-ID follows from the id of the
message, so mail systems show a repeated one once. Twilio has no idempotency keys: its list of
messages is asked before each SMS (see `sms`).
Read next: clients/mail.py, clients/twilio.py.
"""

from __future__ import annotations

from datetime import UTC, datetime

from examples.shop.clients.mail import Mail, open_mail
from examples.shop.clients.twilio import Sms, open_sms
from examples.shop.contracts import OrderCancelled, OrderConfirmed, inventory_events, order_events, payment_events
from trunkline import Batch, Context, Message, Retry, Service

notification = Service("notification")
notification.provide(Mail, open_mail)
notification.provide(Sms, open_sms)
notification.schema(
    "CREATE TABLE IF NOT EXISTS history ("
    " number INTEGER PRIMARY KEY, order_id TEXT NOT NULL, event TEXT NOT NULL, message_id TEXT NOT NULL,"
    " at REAL NOT NULL)",
    "CREATE INDEX IF NOT EXISTS history_order ON history (order_id)",
    # A second row for one order and kind is refused: it would be a second mail or SMS.
    "CREATE TABLE IF NOT EXISTS notification ("
    " order_id TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('mail', 'sms')), receipt TEXT NOT NULL,"
    " PRIMARY KEY (order_id, kind)) WITHOUT ROWID",
)

PROVIDER_AWAY = Retry(immediate=2, delays_s=(2.0, 10.0, 60.0, 300.0, 1800.0))


@notification.handle(from_=order_events, batch=Batch(size=200, wait_s=0.02))
@notification.handle(from_=payment_events, batch=Batch(size=200, wait_s=0.02))
@notification.handle(from_=inventory_events, batch=Batch(size=200, wait_s=0.02))
async def note(messages: list[Message], ctx: Context) -> None:
    """Write down everything that happens to an order, for whoever answers the customer's call."""
    tx = await ctx.transaction()
    for message in messages:
        await tx.execute(
            "INSERT INTO history (order_id, event, message_id, at) VALUES (?, ?, ?, ?)",
            (message.partitionkey, message.type, message.id, message.time),
        )


# Mail and SMS read on their own: when one provider is away, the other's messages still leave.


# No more at once than may be handed over a second time after a crash.
@notification.handle(subscription="notification-mail", retry=PROVIDER_AWAY, concurrency=8)
async def mail(ended: OrderConfirmed | OrderCancelled, server: Mail, ctx: Context) -> None:
    """Send the mail; after a crash again, with the same Message-ID."""
    subject, text = told(ended)
    receipt = await server.send(
        message_id=ctx.message.id, to=ended.email, subject=subject, text=f"{subject}.\n\n{text}\n"
    )
    tx = await ctx.transaction()
    await tx.execute("INSERT INTO notification VALUES (?, 'mail', ?)", (ended.order_id, receipt))


@notification.handle(subscription="notification-sms", retry=PROVIDER_AWAY)
async def sms(ended: OrderConfirmed | OrderCancelled, phone: Sms, ctx: Context) -> None:
    """Send the SMS, unless Twilio already has it.

    `ctx.attempt` does not tell whether an earlier process came as far as Twilio before it died, and
    nothing that is written in the same commit as this handler's result can. So Twilio is always
    asked; that costs one request for each SMS.
    """
    subject, _ = told(ended)
    receipt = await phone.send(
        to=ended.phone,
        text=f"{subject}.",
        reference=ctx.message.id,
        since=datetime.fromtimestamp(ctx.message.time, UTC),
        may_have_been_sent=True,
    )
    tx = await ctx.transaction()
    await tx.execute("INSERT INTO notification VALUES (?, 'sms', ?)", (ended.order_id, receipt))


def told(ended: OrderConfirmed | OrderCancelled) -> tuple[str, str]:
    """Return (subject, text) of what the customer reads.

    >>> told(OrderCancelled("o-1", 1234, "out of stock", "a@example.com", "+15550100001"))
    ('Order o-1 is cancelled', 'We are sorry: out of stock. Nothing is charged for it.')
    """
    if isinstance(ended, OrderConfirmed):
        return f"Order {ended.order_id} is confirmed", f"You paid {dollars(ended.amount_cents)}. It is on its way."
    return f"Order {ended.order_id} is cancelled", f"We are sorry: {ended.reason}. Nothing is charged for it."


def dollars(cents: int) -> str:
    """Return an amount for people.

    >>> dollars(1205)
    '$12.05'
    """
    return f"${cents // 100:,}.{cents % 100:02d}"
