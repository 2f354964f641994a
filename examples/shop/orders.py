"""The real orders of the example: CDNOW purchases, read into typed rows.

Invariant: a line of the data always becomes the same order, with the same card, item, address and
number; nothing is drawn at random, so which cards are declined and which items are sold out is
known before the shop runs.
Never does: input or output other than reading the data file. Read next: data/README.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).parent / "data" / "cdnow_sample.txt"

# Stripe's own test cards; https://docs.stripe.com/testing lists them.
GOOD_CARD = "pm_card_visa"
DECLINED_CARD = "pm_card_chargeDeclined"
EMPTY_CARD = "pm_card_chargeDeclinedInsufficientFunds"
CARDS = (GOOD_CARD, DECLINED_CARD, EMPTY_CARD)
"""What can be paid with: how an order with one of them has to end is known to the audit."""

SOLD_OUT = "cd-sold-out"
UNITS_PER_ITEM = 1_000_000
STOCK: dict[str, int] = {f"cd-{n:02d}": UNITS_PER_ITEM for n in range(1, 21)} | {SOLD_OUT: 0}
"""Units on the shelf at the start; one item has none, so who came first never matters."""

DECLINED_PER_10_000 = 500
SOLD_OUT_PER_10_000 = 400
# Changing the salt changes which orders fail. With this one the first 20 orders already hold a
# decline and a stock-out.
_SALT = "trunkline-shop-1"

Ending = Literal["confirmed", "payment refused", "out of stock"]


class OrderDataError(ValueError):
    """A line of the data file that is no purchase."""


@dataclass(frozen=True, slots=True)
class Purchase:
    """One line of the data and what the example derives from it.

    Attributes:
        order_id: `cdnow-` and the line number, five digits, the first line is 1.
        customer_id: id in the master set, five digits.
        placed_on: day of the purchase.
        quantity: number of CDs, at least 1.
        amount_cents: value in cents, exact; 0 for eight real rows. Stripe refuses a charge of 0, so
            such an order counts as paid without one.
        sku: the item; `SOLD_OUT` for about 4 in 100 orders.
        card: a Stripe test card; one that is declined for about 5 in 100 orders.
        email: under example.com, which RFC 2606 reserves.
        phone: E.164; area code 555 is not assigned.
    """

    order_id: str
    customer_id: str
    placed_on: date
    quantity: int
    amount_cents: int
    sku: str
    card: str
    email: str
    phone: str

    @property
    def ending(self) -> Ending:
        """How this order has to end, whatever crashes on the way: the audit compares with this."""
        if self.card != GOOD_CARD and self.amount_cents > 0:
            return "payment refused"
        return "out of stock" if self.sku == SOLD_OUT else "confirmed"


def read_purchases(limit: int | None = None, *, path: Path = DATA) -> Iterator[Purchase]:
    """Yield the purchases in the order of the file.

    Args:
        limit: how many at most; None means all 6,919.
        path: another file of the same format.

    Raises:
        OrderDataError: a line is no purchase; the message names file and line.
    """
    with path.open(encoding="ascii") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and number > limit:
                return
            try:
                yield _purchase(number, line)
            except (ValueError, InvalidOperation) as error:
                message = (
                    f"{path.name}:{number} is no purchase: {line.rstrip()!r}; expected "
                    "'customer sample-customer YYYYMMDD quantity dollars.cents'"
                )
                raise OrderDataError(message) from error


def _purchase(number: int, line: str) -> Purchase:
    customer, _in_sample, day, quantity, dollars = line.split()
    order_id = f"cdnow-{number:05d}"
    return Purchase(
        order_id=order_id,
        customer_id=customer,
        placed_on=datetime.strptime(day, "%Y%m%d").date(),  # noqa: DTZ007 - a day, no zone
        quantity=_positive(quantity),
        amount_cents=_cents(dollars),
        sku=_sku(order_id),
        card=_card(order_id),
        email=f"customer{customer}@example.com",
        phone=f"+155501{int(customer):05d}",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        message = f"quantity {number} is below 1"
        raise ValueError(message)
    return number


def _cents(dollars: str) -> int:
    cents = Decimal(dollars) * 100
    if cents != cents.to_integral_value() or cents < 0:
        message = f"{dollars} is no amount in whole cents"
        raise ValueError(message)
    return int(cents)


def _card(order_id: str) -> str:
    draw = _draw("card", order_id)
    if draw >= DECLINED_PER_10_000:
        return GOOD_CARD
    return DECLINED_CARD if draw % 2 else EMPTY_CARD


def _sku(order_id: str) -> str:
    draw = _draw("item", order_id)
    return SOLD_OUT if draw < SOLD_OUT_PER_10_000 else f"cd-{draw % 20 + 1:02d}"


def _draw(purpose: str, order_id: str) -> int:
    """Return 0 to 9,999 from nothing but the arguments (`hash()` differs per process)."""
    digest = hashlib.sha256(f"{_SALT}/{purpose}/{order_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10_000
