"""The shop, simulated: real orders, stand-ins for Stripe, Twilio and mail in plain classes, and the audit.

    trunkline simulate examples.shop.simulation:simulation --crash-sweep

The services are those that are deployed; what is outside of them is replaced, and their web server left out: orders
come in through `place`, which it calls too.
Invariant: the audit of `make demo` judges every run. Which orders a run places follows from its seed.
Read next: audit.py; payment.py and notification.py, which call what stands here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from datetime import datetime
from functools import cache
from typing import Any

from examples.shop.audit import Ending, Evidence, checks
from examples.shop.clients.mail import Mail
from examples.shop.clients.stripe import SMALLEST_CENTS, Charges, Declined
from examples.shop.clients.twilio import CLOCK_MARGIN, Sms
from examples.shop.order import NewOrder, place, site
from examples.shop.orders import STOCK, Purchase, read_purchases
from examples.shop.standins.stripe import CARDS
from examples.shop.system import system
from trunkline.testing.simulator import Client, Simulation, View

ORDERS = 5
"""How many a run places: one that is refused, one that is sold out, one in three runs a free one, and others."""
FREE_ONE_IN = 3


class Stripe:
    """What `Charges` reaches: a card is charged once per idempotency key, a charge refunded once.

    Attributes:
        charges: one (order, cents, `succeeded` or `declined`, id) for each time that a card was asked.
        refunds: one (charge id, cents, id) for each.
        replays: how often a request came again.
    """

    def __init__(self) -> None:
        self.charges: list[tuple[str, int, str, str]] = []
        self.refunds: list[tuple[str, int, str]] = []
        self.replays = 0
        self._saved: dict[str, tuple[tuple[Any, ...], str | Declined]] = {}

    def charge(self, order_id: str, amount_cents: int, card: str, idempotency_key: str) -> str:
        """See Charges.

        Raises: Declined; ValueError for what Stripe refuses: too small an amount, a key used for another request.
        """
        if amount_cents < SMALLEST_CENTS:
            raise ValueError(f"order {order_id}: {amount_cents} cents are less than {SMALLEST_CENTS}")
        answer = self._again(idempotency_key, ("charge", order_id, amount_cents, card))
        if answer is None:
            name, decline = f"pi_{len(self.charges) + 1}", CARDS[card]
            self.charges.append((order_id, amount_cents, "declined" if decline else "succeeded", name))
            answer = Declined(decline.decline_code, decline.message) if decline else name
            self._saved[idempotency_key] = ("charge", order_id, amount_cents, card), answer
        if isinstance(answer, Declined):
            raise Declined(answer.code, str(answer))
        return answer

    def refund(self, charge_id: str, idempotency_key: str) -> str:
        """See Charges: what was refunded under another key is looked up."""
        answer = self._again(idempotency_key, ("refund", charge_id))
        if answer is None:
            (cents,) = [cents for _, cents, status, name in self.charges if (status, name) == ("succeeded", charge_id)]
            answer = next((name for charge, _, name in self.refunds if charge == charge_id), None)
            if answer is None:
                answer = f"re_{len(self.refunds) + 1}"
                self.refunds.append((charge_id, cents, answer))
            self._saved[idempotency_key] = ("refund", charge_id), answer
        return str(answer)

    def _again(self, key: str, request: tuple[Any, ...]) -> str | Declined | None:
        """Return the saved answer to a request that came before."""
        saved = self._saved.get(key)
        if saved is None:
            return None
        if saved[0] != request:
            raise ValueError(f"idempotency key {key} was used for {saved[0]}, now for {request}")
        self.replays += 1
        return saved[1]


class MailServer:
    """What `Mail` reaches: two mails with one Message-ID are shown as one.

    Attributes:
        mails: Message-ID → (recipient, subject). repeated: how often one came again.
    """

    def __init__(self) -> None:
        self.mails: dict[str, tuple[str, str]] = {}
        self.repeated = 0

    def send(self, *, message_id: str, to: str, subject: str, text: str) -> str:  # noqa: ARG002 - as Mail.send
        """See Mail."""
        full_id = f"<{message_id}@example.com>"
        self.repeated += full_id in self.mails
        self.mails.setdefault(full_id, (to, subject))
        return full_id


class Twilio:
    """What `Sms` reaches: whatever is sent is sent, as often as it is asked for; what was sent can be looked up.

    `send` asks the list and sends in one step. The real client does so in two, and promises nothing for an earlier
    request that is still under way between them: see clients/twilio.py.

    Attributes:
        texts: one (number, text, sid) for each SMS.
    """

    def __init__(self) -> None:
        self.texts: list[tuple[str, str, str]] = []
        self._sent_at: list[float] = []

    def send(self, *, to: str, text: str, reference: str, since: datetime, may_have_been_sent: bool) -> str:
        """See Sms."""
        if may_have_been_sent:
            oldest = (since - CLOCK_MARGIN).timestamp()
            for (number, body, sid), at in zip(self.texts, self._sent_at, strict=True):
                if number == to and at >= oldest and body.endswith(f"[{reference}]"):
                    return sid
        self.texts.append((to, f"{text} [{reference}]", f"SM{len(self.texts) + 1}"))
        self._sent_at.append(time.time())
        return self.texts[-1][2]


# --- what customers do ---


@cache
def by_ending() -> dict[Ending, list[Purchase]]:
    """Return the real orders that cost something, by how they have to end."""
    found: defaultdict[Ending, list[Purchase]] = defaultdict(list)
    for purchase in read_purchases():
        if purchase.amount_cents:
            found[purchase.ending].append(purchase)
    return found


@cache
def free() -> list[Purchase]:
    """Return the real orders of 0.00."""
    return [purchase for purchase in read_purchases() if not purchase.amount_cents]


def chosen(random: Any) -> list[Purchase]:
    """Return what one run places: of each ending at least one."""
    orders = by_ending()
    some = [random.choice(orders["payment refused"]), random.choice(orders["out of stock"])]
    if random.randrange(FREE_ONE_IN) == 0:
        some.append(random.choice(free()))
    some += random.sample(orders["confirmed"], ORDERS - len(some))
    random.shuffle(some)
    return some


async def customers(sim: Client) -> None:
    """Place some orders one after the other, and the others at the same time."""
    answered: list[str] = []

    def audited(view: View) -> None:
        wrong = [f"{check.name}: {text}" for check in checks(evidence(view, answered)) for text in check.wrong]
        assert not wrong, "; ".join(wrong)  # noqa: S101 - what a check of the simulator does

    async def order(purchase: Purchase) -> None:
        await sim.request("order", place, new_order(purchase))
        answered.append(purchase.order_id)

    sim.eventually(audited)
    orders = chosen(sim.random)
    alone = sim.random.randrange(len(orders))
    for purchase in orders[:alone]:
        await order(purchase)
    await asyncio.gather(*map(order, orders[alone:]))


def new_order(purchase: Purchase) -> NewOrder:
    """Return what a customer sends."""
    return NewOrder(
        purchase.order_id, purchase.customer_id, purchase.sku, purchase.quantity, purchase.amount_cents,
        purchase.card, purchase.email, purchase.phone,
    )  # fmt: skip


# --- what must hold ---


def evidence(view: View, answered: list[str]) -> Evidence:
    """Read what audit.py reads: the services' tables and the ledgers outside.

    Dead letters and the databases themselves are the simulator's to check.
    """
    stripe, mail, twilio = view.outside(Charges), view.outside(Mail), view.outside(Sms)
    order_of = {name: order_id for order_id, _, _, name in stripe.charges}
    orders = view.rows(
        "order",
        "SELECT order_id, customer_id, sku, quantity, amount_cents, card, email, phone, status, reason FROM shop_order",
    )
    return Evidence(
        placed=list(answered),
        orders={row[0]: row for row in orders},
        payments=view.rows("payment", "SELECT order_id, amount_cents, status, charge_id, refund_id FROM payment"),
        reservations=view.rows("inventory", "SELECT order_id, sku, quantity FROM reservation"),
        shelf=dict(view.rows("inventory", "SELECT sku, units FROM stock")),  # type: ignore[arg-type]
        history=view.rows("notification", "SELECT order_id, event FROM history"),
        receipts=view.rows("notification", "SELECT order_id, kind, receipt FROM notification"),
        dead_letters=[],
        integrity="ok",
        charges=list(stripe.charges),
        refunds=[(order_of[charge], cents, name, charge) for charge, cents, name in stripe.refunds],
        mails=[(to, subject, message_id) for message_id, (to, subject) in mail.mails.items()],
        texts=list(twilio.texts),
        replays=stripe.replays,
        repeated_mails=mail.repeated,
    )


def never_more_than_ordered(view: View) -> None:
    """No moment at which more is captured for an order than it costs, or more refunded than captured."""
    stripe = view.outside(Charges)
    taken: Counter[str] = Counter()
    order_of: dict[str, str] = {}
    for order_id, cents, status, name in stripe.charges:
        order_of[name] = order_id
        taken[order_id] += cents if status == "succeeded" else 0
    if taken:
        cost = dict(view.rows("order", "SELECT order_id, amount_cents FROM shop_order"))
        over = {order_id: cents for order_id, cents in taken.items() if cents > cost.get(order_id, 0)}
        assert not over, f"captured beyond what was ordered: {over}"  # noqa: S101 - as above
    for charge, cents, _ in stripe.refunds:
        taken[order_of[charge]] -= cents
    assert min(taken.values(), default=0) >= 0, f"refunded beyond what was captured: {taken}"  # noqa: S101 - as above


def shelf_as_reserved(view: View) -> None:
    """No moment at which the units off the shelf are others than those reserved."""
    off = view.rows(
        "inventory",
        "SELECT sku, units, (SELECT coalesce(sum(quantity), 0) FROM reservation r WHERE r.sku = s.sku) FROM stock s",
    )
    wrong = [row for row in off if row[1] < 0 or row[1] + row[2] != STOCK[row[0]]]
    assert not wrong, f"item, units on the shelf, units reserved: {wrong}"  # noqa: S101 - as above


def no_sale_without_money(view: View) -> None:
    """No moment at which an order is confirmed and its money not there, or its goods not reserved."""
    confirmed = view.rows("order", "SELECT order_id, amount_cents FROM shop_order WHERE status = 'confirmed'")
    if confirmed:
        paid = {order_id for order_id, _, status, _ in view.outside(Charges).charges if status == "succeeded"}
        set_aside = {order_id for (order_id,) in view.rows("inventory", "SELECT order_id FROM reservation")}
        unpaid = [order_id for order_id, cents in confirmed if cents and order_id not in paid]
        bare = [order_id for order_id, _ in confirmed if order_id not in set_aside]
        assert not unpaid + bare, f"confirmed, but not paid: {unpaid}, or not reserved: {bare}"  # noqa: S101 - as above


simulation = Simulation(
    system,
    customers,
    override={Charges: Stripe, Mail: MailServer, Sms: Twilio},
    leave_out=[site],
    always=[never_more_than_ordered, shelf_as_reserved, no_sale_without_money],
)
