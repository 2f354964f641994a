"""Each refusal at import and start says what docs/reference/errors.md shows.

A case is what a user wrote wrongly, after `PREAMBLE`; its code and full text must stand in the page.
"""

import asyncio
import contextlib
import re
import sqlite3
from pathlib import Path

import pytest

from trunkline import App, TrunklineError

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"

PREAMBLE = """
from datetime import UTC, datetime
from decimal import Decimal
from trunkline import *

orders = Stream("order-events", key="order_id")

@orders.event
class OrderPlaced(Struct):
    order_id: str

@orders.event
class OrderPaid(Struct):
    order_id: str

stock = Topic("stock-events")

@stock.event
class StockLow(Struct):
    sku: str

jobs = Queue("mail-jobs")

@jobs.command
class SendMail(Struct):
    to: str

class Undeclared(Struct):
    name: str

class Stripe: ...

payment = Service("payment")
mail = Service("mail")
"""

CASES = [
    # (code, what tells its cases apart, source)
    (
        "E101",
        "takes a class that is declared nowhere",
        "@payment.handle\nasync def charge(order: Undeclared) -> None: ...",
    ),
    (
        "E101",
        "takes something that is no class",
        "@payment.handle\nasync def charge(order: 'OrderPlaced | list[int]') -> None: ...",
    ),
    (
        "E102",
        "returns a class that is declared nowhere",
        "@payment.handle\nasync def charge(order: OrderPlaced) -> Undeclared: ...",
    ),
    (
        "E102",
        "returns something that is no class",
        "@payment.handle\nasync def charge(order: OrderPlaced) -> dict[str, str]: ...",
    ),
    (
        "E103",
        "two handlers for one type in one subscription",
        "@payment.handle\nasync def charge(order: OrderPlaced) -> None: ...\n"
        "@payment.handle\nasync def audit(order: OrderPlaced) -> None: ...",
    ),
    (
        "E103",
        "two services share a subscription",
        "@payment.handle\nasync def charge(order: OrderPlaced) -> None: ...\n"
        "@mail.handle(subscription='payment')\nasync def tell(order: OrderPaid) -> None: ...\n"
        "start(App(System('shop', [payment, mail]), 'memory:'))",
    ),
    (
        "E104",
        "two services handle one command",
        "@payment.handle\nasync def receipt(job: SendMail) -> None: ...\n"
        "@mail.handle\nasync def tell(job: SendMail) -> None: ...\n"
        "start(App(System('shop', [payment, mail]), 'memory:'))",
    ),
    (
        "E103",
        "two handlers for one command",
        "@mail.handle\nasync def receipt(job: SendMail) -> None: ...\n"
        "@mail.handle\nasync def tell(job: SendMail) -> None: ...",
    ),
    (
        "E104",
        "two subscriptions of one queue",
        "@mail.handle\nasync def receipt(job: SendMail) -> None: ...\n"
        "@mail.handle(subscription='second')\nasync def tell(job: SendMail) -> None: ...\n"
        "start(App(System('shop', [mail]), 'memory:'))",
    ),
    (
        "E104",
        "two services read one queue",
        "two = Queue('two-jobs')\n@two.command\nclass First(Struct): ...\n"
        "@two.command\nclass Second(Struct): ...\n"
        "@payment.handle\nasync def one(job: First) -> None: ...\n"
        "@mail.handle\nasync def other(job: Second) -> None: ...\n"
        "start(App(System('shop', [payment, mail]), 'memory:'))",
    ),
    (
        "E105",
        "messages that cause each other for ever",
        "@payment.handle\nasync def charge(order: OrderPlaced) -> OrderPaid: ...\n"
        "@mail.handle\nasync def tell(paid: OrderPaid) -> OrderPlaced: ...\n"
        "start(App(System('shop', [payment, mail]), 'memory:'))",
    ),
    ("E106", "a class declared on a second channel", "stock.event(OrderPlaced)"),
    ("E107", "an object that is no function", "payment.handle(Batch(size=5))"),
    ("E107", "no parameter", "@payment.handle\nasync def charge() -> None: ..."),
    ("E107", "message without a type", "@payment.handle\nasync def charge(order) -> None: ..."),
    (
        "E107",
        "another parameter without a type",
        "@payment.handle\nasync def charge(order: OrderPlaced, stripe) -> None: ...",
    ),
    ("E107", "`Message` without `from_=`", "@payment.handle\nasync def note(message: Message) -> None: ..."),
    ("E107", "a type that is not imported", "@payment.handle\nasync def charge(order: 'OrderPlacd') -> None: ..."),
    ("E107", "no return annotation", "@payment.handle\nasync def charge(order: OrderPlaced): ..."),
    (
        "E108",
        "a resource that nothing provides",
        "@payment.handle\nasync def charge(order: OrderPlaced, stripe: Stripe) -> None: ...\n"
        "start(App(payment, 'memory:'))",
    ),
    ("E108", "`override` of what is not provided", "payment.override(Stripe, Stripe)"),
    (
        "E109",
        "two classes under one type name",
        "@orders.event(type='order.placed')\nclass Other(Struct):\n    order_id: str",
    ),
    (
        "E109",
        "two channel objects of one name",
        "again = Topic('order-events')\n@again.event\nclass Other(Struct):\n    order_id: str\n"
        "@payment.handle\nasync def charge(order: OrderPlaced) -> Other | None: ...\n"
        "start(App(payment, 'memory:'))",
    ),
    ("E110", "a payload without the key field", "@orders.event\nclass OrderShipped(Struct):\n    parcel: str"),
    ("E111", "an upcaster on another channel", "stock.upcast(OrderPlaced, version=1)"),
    ("E111", "an upcaster from a version that is not older", "orders.upcast(OrderPlaced, version=1)"),
    (
        "E111",
        "a version that no upcaster leads on from",
        "@orders.event(version=3)\nclass OrderPriced(Struct):\n    order_id: str\n"
        "@orders.upcast(OrderPriced, version=1)\ndef _(old): return old\n"
        "@payment.handle\nasync def charge(order: OrderPriced) -> None: ...\n"
        "start(App(payment, 'memory:'))",
    ),
    ("E112", "a system without services", "System('shop', [])"),
    ("E112", "two services of one name", "System('shop', [payment, Service('payment')])"),
    ("E112", "a system of what is no service", "System('shop', ['payment'])"),
    ("E112", "an App of several services", "App([payment, mail], 'memory:')"),
    ("E112", "a service that is not in the system", "System('shop', [payment, mail]).only(['pay'])"),
    ("E113", "a name that some transport could not carry", "Queue('Mail Jobs')"),
    ("E114", "types of two channels", "@payment.handle\nasync def charge(event: OrderPlaced | StockLow) -> None: ..."),
    (
        "E114",
        "`list[T]` beside another handler",
        "@payment.handle\nasync def charge(orders: list[OrderPlaced]) -> None: ...\n"
        "@payment.handle\nasync def note(paid: OrderPaid) -> None: ...",
    ),
    (
        "E115",
        "retries longer than the inbox remembers",
        "@payment.handle(retry=Retry(delays_s=(86400.0,) * 7))\nasync def charge(order: OrderPlaced) -> None: ...\n"
        "start(App(payment, 'memory:'))",
    ),
    (
        "E119",
        "a type that names itself, declared in place",
        "@jobs.command\nclass Node(Struct):\n    children: 'list[Node]'",
    ),
    ("E119", "a class that is no payload", "jobs.command(type('Plain', (), {}))"),
    (
        "E119",
        "a field that JSON cannot carry",
        "@jobs.command\nclass Draw(Struct):\n    shape: OrderPlaced | OrderPaid",
    ),
    ("E120", "schema version below 1", "@orders.event(version=0)\nclass OrderShipped(Struct):\n    order_id: str"),
    ("E120", "no partitions, or over 1024", "Stream('order-log', partitions=0)"),
    ("E120", "negative numbers in `Retry`", "Retry(immediate=-1)"),
    ("E120", "numbers in `Breaker` that are not above 0", "Breaker(messages=0)"),
    ("E120", "`Breaker(on=…)` without a tuple of exceptions", "Breaker(on=OSError)"),
    ("E120", "an option that `handle` does not have", "payment.handle(retries=3)(lambda order: None)"),
    ("E120", "a number that must be positive", "payment.handle(concurrency=0)(lambda order: None)"),
    ("E120", "a negative wait", "payment.handle(batch=Batch(wait_s=-1))(lambda order: None)"),
    ("E120", "a word that is not a choice", "payment.handle(start='first')(lambda order: None)"),
    ("E120", "a time without a zone", "payment.handle(start=datetime(2026, 11, 1))(lambda order: None)"),
    (
        "E120",
        "a time that is still to come",
        "payment.handle(start=datetime(2999, 1, 1, tzinfo=UTC))(lambda order: None)",
    ),
    (
        "E120",
        "`start` on a Queue or Topic",
        "@payment.handle(start=datetime(2025, 11, 1, tzinfo=UTC))\nasync def note(stock: StockLow) -> None: ...",
    ),
    ("E201", "not a URL", "App(payment, 'shop.db')"),
    ("E202", "a transport or store that is not installed", "App(payment, 'pigeon://localhost')"),
    ("E203", "a file that is no database", "start(App(payment, 'sqlite:///notes.txt'))"),
    ("E204", "a file system without write-ahead logging", "start(App(payment, 'sqlite:///shop.db?vfs=unix-none'))"),
    ("E205", "a file of a newer release", "start(App(payment, 'sqlite:///newer.db'))"),
    ("E205", "a table of ours in another program's file", "start(App(payment, 'sqlite:///foreign.db'))"),
    ("E205", "another program's file that calls its layout as we do", "start(App(payment, 'sqlite:///other.db'))"),
    ("E206", "`sqlite:` without a file", "App(payment, 'sqlite:')"),
    ("E206", "`sqlite:` with two slashes", "App(payment, 'sqlite://shop.db')"),
    ("E206", "`sqlite:` with one slash", "App(payment, 'sqlite:/var/lib/shop.db')"),
    ("E206", "`sqlite:` for a database in memory", "App(payment, 'sqlite:///:memory:')"),
    ("E206", "a file name with a zero byte", "App(payment, 'sqlite:///x%00.db')"),
    ("E206", "a URL with a `#`", "App(payment, 'sqlite:///shop#1.db')"),
    (
        "E121",
        "a statement that the database refuses",
        "payment.schema('CREATE TABEL charge (order_id TEXT)')\nstart(App(payment, 'sqlite:///shop.db'))",
    ),
    ("E206", "`memory:` with more", "App(payment, 'memory:shop')"),
    (
        "E207",
        "a channel that exists otherwise",
        "@payment.handle\nasync def charge(order: OrderPlaced) -> None: ...\n"
        "start(App(payment, 'sqlite:///shop.db'))\n"
        "narrow = Stream('order-events', key='order_id', partitions=4)\n"
        "later = Service('later')\n"
        "@narrow.event\nclass OrderShipped(Struct):\n    order_id: str\n"
        "@later.handle\nasync def ship(order: OrderShipped) -> None: ...\n"
        "start(App(later, 'sqlite:///shop.db'))",
    ),
    (
        "E208",
        "a resource that cannot be opened",
        "def open_stripe(): raise ConnectionError('no route')\n"
        "payment.provide(Stripe, open_stripe)\nstart(App(payment, 'memory:'))",
    ),
    ("E209", "a lease that is no time", "start(App(payment, 'sqlite:///shop.db?lease_s=soon'))"),
    (
        "E220",
        "two Apps of one process read one subscription",
        "@payment.handle\nasync def charge(order: OrderPlaced) -> None: ...\n"
        "start(App(payment, 'sqlite:///shop.db'), App(payment, 'sqlite:///shop.db'))",
    ),
    (
        "E220",
        "two Apps of one process read one queue",
        "@payment.handle\nasync def deliver(job: SendMail) -> None: ...\n"
        "other = Service('other')\n@other.handle\nasync def deliver_too(job: SendMail) -> None: ...\n"
        "start(App(payment, 'sqlite:///shop.db'), App(other, 'sqlite:///shop.db'))",
    ),
    ("E225", "a folder that is missing", "start(App(payment, 'sqlite:///missing/shop.db'))"),
    ("E225", "a file where the folder should be", "start(App(payment, 'sqlite:///notes.txt/shop.db'))"),
    ("E225", "a name that is too long", "start(App(payment, 'sqlite:///' + 'x' * 300 + '.db'))"),
    ("E227", "an option that a URL does not have", "start(App(payment, 'sqlite:///shop.db?lease=30'))"),
    ("E228", "a VFS that is not registered", "start(App(payment, 'sqlite:///shop.db?vfs=nope'))"),
    ("E225", "a directory in place of the file", "start(App(payment, 'sqlite:///data'))"),
    ("E501", "a file that cannot be opened", "start(App(payment, 'sqlite:///loop.db'))"),
]


async def _start_and_stop(*apps):
    async with contextlib.AsyncExitStack() as started:
        for app in apps:
            await started.enter_async_context(app)


def refusal(source):
    """Return the error that `source` ends with; `start(app, ...)` in it starts and stops Apps."""
    space = {"__name__": "shop", "start": lambda *apps: asyncio.run(_start_and_stop(*apps))}
    exec(PREAMBLE, space)
    with pytest.raises(TrunklineError) as caught:
        exec(source, space)
    return caught.value


def shown(text):
    """Return a text as the page has it: in one table cell, in backticks, without the path of the folder."""
    return text.replace(f"{Path.cwd()}/", "").replace("|", "\\|").replace("`", "'")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("Not a database, but long enough to be looked at as if it were one. " * 20, "utf-8")
    Path("data").mkdir()
    Path("loop.db").symlink_to("loop.db")
    newer = sqlite3.connect("newer.db")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    for name, statements in (
        ("foreign.db", "CREATE TABLE trunkline_log (line TEXT)"),
        ("other.db", "CREATE TABLE notes (line TEXT); PRAGMA user_version = 2"),
    ):
        other = sqlite3.connect(name)
        other.executescript(statements)
        other.close()


@pytest.mark.parametrize(("code", "which", "source"), CASES, ids=[f"{code} {which}" for code, which, _ in CASES])
def test_a_wrong_declaration_is_refused_with_the_text_in_the_docs(code, which, source):
    error = refusal(source)
    assert error.code == code
    assert f"`{shown(str(error))}`" in PAGE.read_text(encoding="utf-8")


def test_the_table_shows_nothing_that_no_case_produces():
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition("## Checks at import and start")[2].partition("\n## ")[0]
    texts = re.findall(r"^\|[^\n]*\| `(E\d{3}[^\n]*)` \|", table, re.MULTILINE)
    assert sorted(texts) == sorted({shown(str(refusal(source))) for _, _, source in CASES})


def test_a_refused_start_leaves_nothing_running(tmp_path):
    with pytest.raises(TrunklineError):
        asyncio.run(_start_and_stop(App(_with_missing_resource(), "sqlite:///refused.db")))
    assert not list(tmp_path.glob("refused.db*"))


def _with_missing_resource():
    space = {"__name__": "shop"}
    exec(PREAMBLE, space)
    exec("@payment.handle\nasync def charge(order: OrderPlaced, stripe: Stripe) -> None: ...", space)
    return space["payment"]
