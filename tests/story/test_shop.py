"""The shop, told from outside: real processes, real orders, kill -9, and an audit that can fail."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import apsw
import httpx
import msgspec
import pytest
from rich.console import Console

from examples.shop import audit as auditing
from examples.shop.audit import PLACED, audit, read
from examples.shop.contracts import OrderCreated
from examples.shop.demo import Book, Figures
from examples.shop.order import NewOrder, order
from examples.shop.orders import CARDS, GOOD_CARD, SOLD_OUT, STOCK, Purchase, read_purchases
from examples.shop.payment import payment
from examples.shop.processes import DATABASE, ROOT, Child, Processes
from trunkline import App

# One process runs the good run once for all tests of this file.
pytestmark = [pytest.mark.xdist_group("shop"), pytest.mark.timeout(240)]

ORDERS = 48


def demo(folder: Path, *options: str, orders: int = ORDERS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.shop.demo", "--orders", str(orders), "--folder", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of the demo that went well: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("shop") / "demo"
    done = demo(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture
def good(run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the good run's files, to be spoilt."""
    copy = tmp_path / "copy"
    shutil.copytree(run[0], copy)
    return copy


def audited(folder: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    holds = audit(folder, console)
    assert isinstance(console.file, io.StringIO)
    return holds, console.file.getvalue()


# --- the demo ---


def test_every_order_ends_rightly_though_each_service_is_killed(run):
    _, printed = run
    assert printed.count("kill -9") == 2
    assert "with 4 kills; all services stopped" in printed
    assert f"The audit holds: {ORDERS} orders, nothing lost, nothing twice" in printed


def test_the_orders_of_the_demo_hold_every_ending(run):
    seen = read(run[0])
    assert len(seen.wanted) == ORDERS
    assert all(seen.ending(ending) for ending in ("confirmed", "payment refused", "out of stock"))


def test_the_audit_holds_when_run_alone(run):
    command = [sys.executable, "-m", "examples.shop.audit", str(run[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The audit holds" in done.stdout


def test_the_demo_leaves_other_peoples_folders_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not delete")
    done = demo(tmp_path)
    assert done.returncode == 1
    assert "holds other things" in done.stdout
    assert (tmp_path / "thesis.txt").exists()


def test_the_shop_stays_open_when_asked_to(tmp_path):
    command = [
        sys.executable,
        "-m",
        "examples.shop.demo",
        "--orders",
        "20",
        "--folder",
        str(tmp_path / "demo"),
        "--keep",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if line.startswith("The shop is open again"))
            url = line.split("again: ")[1].split()[0]
            assert b"Trunkline shop" in answered(url).content
            placed = new_order("web-after-the-audit")
            reply = httpx.post(f"{url}/orders", json=msgspec.to_builtins(placed), trust_env=False)
            assert reply.status_code == 201
            ended = until(
                lambda: httpx.get(f"{url}/orders/{placed.order_id}", trust_env=False).json()["status"], "confirmed"
            )
            assert ended == "confirmed"
            # What is still on its way when the shop closes waits for the next opening: let its story end first.
            database = tmp_path / "demo" / DATABASE
            assert until(lambda: told(database, placed.order_id), (4, 2)) == (4, 2)
        finally:
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
        assert process.wait(60) == 0, rest
    # The order of the page is audited too, by what it says itself.
    holds, printed = audited(tmp_path / "demo")
    assert holds, printed
    assert "21 orders" in printed


def answered(url: str) -> httpx.Response:
    end = time.monotonic() + 30
    while True:
        try:
            return httpx.get(url, trust_env=False)
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def told(database: Path, order_id: str) -> tuple[int, int]:
    """Events in the order's history, and receipts of its mail and SMS, as a read-only look finds them."""
    with closing(apsw.Connection(str(database), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        connection.set_busy_timeout(5000)
        counts = "SELECT (SELECT count(*) FROM history WHERE order_id = ?1),"
        counts += " (SELECT count(*) FROM notification WHERE order_id = ?1)"
        ((events, receipts),) = connection.execute(counts, (order_id,)).fetchall()
        return events, receipts


def until(look, wanted, limit_s=30):
    end = time.monotonic() + limit_s
    while (found := look()) != wanted and time.monotonic() < end:
        time.sleep(0.05)
    return found


FREE_ORDER = next(purchase for purchase in read_purchases() if not purchase.amount_cents)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all services in one process: twenty orders and one of $0.00."""
    folder = tmp_path_factory.mktemp("system")
    purchases = [*read_purchases(20), FREE_ORDER]
    with Processes(folder, ["system"]) as shop:
        shop.start_standins()
        shop.start()
        answered(shop.url)
        with httpx.Client(base_url=shop.url, trust_env=False) as client:
            for purchase in purchases:
                assert client.post("/orders", json=msgspec.to_builtins(of(purchase))).status_code == 201
        (folder / PLACED).write_text("".join(f"{purchase.order_id}\n" for purchase in purchases))
        figures = Figures(wanted=len(purchases), placed=len(purchases))
        book = Book(folder / DATABASE)

        def all_done() -> bool:
            book.read(figures)
            return figures.all_done

        try:
            assert until(all_done, wanted=True)
        finally:
            book.close()
        shop.stop()
    return folder


def test_all_four_services_also_run_in_one_process(one_process):
    holds, printed = audited(one_process)
    assert holds, printed


def test_an_order_of_nothing_is_counted_where_orders_and_charges_differ(one_process):
    _, printed = audited(one_process)
    assert re.search(r"orders of \$0\.00, nothing to charge +1 +1 ", printed)
    sums = [line for line in printed.splitlines() if " = " in line]
    assert len(sums) == 4
    for line in sums:
        whole, _, parts = line.partition(" = ")
        assert int(whole.split()[0]) == sum(int(part.split()[0]) for part in parts.split(" + ")), line
    assert any(line.startswith("21 orders = ") and line.endswith(" + 1 of $0.00") for line in sums)


def test_the_audit_reports_a_charge_for_an_order_of_nothing(one_process, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(one_process, copy)
    with closing(sqlite3.connect(copy / "stripe-ledger.db", isolation_level=None)) as ledger:
        ledger.execute(f"UPDATE charge SET order_id = '{FREE_ORDER.order_id}' WHERE number = {ONE_CHARGE}")
    holds, printed = audited(copy)
    assert not holds
    assert f"✗ orders of $0.00, nothing to charge: missing: {FREE_ORDER.order_id}" in printed


def test_more_orders_than_the_data_holds_are_said_to_be_fewer(tmp_path):
    everything = sum(1 for _ in read_purchases())
    command = [sys.executable, "-m", "examples.shop.demo", "--orders", "100000", "--folder", str(tmp_path / "demo")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
        finally:
            process.terminate()
            process.stdout.read()
    assert first == f"100,000 orders were asked for; the data holds {everything:,}, and these are run.\n"


def of(purchase: Purchase) -> NewOrder:
    return NewOrder(**{name: getattr(purchase, name) for name in NewOrder.__struct_fields__})


# --- the audit finds what is wrong ---

A_CONFIRMED = "(SELECT min(order_id) FROM shop_order WHERE status = 'confirmed')"
A_REFUSED = "(SELECT min(order_id) FROM shop_order WHERE reason = 'payment refused')"
A_SOLD_OUT = "(SELECT min(order_id) FROM shop_order WHERE reason = 'out of stock')"
COPIED = "order_id, customer_id, sku, quantity, amount_cents, card, email, phone, status, reason, placed, ended"

ENDINGS_EXCHANGED = (
    f"UPDATE shop_order SET status = CASE order_id WHEN {A_REFUSED} THEN 'confirmed' ELSE 'cancelled' END,"
    f" reason = CASE order_id WHEN {A_REFUSED} THEN NULL ELSE 'payment refused' END"
    f" WHERE order_id IN ({A_REFUSED}, {A_CONFIRMED})"
)
NOTE = "order_id, event, message_id, at"
NOTED_TWICE = f"INSERT INTO history ({NOTE}) SELECT {NOTE} FROM history LIMIT 1"
DEAD = (
    "INSERT INTO trunkline_dead_letter"
    " (reader, channel, key, partition, position, id, type, code, reason, detail, attempt, at, holds, event)"
    " VALUES (1, 'order-events', 'o', 0, 1, 'i', 'order.created', 'handler', 'r', '', 1, 0, 0, x'')"
)

WRONG_IN_THE_SHOP = {
    "an order that stays open": (
        f"UPDATE shop_order SET status = 'paid' WHERE order_id = {A_CONFIRMED}",
        "orders under way",
    ),
    "a lost order": (f"DELETE FROM shop_order WHERE order_id = {A_CONFIRMED}", "answer for, kept"),
    "an order of nobody": (
        f"INSERT INTO shop_order ({COPIED}) SELECT 'cdnow-06000', {COPIED.partition(', ')[2]} FROM shop_order LIMIT 1",
        "orders that nobody placed",
    ),
    "another amount": (
        f"UPDATE shop_order SET amount_cents = amount_cents + 1 WHERE order_id = {A_CONFIRMED}",
        "to the cent",
    ),
    "another address": (f"UPDATE shop_order SET email = 'x@example.com' WHERE order_id = {A_CONFIRMED}", "to the cent"),
    "a refused order confirmed": (
        f"UPDATE shop_order SET status = 'confirmed', reason = NULL WHERE order_id = {A_REFUSED}",
        "orders confirmed",
    ),
    "a good order cancelled": (
        f"UPDATE shop_order SET status = 'cancelled', reason = 'out of stock' WHERE order_id = {A_CONFIRMED}",
        "cancelled: out of stock",
    ),
    "the wrong reason": (
        f"UPDATE shop_order SET reason = 'out of stock' WHERE order_id = {A_REFUSED}",
        "cancelled: payment refused",
    ),
    "two endings exchanged": (ENDINGS_EXCHANGED, "orders confirmed"),
    "a payment without a record": (f"DELETE FROM payment WHERE order_id = {A_CONFIRMED}", "payments in the books"),
    "a record of another charge": (
        f"UPDATE payment SET charge_id = 'pi_other' WHERE order_id = {A_CONFIRMED}",
        "payments in the books",
    ),
    "a refund not recorded": (
        f"UPDATE payment SET status = 'refunding' WHERE order_id = {A_SOLD_OUT}",
        "payments in the books",
    ),
    "a missing reservation": (f"DELETE FROM reservation WHERE order_id = {A_CONFIRMED}", "reservations, one per order"),
    "a reservation for a cancelled order": (
        f"INSERT INTO reservation VALUES ({A_SOLD_OUT}, '{SOLD_OUT}', 1)",
        "reservations, one per order",
    ),
    "a reservation of too much": (
        f"UPDATE reservation SET quantity = quantity + 1 WHERE order_id = {A_CONFIRMED}",
        "reservations, one per order",
    ),
    "a unit taken twice": ("UPDATE stock SET units = units - 1 WHERE sku = 'cd-01'", "units off the shelf"),
    "an event that was not noted": ("DELETE FROM history WHERE number = 1", "events in the orders' histories"),
    "an event noted twice": (NOTED_TWICE, "events in the orders' histories"),
    "a receipt that is missing": (
        f"DELETE FROM notification WHERE kind = 'sms' AND order_id = {A_CONFIRMED}",
        "receipts of both",
    ),
    "a receipt for nothing": (
        f"UPDATE notification SET receipt = 'SM0' WHERE kind = 'sms' AND order_id = {A_CONFIRMED}",
        "receipts of both",
    ),
    "a dead letter": (DEAD, "dead letters"),
}

ONE_CHARGE = "(SELECT min(number) FROM charge WHERE status = 'succeeded')"
SAME = "amount_cents, currency, payment_method, status, order_id, metadata, created"
AGAIN = f"INSERT INTO charge (payment_intent, charge, {SAME}) SELECT 'pi_2', 'ch_2', {SAME} FROM charge"
ONE_DECLINED = "(SELECT min(number) FROM charge WHERE status = 'declined')"
FIRST, LAST = (f"(SELECT {end}(order_id) FROM charge WHERE status = 'succeeded')" for end in ("min", "max"))
EXCHANGED = (
    f"UPDATE charge SET order_id = CASE order_id WHEN {FIRST} THEN {LAST} ELSE {FIRST} END"
    f" WHERE status = 'succeeded' AND order_id IN ({FIRST}, {LAST})"
)
REFUNDED_FOR_NOTHING = (
    "INSERT INTO refund (refund, payment_intent, amount_cents, metadata, created)"
    " SELECT 're_2', payment_intent, amount_cents, '{}', 0 FROM charge"
    " WHERE status = 'succeeded' AND payment_intent NOT IN (SELECT payment_intent FROM refund) LIMIT 1"
)
WRONG_AT_STRIPE = {
    "a charge made twice": (f"{AGAIN} WHERE number = {ONE_CHARGE}", "charges captured"),
    "a charge that was never made": (f"DELETE FROM charge WHERE number = {ONE_CHARGE}", "charges captured"),
    "a cent too much": (
        f"UPDATE charge SET amount_cents = amount_cents + 1 WHERE number = {ONE_CHARGE}",
        "dollars captured",
    ),
    "two amounts exchanged, the sum the same": (EXCHANGED, "charges captured"),
    "a charge of an order that nobody knows": (
        f"UPDATE charge SET order_id = 'x' WHERE number = {ONE_CHARGE}",
        "money kept",
    ),
    "a refused card asked twice": (f"{AGAIN} WHERE status = 'declined' LIMIT 1", "charges refused"),
    "a refused card charged": (
        f"UPDATE charge SET status = 'succeeded' WHERE number = {ONE_DECLINED}",
        "orders with money kept",
    ),
    "a refund that was never made": (
        "DELETE FROM refund WHERE number = (SELECT min(number) FROM refund)",
        "refunds of the full",
    ),
    "a refund short of a cent": (
        "UPDATE refund SET amount_cents = amount_cents - 1 WHERE number = (SELECT min(number) FROM refund)",
        "refunds of the full",
    ),
    "a refund of a good order": (REFUNDED_FOR_NOTHING, "refunds of the full"),
}

MAIL_AGAIN = (
    "INSERT INTO delivery (message_id, sender, recipient, subject, body, received)"
    " SELECT '<other@example.com>', sender, recipient, subject, body, received FROM delivery LIMIT 1;"
    "INSERT INTO mailbox SELECT recipient, message_id, number FROM delivery WHERE message_id = '<other@example.com>'"
)
OPPOSITE = (
    "UPDATE delivery SET subject = replace(subject, 'confirmed', 'cancelled')"
    " WHERE number = (SELECT min(number) FROM delivery WHERE subject LIKE '%confirmed')"
)
WRONG_IN_THE_POST = {
    "a mail that is missing": (
        "DELETE FROM mailbox WHERE delivery = (SELECT min(delivery) FROM mailbox)",
        "mails, one per order",
    ),
    "a mail sent twice": (MAIL_AGAIN, "mails, one per order"),
    "a mail to somebody else": (
        "UPDATE delivery SET recipient = 'x@example.com' WHERE number = 1",
        "mails, one per order",
    ),
    "a mail that says the opposite": (OPPOSITE, "mails, one per order"),
}
SMS_AGAIN = (
    "INSERT INTO message (sid, account_sid, to_number, from_number, body, created)"
    " SELECT 'SM2', account_sid, to_number, from_number, body, created FROM message LIMIT 1"
)
WRONG_AT_TWILIO = {
    "an SMS that is missing": ("DELETE FROM message WHERE number = 1", "SMS, one per order"),
    "an SMS sent twice": (SMS_AGAIN, "SMS, one per order"),
    "an SMS to somebody else": ("UPDATE message SET to_number = '+15550000000' WHERE number = 1", "SMS, one per order"),
}
PLANTS = [
    pytest.param(file, sql, check, id=name)
    for file, wrongs in (
        (DATABASE, WRONG_IN_THE_SHOP),
        ("stripe-ledger.db", WRONG_AT_STRIPE),
        ("smtp-ledger.db", WRONG_IN_THE_POST),
        ("twilio-ledger.db", WRONG_AT_TWILIO),
    )
    for name, (sql, check) in wrongs.items()
]


@pytest.mark.parametrize(("file", "sql", "check"), PLANTS)
def test_the_audit_reports(good, capsys, file, sql, check):
    if file == DATABASE:
        with closing(apsw.Connection(str(good / file))) as shop:
            shop.execute(sql)
            assert shop.total_changes() > 0
    else:
        with closing(sqlite3.connect(good / file, isolation_level=None)) as ledger:
            ledger.executescript(sql)
            assert ledger.total_changes > 0
    assert auditing.main([str(good)]) == 1
    printed = capsys.readouterr().out
    wrong = [line for line in printed.splitlines() if line.startswith("✗")]
    assert any(check in line for line in wrong), printed
    assert "The audit failed" in printed


def test_the_audit_fails_when_no_order_was_placed(good):
    (good / PLACED).write_text("")
    holds, printed = audited(good)
    assert not holds
    assert "no order was placed, so nothing is shown" in printed


def test_the_audit_fails_on_an_empty_shop(good):
    (good / PLACED).write_text("")
    for file, tables in (
        (DATABASE, ("shop_order", "payment", "reservation", "history", "notification")),
        ("stripe-ledger.db", ("refund", "charge", "idempotency")),
        ("smtp-ledger.db", ("mailbox", "delivery")),
        ("twilio-ledger.db", ("message",)),
    ):
        with closing(apsw.Connection(str(good / file))) as database:
            for table in tables:
                database.execute(f"DELETE FROM {table}")
    holds, _ = audited(good)
    assert not holds


def test_the_audit_misses_an_order_that_got_an_answer_and_is_gone(good):
    with (good / PLACED).open("a") as placed:
        placed.write("cdnow-06000\n")
    holds, printed = audited(good)
    assert not holds
    assert "cdnow-06000 is lost" in printed


def test_the_audit_finds_a_damaged_database(good):
    with closing(apsw.Connection(str(good / DATABASE))) as shop:
        shop.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
        shop.execute("PRAGMA writable_schema = 1; DELETE FROM sqlite_master WHERE name = 'shop_order_status'")
    holds, printed = audited(good)
    assert not holds
    assert "integrity of the database" in printed


@pytest.mark.parametrize("file", [DATABASE, PLACED, "stripe-ledger.db", "smtp-ledger.db", "twilio-ledger.db"])
def test_the_audit_fails_without_a_file(good, capsys, file):
    (good / file).unlink()
    assert auditing.main([str(good)]) == 1
    assert f"there is no {good / file}"[:40] in capsys.readouterr().out


def test_the_audit_fails_on_a_file_that_is_no_database(good, capsys):
    for suffix in ("-wal", "-shm"):
        (good / f"twilio-ledger.db{suffix}").unlink(missing_ok=True)
    (good / "twilio-ledger.db").write_bytes(b"not a database" * 100)
    assert auditing.main([str(good)]) == 1
    assert "not a database" in capsys.readouterr().out


# --- the order service over HTTP ---


def new_order(order_id: str = "o-1", **changes: object) -> NewOrder:
    fields = {
        "order_id": order_id,
        "customer_id": "c-1",
        "sku": "cd-01",
        "quantity": 1,
        "amount_cents": 1499,
        "card": GOOD_CARD,
        "email": "you@example.com",
        "phone": "+15550100001",
    }
    return msgspec.convert(fields | changes, NewOrder)


@pytest.fixture
async def client(tmp_path, monkeypatch) -> AsyncIterator[httpx.AsyncClient]:
    shop = Processes(tmp_path)
    monkeypatch.setenv("SHOP_PORT", shop.url.rpartition(":")[2])
    async with (
        App(order, f"sqlite:///{tmp_path / DATABASE}"),
        httpx.AsyncClient(base_url=shop.url, trust_env=False) as client,
    ):
        while True:
            try:
                await client.get("/")
            except httpx.TransportError:
                await asyncio.sleep(0.01)
            else:
                break
        yield client


def rows(folder: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(apsw.Connection(str(folder / DATABASE), flags=apsw.SQLITE_OPEN_READONLY)) as shop:
        return shop.execute(sql).fetchall()


async def test_an_order_placed_twice_is_one_order_and_one_event(client, tmp_path):
    body = msgspec.to_builtins(new_order())
    first, second = await client.post("/orders", json=body), await client.post("/orders", json=body)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert first.headers["location"] == "/orders/o-1"
    assert rows(tmp_path, "SELECT count(*) FROM shop_order") == [(1,)]
    assert rows(tmp_path, "SELECT count(*) FROM trunkline_log") == [(1,)]


async def test_forty_customers_who_send_one_order_at_once_place_it_once(client, tmp_path):
    body = msgspec.to_builtins(new_order())
    answers = await asyncio.gather(*(client.post("/orders", json=body) for _ in range(40)))
    assert sorted(answer.status_code for answer in answers) == [200] * 39 + [201]
    assert rows(tmp_path, "SELECT count(*) FROM trunkline_log") == [(1,)]


async def test_an_id_that_is_taken_by_another_order_is_refused(client, tmp_path):
    await client.post("/orders", json=msgspec.to_builtins(new_order()))
    answer = await client.post("/orders", json=msgspec.to_builtins(new_order(quantity=2)))
    assert answer.status_code == 409
    assert "exists with other contents" in answer.json()["error"]
    assert rows(tmp_path, "SELECT quantity FROM shop_order") == [(1,)]


@pytest.mark.parametrize(
    "change",
    [
        {"order_id": ""},
        {"order_id": "a b"},
        {"order_id": "x\r\nBcc: y"},
        {"quantity": 0},
        {"quantity": "1"},
        {"amount_cents": -1},
        {"amount_cents": 49},
        {"amount_cents": 10.5},
        {"card": "4242424242424242"},
        {"card": "pm_card_mastercard"},
        {"sku": "cd-99"},
        {"email": "nobody"},
        {"email": "a@example.com\nBcc: b@example.com"},
        {"phone": "555"},
        {"extra": 1},
    ],
    ids=str,
)
async def test_an_order_that_cannot_be_is_refused(client, tmp_path, change):
    body = msgspec.to_builtins(new_order()) | change
    answer = await client.post("/orders", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]
    assert rows(tmp_path, "SELECT count(*) FROM shop_order") == [(0,)]


@pytest.mark.parametrize(("name", "allowed"), [("sku", [*STOCK]), ("card", [*CARDS])])
async def test_what_is_not_sold_and_what_cannot_be_paid_with_is_told_with_what_is_allowed(client, name, allowed):
    answer = await client.post("/orders", json=msgspec.to_builtins(new_order()) | {name: "xx-99"})
    assert answer.status_code == 422
    assert answer.json()["error"] == f"{name} is 'xx-99'; allowed: {', '.join(allowed)}"


async def test_the_page_offers_what_can_be_ordered(client):
    page = (await client.get("/")).text
    assert re.findall(r'<option value="([^"]*)"', page) == [*STOCK, *CARDS]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"order_id":' + b"[" * 4000])
async def test_a_body_that_is_no_order_is_refused(client, content):
    answer = await client.post("/orders", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422


async def test_what_another_pages_form_can_send_is_refused(client):
    answer = await client.post(
        "/orders", content=msgspec.json.encode(new_order()), headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 415


async def test_another_host_name_gets_nothing(client):
    assert (await client.get("/orders", headers={"host": "shop.attacker.example"})).status_code == 400


async def test_a_huge_body_is_refused(client):
    answer = await client.post("/orders", content=b" " * 20_000, headers={"content-type": "application/json"})
    assert answer.status_code == 413


async def test_orders_are_listed_newest_first_with_a_tally(client):
    for number in range(3):
        await client.post("/orders", json=msgspec.to_builtins(new_order(f"o-{number}")))
    answer = await client.get("/orders", params={"limit": 2})
    assert [listed["order_id"] for listed in answer.json()["orders"]] == ["o-2", "o-1"]
    assert answer.json()["tally"] == {"placed": {"orders": 3, "cents": 4497}}
    again = await client.get("/orders", params={"limit": 2}, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304
    assert (await client.get("/orders", params={"limit": "0"})).status_code == 422
    assert (await client.get("/orders/o-1")).json()["order_id"] == "o-1"
    assert (await client.get("/orders/o-9")).status_code == 404


async def test_the_page_needs_nothing_from_elsewhere(client):
    page = await client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    links = [word for word in page.text.split('"') if word.startswith(("http:", "https:", "//"))]
    assert not links
    assert SOLD_OUT in page.text


# --- the payment service alone ---


async def test_a_card_that_stripe_does_not_know_is_a_refused_payment(tmp_path, monkeypatch):
    with Processes(tmp_path) as shop:
        monkeypatch.setenv("STRIPE_API_KEY", "sk_test_story")
        monkeypatch.setenv("STRIPE_API_BASE", shop.start_standins()["STRIPE_API_BASE"])
        async with App(payment, f"sqlite:///{tmp_path / DATABASE}") as app:
            await app.publish(OrderCreated("o-1", "cd-01", 1, 1499, "pm_card_none"))
            async with asyncio.timeout(30):
                while not (refused := rows(tmp_path, "SELECT status, charge_id, decline_code FROM payment")):
                    await asyncio.sleep(0.01)
            assert refused == [("refused", None, "resource_missing")]
            assert rows(tmp_path, "SELECT count(*) FROM trunkline_parked") == [(0,)]


# --- processes ---


def test_a_service_that_cannot_start_is_reported_with_the_end_of_its_log(tmp_path):
    child = Child("broken", ["examples.shop.no_such_service"], tmp_path / "broken.log")
    child.start(os.environ)
    assert child.ended() == 1
    assert "no_such_service" in child.last_words()
