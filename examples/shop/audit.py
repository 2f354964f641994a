"""The audit: do the databases and the ledgers hold what was ordered, all of it and nothing twice?

Read are the services' own tables, the ledgers of Stripe, Twilio and the mail server, and the list of
orders that the customers got an answer for; what has to be there follows from the real orders alone.
Of Trunkline's tables only the dead letters are counted.
Invariant: every check says what was expected and what was found; nothing to check is a failure.
Never does: write. The services must have stopped. Read next: orders.py, `Purchase.ending`.

Alone: `python -m examples.shop.audit FOLDER`; the exit code is 1 when anything is off.
"""

from __future__ import annotations

import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import apsw
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.shop.orders import STOCK, Ending, Purchase, read_purchases

PLACED = "placed.txt"
"""Ids of the orders that the customers got an answer for, one per line."""
DATABASE = "shop.db"
FROM_THE_PAGE = "web-"
"""Orders of the page are not in the data; what they have to become follows from the order itself."""
FREE = "orders of $0.00, nothing to charge"
SHOWN_WRONGS = 4

CONFIRMED: Ending = "confirmed"
REFUSED: Ending = "payment refused"
SOLD_OUT: Ending = "out of stock"

_EVENTS: dict[Ending, tuple[str, ...]] = {
    CONFIRMED: ("order.created", "payment.succeeded", "stock.reserved", "order.confirmed"),
    REFUSED: ("order.created", "payment.failed", "order.cancelled"),
    SOLD_OUT: ("order.created", "payment.succeeded", "stock.refused", "payment.refunded", "order.cancelled"),
}

Row = tuple[Any, ...]


class AuditError(Exception):
    """There is nothing to audit; the text says what is missing."""


@dataclass
class Check:
    """One line of the audit.

    Attributes:
        wrong: what is off, one entry each; empty when the check holds.
    """

    name: str
    expected: str
    found: str
    wrong: list[str] = field(default_factory=list)


@dataclass
class Evidence:
    """Everything that was read, and the orders it has to agree with."""

    placed: list[str]
    orders: dict[str, Row]
    payments: list[Row]
    reservations: list[Row]
    shelf: dict[str, int]
    history: list[Row]
    receipts: list[Row]
    dead_letters: list[Row]
    integrity: str
    charges: list[Row]
    refunds: list[Row]
    mails: list[Row]
    texts: list[Row]
    replays: int
    repeated_mails: int

    def __post_init__(self) -> None:
        data = _purchases()
        self.unplaced = [name for name in self.orders if name not in self.placed and not name.startswith(FROM_THE_PAGE)]
        self.unknown = [name for name in self.placed if name not in data and not name.startswith(FROM_THE_PAGE)]
        self.wanted: dict[str, Purchase] = {name: data[name] for name in self.placed if name in data}
        for name, row in self.orders.items():
            if name.startswith(FROM_THE_PAGE):
                self.wanted[name] = _purchase(name, row)

    def ending(self, *endings: Ending) -> list[Purchase]:
        """Return the orders that have to end so."""
        return [purchase for purchase in self.wanted.values() if purchase.ending in endings]


@cache
def _purchases() -> dict[str, Purchase]:
    return {purchase.order_id: purchase for purchase in read_purchases()}


def _purchase(name: str, row: Row) -> Purchase:
    _, customer, sku, quantity, cents, card, email, phone = row[:8]
    return Purchase(name, customer, datetime.now(UTC).date(), quantity, cents, sku, card, email, phone)


# --- reading ---


def read(folder: Path) -> Evidence:
    """Read everything there is.

    Raises: AuditError if a file is missing or no database.
    """
    placed = _file(folder / PLACED).read_text("ascii").split()
    # The SQLite that the services use, so that the two agree about the file's locks.
    with closing(_opened(folder / DATABASE)) as shop:
        orders = shop.execute(
            "SELECT order_id, customer_id, sku, quantity, amount_cents, card, email, phone, status, reason"
            " FROM shop_order"
        ).fetchall()
        evidence = {
            "orders": {row[0]: row for row in orders},
            "payments": shop.execute(
                "SELECT order_id, amount_cents, status, charge_id, refund_id FROM payment"
            ).fetchall(),
            "reservations": shop.execute("SELECT order_id, sku, quantity FROM reservation").fetchall(),
            "shelf": dict[str, int](shop.execute("SELECT sku, units FROM stock").fetchall()),
            "history": shop.execute("SELECT order_id, event FROM history").fetchall(),
            "receipts": shop.execute("SELECT order_id, kind, receipt FROM notification").fetchall(),
            "dead_letters": shop.execute("SELECT type, key, code, reason FROM trunkline_dead_letter").fetchall(),
            "integrity": shop.execute("PRAGMA integrity_check").fetchall()[0][0],
        }
    with closing(_ledger(folder / "stripe-ledger.db")) as stripe:
        evidence["charges"] = stripe.execute(
            "SELECT order_id, amount_cents, status, payment_intent FROM charge"
        ).fetchall()
        evidence["refunds"] = stripe.execute(
            "SELECT c.order_id, r.amount_cents, r.refund, r.payment_intent FROM refund r"
            " LEFT JOIN charge c USING (payment_intent)"
        ).fetchall()
        evidence["replays"] = stripe.execute("SELECT coalesce(sum(replays), 0) FROM idempotency").fetchone()[0]
    with closing(_ledger(folder / "smtp-ledger.db")) as smtp:
        # What the customers see: mail systems show one mail per Message-ID.
        evidence["mails"] = smtp.execute(
            "SELECT d.recipient, d.subject, d.message_id FROM mailbox m JOIN delivery d ON d.number = m.delivery"
        ).fetchall()
        evidence["repeated_mails"] = (
            smtp.execute("SELECT count(*) FROM delivery").fetchone()[0] - len(evidence["mails"])  # type: ignore[arg-type]
        )
    with closing(_ledger(folder / "twilio-ledger.db")) as twilio:
        evidence["texts"] = twilio.execute("SELECT to_number, body, sid FROM message").fetchall()
    return Evidence(placed=placed, **evidence)  # type: ignore[arg-type]


def _file(path: Path) -> Path:
    if not path.is_file():
        raise AuditError(f"there is no {path}; run 'make demo' first, or name its folder")
    return path


def _opened(path: Path) -> apsw.Connection:
    return apsw.Connection(str(_file(path)), flags=apsw.SQLITE_OPEN_READONLY)


def _ledger(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{_file(path)}?mode=ro", uri=True)


# --- checking ---


def checks(seen: Evidence) -> list[Check]:
    """Return every check, held or not."""
    return [*_orders(seen), *_money(seen), *_goods(seen), *_messages(seen), *_engine(seen)]


def _orders(seen: Evidence) -> list[Check]:
    lost = [name for name in seen.placed if name not in seen.orders]
    answered = Check(
        "orders that customers got an answer for, kept", _n(len(seen.placed)), _n(len(seen.placed) - len(lost))
    )
    answered.wrong = [f"{name} is lost" for name in lost] + [f"{name} is not in the data" for name in seen.unknown]
    if not seen.placed:
        answered.expected = "1 or more"
        answered.wrong.append("no order was placed, so nothing is shown")
    doubles = [name for name, times in Counter(seen.placed).items() if times > 1]
    strange = [f"{name} was never placed" for name in seen.unplaced] + [f"{name} is listed twice" for name in doubles]
    kept = {name: row[:8] for name, row in seen.orders.items()}
    asked = {
        p.order_id: (p.order_id, p.customer_id, p.sku, p.quantity, p.amount_cents, p.card, p.email, p.phone)
        for p in seen.wanted.values()
    }
    is_open = [name for name, row in seen.orders.items() if row[8] not in ("confirmed", "cancelled")]
    return [
        answered,
        Check("orders that nobody placed", "0", _n(len(strange)), strange),
        _same("orders as they were placed, to the cent", asked.values(), kept.values()),
        Check("orders under way", "0", _n(len(is_open)), [f"{name} is {seen.orders[name][8]}" for name in is_open]),
        *(_ended(seen, ending) for ending in (CONFIRMED, REFUSED, SOLD_OUT)),
    ]


def _ended(seen: Evidence, ending: Ending) -> Check:
    label = ending if ending == CONFIRMED else f"cancelled: {ending}"
    status = ("confirmed", None) if ending == CONFIRMED else ("cancelled", ending)
    found = [name for name, row in seen.orders.items() if row[8:10] == status]
    return _same(f"orders {label}", [p.order_id for p in seen.ending(ending)], found)


def _money(seen: Evidence) -> list[Check]:
    charged = [(p.order_id, dollars(p.amount_cents)) for p in seen.ending(CONFIRMED, SOLD_OUT) if p.amount_cents]
    back = [(p.order_id, dollars(p.amount_cents)) for p in seen.ending(SOLD_OUT) if p.amount_cents]
    refused = [p.order_id for p in seen.ending(REFUSED)]
    captured = [row for row in seen.charges if row[2] == "succeeded"]
    balance: defaultdict[str, int] = defaultdict(int)
    for order_id, cents, *_ in captured:
        balance[str(order_id)] += cents
    for order_id, cents, *_ in seen.refunds:
        balance[str(order_id)] -= cents
    kept = [(name, dollars(cents)) for name, cents in balance.items() if cents]
    good = [(p.order_id, dollars(p.amount_cents)) for p in seen.ending(CONFIRMED) if p.amount_cents]
    sold, took = sum(p.amount_cents for p in seen.ending(CONFIRMED)), sum(balance.values())
    total = Check("dollars captured less refunded, as confirmed", dollars(sold), dollars(took))
    if sold != took:
        total.wrong.append(f"off by {dollars(took - sold)}")
    return [
        _same("charges captured, one per order", charged, [(row[0], dollars(row[1])) for row in captured]),
        _same("charges refused, one per order", refused, [row[0] for row in seen.charges if row[2] == "declined"]),
        _same(FREE, [p.order_id for p in seen.wanted.values() if not p.amount_cents], _without_charge(seen)),
        _same("refunds of the full amount", back, [(row[0], dollars(row[1])) for row in seen.refunds]),
        _same("orders with money kept", good, kept),
        total,
        _books(seen),
    ]


def _without_charge(seen: Evidence) -> list[str]:
    """Orders that Stripe was never asked about, and that nobody has to pay for."""
    asked = {row[0] for row in seen.charges}
    return [name for name, row in seen.orders.items() if name not in asked and not row[4]]


def _books(seen: Evidence) -> Check:
    """The payment service's own table against Stripe's ledger."""
    status: dict[Ending, str] = {CONFIRMED: "paid", REFUSED: "refused", SOLD_OUT: "refunded"}
    charge = {row[0]: row[3] for row in seen.charges if row[2] == "succeeded"}
    refund = {row[0]: row[2] for row in seen.refunds}
    expected = [
        (p.order_id, p.amount_cents, status[p.ending], charge.get(p.order_id), refund.get(p.order_id))
        for p in seen.wanted.values()
    ]
    return _same("payments in the books, with Stripe's ids", expected, seen.payments)


def _goods(seen: Evidence) -> list[Check]:
    confirmed = seen.ending(CONFIRMED)
    taken: Counter[str] = Counter()
    for purchase in confirmed:
        taken[purchase.sku] += purchase.quantity
    gone = Counter({sku: units - seen.shelf.get(sku, 0) for sku, units in STOCK.items()})
    shelf = Check("units off the shelf", _n(taken.total()), _n(gone.total()))
    shelf.wrong = [f"{sku}: {gone[sku]} gone, {taken[sku]} sold" for sku in STOCK if gone[sku] != taken[sku]]
    return [
        _same("reservations, one per order", [(p.order_id, p.sku, p.quantity) for p in confirmed], seen.reservations),
        shelf,
    ]


def _messages(seen: Evidence) -> list[Check]:
    def subject(purchase: Purchase) -> str:
        return f"Order {purchase.order_id} is {'confirmed' if purchase.ending == CONFIRMED else 'cancelled'}"

    wanted = seen.wanted.values()
    sent = [(to, body.rpartition(" [")[0]) for to, body, _ in seen.texts]
    by_receipt = {("mail", message_id): subject for _, subject, message_id in seen.mails}
    by_receipt |= {("sms", sid): body.partition(".")[0] for _, body, sid in seen.texts}
    noted = [
        (name, kind, by_receipt.get((kind, receipt), f"no {kind} {receipt}")) for name, kind, receipt in seen.receipts
    ]
    events = [(p.order_id, event) for p in wanted for event in _EVENTS[p.ending]]
    return [
        _same("mails, one per order", [(p.email, subject(p)) for p in wanted], [row[:2] for row in seen.mails]),
        _same("SMS, one per order", [(p.phone, f"{subject(p)}.") for p in wanted], sent),
        _same("receipts of both", [(p.order_id, kind, subject(p)) for p in wanted for kind in ("mail", "sms")], noted),
        _same("events in the orders' histories", events, seen.history),
    ]


def _engine(seen: Evidence) -> list[Check]:
    dead = [f"{kind} of {key}: {code} {reason}" for kind, key, code, reason in seen.dead_letters]
    integrity = [] if seen.integrity == "ok" else [seen.integrity]
    return [
        Check("dead letters", "0", _n(len(dead)), dead),
        Check("integrity of the database", "ok", str(seen.integrity), integrity),
    ]


def _same(name: str, expected: Iterable[Hashable], found: Iterable[Hashable]) -> Check:
    """Compare as often as each occurs: one too few is lost, one too many was done twice."""
    wanted, there = Counter(expected), Counter(found)
    wrong = [f"missing: {_text(item)}" + _times(n) for item, n in (wanted - there).items()]
    wrong += [f"too many: {_text(item)}" + _times(n) for item, n in (there - wanted).items()]
    return Check(name, _n(wanted.total()), _n(there.total()), wrong)


def _text(item: Hashable) -> str:
    return " ".join(str(part) for part in item) if isinstance(item, tuple) else str(item)


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def _n(count: int) -> str:
    return f"{count:,}"


def dollars(cents: int) -> str:
    """Return an amount for people.

    >>> dollars(-123456)
    '-$1,234.56'
    """
    return f"{'-' if cents < 0 else ''}${abs(cents) // 100:,}.{abs(cents) % 100:02d}"


def sums(seen: Evidence) -> list[str]:
    """Return how the counts that were found go together.

    They differ by the orders of $0.00: Stripe is not asked about these.
    """
    status = Counter(row[2] for row in seen.charges)
    ended = Counter(row[9] or row[8] for row in seen.orders.values())
    free = [seen.orders[name] for name in _without_charge(seen)]
    sold_free = sum(row[8] == "confirmed" for row in free)
    captured, refunded = status["succeeded"], len(seen.refunds)
    orders, kept = (len(seen.orders), "orders"), (captured - refunded, "with money kept")
    return [
        _sum(orders, (ended[CONFIRMED], CONFIRMED), (ended[REFUSED], REFUSED), (ended[SOLD_OUT], SOLD_OUT)),
        _sum(orders, (captured, "charges captured"), (status["declined"], "refused"), (len(free), "of $0.00")),
        _sum((captured, "charges captured"), kept, (refunded, "refunded")),
        _sum((ended[CONFIRMED], CONFIRMED), kept, (sold_free, "of $0.00")),
    ]


def _sum(whole: tuple[int, str], *parts: tuple[int, str]) -> str:
    return f"{_n(whole[0])} {whole[1]} = " + " + ".join(f"{_n(count)} {what}" for count, what in parts)


# --- showing ---


def audit(folder: Path, console: Console) -> bool:
    """Audit what is in `folder`, print every check and a verdict; return whether all hold.

    Raises: AuditError.
    """
    seen = read(folder)
    done = checks(seen)
    table = Table(title="Audit", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("expected", justify="right", no_wrap=True)
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for check in done:
        table.add_row(check.name, check.expected, check.found, "[red]✗[/]" if check.wrong else "[green]✓[/]")
    console.print(table)
    for check in done:
        for wrong in check.wrong[:SHOWN_WRONGS]:
            console.print(f"[red]✗[/] {escape(f'{check.name}: {wrong}')}", soft_wrap=True)
        if len(check.wrong) > SHOWN_WRONGS:
            console.print(f"  … and {len(check.wrong) - SHOWN_WRONGS} more")
    console.print(
        f"Repeated after a crash, without effect: {_n(seen.replays)} requests to Stripe (same idempotency key),"
        f" {_n(seen.repeated_mails)} mails (same Message-ID).",
        soft_wrap=True,
        highlight=False,
    )
    failed = [check for check in done if check.wrong]
    for line in () if failed else sums(seen):
        console.print(line, soft_wrap=True, highlight=False)
    if failed:
        console.print(
            f"[bold red]The audit failed:[/] {len(failed)} of {len(done)} checks do not hold.", highlight=False
        )
    else:
        console.print(
            f"[bold green]The audit holds:[/] {_n(len(seen.wanted))} orders, nothing lost, nothing twice,"
            f" {len(done)} checks.",
            highlight=False,
        )
    return not failed


def main(arguments: list[str]) -> int:
    """Audit the folder named on the command line; return the exit code."""
    console = Console()
    if len(arguments) != 1:
        console.print("usage: python -m examples.shop.audit FOLDER", style="red")
        return 2
    try:
        return 0 if audit(Path(arguments[0]), console) else 1
    except (AuditError, apsw.Error, sqlite3.Error) as error:
        console.print(f"The audit failed: {escape(str(error))}", style="bold red", soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
