"""The shop's stand-ins as real servers, driven by the libraries of the services they stand for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosmtplib
import pytest
import stripe
from twilio.base.exceptions import TwilioRestException  # type: ignore[import-untyped]

from examples.shop.clients.mail import Mail, open_mail
from examples.shop.clients.settings import SettingError
from examples.shop.clients.stripe import Charges, Declined, open_charges
from examples.shop.clients.twilio import Sms, open_sms
from examples.shop.orders import (
    GOOD_CARD,
    SOLD_OUT,
    STOCK,
    OrderDataError,
    read_purchases,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

ROOT = Path(__file__).parents[2]
KEY = "sk_test_story"
ACCOUNT = "AC" + "0" * 32
SENDER = "+15005550006"
CUSTOMER = "+15550100004"


class StandIn:
    """A stand-in in its own process, and its ledger read past it."""

    def __init__(self, name: str, folder: Path, *options: str) -> None:
        self.database = folder / f"{name}.db"
        self._command = [sys.executable, "-m", f"examples.shop.standins.{name}"]
        self._command += ["--database", str(self.database), *options]
        self._port = 0
        self.start()

    def start(self) -> None:
        command = [*self._command, "--port", str(self._port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), line
        self.url = line.split()[-1]
        self._port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self._wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self._wait()

    def _wait(self) -> None:
        assert self.process.stdout is not None
        self.process.wait(10)
        self.process.stdout.close()

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.database)) as database:
            return database.execute(query).fetchall()


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[..., StandIn]]:
    with contextlib.ExitStack() as stack:

        def started(name: str, *options: str) -> StandIn:
            one = StandIn(name, tmp_path, *options)
            stack.callback(one.stop)
            return one

        yield started


@asynccontextmanager
async def charging(server: StandIn) -> AsyncIterator[Charges]:
    charges = Charges(KEY, server.url)
    try:
        yield charges
    finally:
        await charges.close()


@asynccontextmanager
async def texting(server: StandIn) -> AsyncIterator[Sms]:
    sms = Sms(ACCOUNT, "token", SENDER, server.url)
    try:
        yield sms
    finally:
        await sms.close()


@asynccontextmanager
async def mailing(server: StandIn) -> AsyncIterator[Mail]:
    mail = Mail(server.url, "shop@example.com")
    try:
        yield mail
    finally:
        await mail.close()


@asynccontextmanager
async def stripe_itself(server: StandIn, key: str = KEY) -> AsyncIterator[stripe.StripeClient]:
    http = stripe.AIOHTTPClient(timeout=10)
    try:
        yield stripe.StripeClient(key, base_addresses={"api": server.url}, http_client=http, max_network_retries=0)
    finally:
        await http.close_async()


def intent(**changes: object) -> Any:
    return {
        "amount": 1177,
        "currency": "usd",
        "payment_method": "pm_card_visa",
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "confirm": True,
    } | changes


# ------------------------------------------------------------------ Stripe


async def test_a_charge_is_in_the_ledger_with_its_order(stand_in):
    server = stand_in("stripe")
    async with charging(server) as charges:
        charge = await charges.charge("cdnow-00001", 2933, GOOD_CARD, "m1")
    assert server.rows("SELECT kind, payment_intent, order_id, amount_cents FROM ledger") == [
        ("charge", charge, "cdnow-00001", 2933)
    ]


@pytest.mark.parametrize(
    ("card", "code"),
    [
        ("pm_card_chargeDeclined", "generic_decline"),
        ("pm_card_chargeDeclinedInsufficientFunds", "insufficient_funds"),
        ("pm_card_chargeDeclinedExpiredCard", "expired_card"),
    ],
)
async def test_a_declined_card_raises_its_decline_code_and_moves_no_money(stand_in, card, code):
    server = stand_in("stripe")
    async with charging(server) as charges:
        for _ in range(2):
            with pytest.raises(Declined) as declined:
                await charges.charge("cdnow-00001", 2933, card, "m1")
            assert declined.value.code == code
    assert server.rows("SELECT * FROM ledger") == []
    assert server.rows("SELECT status, decline_code FROM charge") == [("declined", code)]


async def test_a_card_that_stripe_does_not_know_is_declined_and_not_tried_again(stand_in):
    server = stand_in("stripe")
    async with charging(server) as charges:
        with pytest.raises(Declined) as declined:
            await charges.charge("cdnow-00001", 2933, "pm_card_none", "m1")
    assert declined.value.code == "resource_missing"
    assert server.rows("SELECT * FROM charge") == []


async def test_the_librarys_card_error_has_code_decline_code_and_intent(stand_in):
    async with stripe_itself(stand_in("stripe")) as client:
        with pytest.raises(stripe.CardError) as caught:
            await client.v1.payment_intents.create_async(
                intent(payment_method="pm_card_chargeDeclinedInsufficientFunds")
            )
    error: Any = caught.value
    assert (error.http_status, error.code) == (402, "card_declined")
    assert error.error.decline_code == "insufficient_funds"
    assert error.error.payment_intent.status == "requires_payment_method"
    assert error.user_message == "Your card has insufficient funds."
    assert error.request_id.startswith("req_")


async def test_the_same_key_replays_the_answer_and_charges_once(stand_in):
    server = stand_in("stripe")
    async with stripe_itself(server) as client:
        create = client.v1.payment_intents.create_async
        first = await create(intent(metadata={"order_id": "a"}), {"idempotency_key": "k"})
        again = await create(intent(metadata={"order_id": "a"}), {"idempotency_key": "k"})
    assert first.id == again.id
    assert again.last_response is not None
    assert again.last_response.headers["Idempotent-Replayed"] == "true"
    assert first.last_response is not None
    assert "Idempotent-Replayed" not in first.last_response.headers
    assert server.rows("SELECT count(*), sum(amount_cents) FROM ledger") == [(1, 1177)]


async def test_the_same_key_with_other_parameters_is_refused(stand_in):
    async with stripe_itself(stand_in("stripe")) as client:
        create = client.v1.payment_intents.create_async
        await create(intent(), {"idempotency_key": "k"})
        with pytest.raises(stripe.IdempotencyError, match="same parameters") as caught:
            await create(intent(amount=1178), {"idempotency_key": "k"})
    assert caught.value.http_status == 400


async def test_a_key_in_use_is_a_conflict_and_the_first_request_goes_through(stand_in):
    server = stand_in("stripe", "--authorisation-seconds", "0.5")
    async with stripe_itself(server) as client:
        create = client.v1.payment_intents.create_async
        results = await asyncio.gather(
            *(create(intent(), {"idempotency_key": "k"}) for _ in range(3)),
            return_exceptions=True,
        )
    refused = [r for r in results if isinstance(r, stripe.StripeError)]
    assert [r.http_status for r in refused] == [409, 409]
    assert server.rows("SELECT count(*) FROM charge") == [(1,)]


async def test_a_refused_parameter_is_not_saved_under_the_key(stand_in):
    async with stripe_itself(stand_in("stripe")) as client:
        create = client.v1.payment_intents.create_async
        with pytest.raises(stripe.InvalidRequestError) as caught:
            await create(intent(amount=49), {"idempotency_key": "k"})
        assert (caught.value.code, caught.value.param) == ("amount_too_small", "amount")
        assert (await create(intent(), {"idempotency_key": "k"})).status == "succeeded"


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"payment_method": {"a": "b"}}, "payment_method", None),
        ({"automatic_payment_methods": "x"}, "automatic_payment_methods", None),
        ({"amount": 0}, "amount", "parameter_invalid_integer"),
        ({"payment_method": "pm_card_none"}, "payment_method", "resource_missing"),
        ({"amuont": 5}, "amuont", "parameter_unknown"),
        # Gone since API version 2026-10-28: allowed_payment_method_types took its place.
        (
            {"payment_method_types": ["card"]},
            "payment_method_types",
            "parameter_unknown",
        ),
    ],
)
async def test_a_wrong_parameter_is_named(stand_in, wrong, param, code):
    async with stripe_itself(stand_in("stripe")) as client:
        with pytest.raises(stripe.InvalidRequestError) as caught:
            await client.v1.payment_intents.create_async(intent(**wrong))
    assert (caught.value.param, caught.value.code) == (param, code)


async def test_a_live_key_is_refused(stand_in):
    async with stripe_itself(stand_in("stripe"), "sk_live_story") as client:
        with pytest.raises(stripe.AuthenticationError):
            await client.v1.payment_intents.create_async(intent())


async def test_a_refund_gives_all_back_once(stand_in):
    server = stand_in("stripe")
    async with charging(server) as charges, stripe_itself(server) as client:
        charge = await charges.charge("cdnow-00001", 2933, GOOD_CARD, "m1")
        first = await charges.refund(charge, "m2")
        assert await charges.refund(charge, "m2") == first
        assert await charges.refund(charge, "another key") == first
        with pytest.raises(stripe.InvalidRequestError) as caught:
            await client.v1.refunds.create_async({"payment_intent": charge})
    assert caught.value.code == "charge_already_refunded"
    assert server.rows("SELECT kind, order_id, amount_cents FROM ledger ORDER BY created") == [
        ("charge", "cdnow-00001", 2933),
        ("refund", "cdnow-00001", -2933),
    ]


async def test_intents_are_retrieved_and_listed_page_by_page(stand_in):
    async with stripe_itself(stand_in("stripe")) as client:
        intents = client.v1.payment_intents
        made = [(await intents.create_async(intent(amount=100 + n))).id for n in range(5)]
        one = await intents.retrieve_async(made[2])
        assert (one.amount, one.amount_received, one.status) == (102, 102, "succeeded")
        pages = await intents.list_async({"limit": 2})
        listed = [found.id async for found in pages.auto_paging_iter()]
    assert listed == made[::-1]


async def test_stripes_state_survives_kill_9(stand_in):
    server = stand_in("stripe")
    async with charging(server) as charges:
        charge = await charges.charge("cdnow-00001", 2933, GOOD_CARD, "m1")
        server.kill()
        server.start()
        assert await charges.charge("cdnow-00001", 2933, GOOD_CARD, "m1") == charge
        await charges.refund(charge, "m2")
    assert server.rows("SELECT sum(amount_cents) FROM ledger") == [(0,)]
    assert server.rows("SELECT count(*) FROM charge") == [(1,)]


async def test_nothing_below_the_minimum_is_sent_to_stripe(stand_in):
    server = stand_in("stripe")
    async with charging(server) as charges:
        with pytest.raises(ValueError, match="minimum is 50"):
            await charges.charge("cdnow-00001", 0, GOOD_CARD, "m1")
    assert server.rows("SELECT * FROM charge") == []


# ------------------------------------------------------------------ Twilio


async def sent(sms: Sms, reference: str, *, again: bool, since: datetime | None = None) -> str:
    return await sms.send(
        to=CUSTOMER,
        text="Your order is on its way.",
        reference=reference,
        since=since or datetime.now(UTC),
        may_have_been_sent=again,
    )


async def test_an_sms_that_was_sent_before_is_not_sent_again_even_after_kill_9(stand_in):
    server = stand_in("twilio")
    async with texting(server) as sms:
        begun = datetime.now(UTC)
        first = await sent(sms, "cdnow-00001/1", again=False)
        for other in range(60):
            await sent(sms, f"cdnow-00002/{other}", again=False)
        server.kill()
        server.start()
        # Behind 60 newer ones: on the second page of the list.
        assert await sent(sms, "cdnow-00001/1", again=True, since=begun) == first
        assert await sent(sms, "cdnow-00001/2", again=True, since=begun) != first
    assert server.rows("SELECT count(*), count(DISTINCT body) FROM message") == [(62, 62)]


async def test_without_the_question_twilio_sends_twice(stand_in):
    server = stand_in("twilio")
    async with texting(server) as sms:
        assert await sent(sms, "a", again=False) != await sent(sms, "a", again=False)
    assert server.rows("SELECT count(*), count(DISTINCT body) FROM message") == [(2, 1)]


@pytest.mark.parametrize(("to", "text", "code"), [("12", "hello", 21211), (CUSTOMER, "x" * 1600, 21617)])
async def test_a_wrong_sms_raises_twilios_code(stand_in, to, text, code):
    async with texting(stand_in("twilio")) as sms:
        with pytest.raises(TwilioRestException) as caught:
            await sms.send(
                to=to,
                text=text,
                reference="a",
                since=datetime.now(UTC),
                may_have_been_sent=False,
            )
    assert (caught.value.status, caught.value.code) == (400, code)


async def test_another_accounts_credentials_are_refused(stand_in):
    server = stand_in("twilio")
    sms = Sms(ACCOUNT, "", SENDER, server.url)
    try:
        with pytest.raises(TwilioRestException) as caught:
            await sent(sms, "a", again=False)
    finally:
        await sms.close()
    assert (caught.value.status, caught.value.code) == (401, 20003)


async def test_twilio_that_never_answers_is_given_up():
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    sms = Sms(ACCOUNT, "token", SENDER, f"http://127.0.0.1:{port}", timeout_s=0.2)
    try:
        with pytest.raises(TimeoutError):
            await sent(sms, "a", again=False)
    finally:
        await sms.close()
        silent.close()
        for writer in held:
            writer.close()


# ------------------------------------------------------------------ mail


async def test_a_mail_sent_twice_is_two_deliveries_and_one_in_the_mailbox(stand_in):
    server = stand_in("smtp")
    async with mailing(server) as mail:
        for _ in range(2):
            await mail.send(message_id="m1", to="c@example.com", subject="Grüße", text="Öl\n.\nx\n")
        await mail.send(message_id="m2", to="c@example.com", subject="Order", text="Thanks.\n")
    assert server.rows("SELECT message_id, subject, body FROM delivery ORDER BY number") == [
        ("<m1@example.com>", "Grüße", "Öl\n.\nx\n"),
        ("<m1@example.com>", "Grüße", "Öl\n.\nx\n"),
        ("<m2@example.com>", "Order", "Thanks.\n"),
    ]
    assert server.rows("SELECT message_id, delivery FROM mailbox") == [
        ("<m1@example.com>", 1),
        ("<m2@example.com>", 3),
    ]


async def test_mail_reconnects_after_the_server_was_killed(stand_in):
    server = stand_in("smtp")
    async with mailing(server) as mail:
        await mail.send(message_id="m1", to="c@example.com", subject="1", text="1")
        server.kill()
        with pytest.raises(aiosmtplib.SMTPException):
            await mail.send(message_id="m2", to="c@example.com", subject="2", text="2")
        server.start()
        await mail.send(message_id="m2", to="c@example.com", subject="2", text="2")
    assert server.rows("SELECT message_id FROM mailbox ORDER BY delivery") == [
        ("<m1@example.com>",),
        ("<m2@example.com>",),
    ]


async def test_mail_notices_that_the_server_was_restarted_while_it_idled(stand_in):
    server = stand_in("smtp")
    async with mailing(server) as mail:
        await mail.send(message_id="m1", to="c@example.com", subject="1", text="1")
        server.kill()
        server.start()
        await mail.send(message_id="m2", to="c@example.com", subject="2", text="2")
    assert server.rows("SELECT count(*) FROM mailbox") == [(2,)]


async def test_malformed_mail_is_kept_as_it_is(stand_in):
    server = stand_in("smtp")
    host, port = server.url.removeprefix("smtp://").split(":")
    raw = b"Subject: =?nope?q?x?=\r\nContent-Type: text/plain; charset=nope\r\n\r\n\xff\r\n"
    await aiosmtplib.send(raw, sender="a@example.com", recipients=["c@example.com"], hostname=host, port=int(port))
    assert server.rows("SELECT subject, body FROM delivery") == [("=?nope?q?x?=", "\xff\n")]


async def test_mails_sent_at_the_same_time_share_the_connection(stand_in):
    server = stand_in("smtp")
    async with mailing(server) as mail:
        await asyncio.gather(
            *(mail.send(message_id=f"m{n}", to="c@example.com", subject="s", text="t") for n in range(40))
        )
    assert server.rows("SELECT count(*) FROM mailbox") == [(40,)]


async def test_a_line_break_in_a_header_is_refused(stand_in):
    async with mailing(stand_in("smtp")) as mail:
        with pytest.raises(ValueError, match="line break"):
            await mail.send(message_id="m1", to="c@example.com", subject="a\nBcc: x@example.com", text="t")


# ------------------------------------------------------------------ all together


def test_one_process_serves_all_three_and_ends_at_a_signal(tmp_path):
    command = [sys.executable, "-m", "examples.shop.standins", "--directory", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())

        async def use_each() -> None:
            charges = Charges(KEY, told["STRIPE_API_BASE"])
            sms = Sms(ACCOUNT, "token", SENDER, told["TWILIO_API_BASE"])
            mail = Mail(told["SMTP_URL"], "shop@example.com")
            await charges.charge("a", 500, GOOD_CARD, "m1")
            await sent(sms, "a", again=False)
            await mail.send(message_id="m1", to="c@example.com", subject="s", text="t")
            await asyncio.gather(charges.close(), sms.close(), mail.close())

        try:
            asyncio.run(use_each())
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    for name, table in (("stripe", "ledger"), ("twilio", "message"), ("smtp", "mailbox")):
        with closing(sqlite3.connect(told["ledgers"][name])) as database:
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)


@pytest.mark.parametrize(
    ("provide", "setting"),
    [(open_charges, "STRIPE_API_KEY"), (open_sms, "TWILIO_ACCOUNT_SID"), (open_mail, "SMTP_URL")],
)
async def test_a_missing_setting_is_named(monkeypatch, provide, setting):
    monkeypatch.delenv(setting, raising=False)
    with pytest.raises(SettingError, match=f"{setting} is not set") as caught:
        await anext(provide())
    assert caught.value.name == setting


async def test_a_live_stripe_key_never_goes_to_another_address(monkeypatch):
    monkeypatch.setenv("STRIPE_API_KEY", "sk_live_x")
    monkeypatch.setenv("STRIPE_API_BASE", "http://127.0.0.1:1")
    with pytest.raises(SettingError, match="live key"):
        await anext(open_charges())


# ------------------------------------------------------------------ orders


def test_the_orders_are_the_whole_sample_to_the_cent():
    purchases = list(read_purchases())
    assert len(purchases) == len({p.order_id for p in purchases}) == 6919
    assert sum(p.amount_cents for p in purchases) == 24_409_194
    assert sum(p.amount_cents == 0 for p in purchases) == 8
    assert min(p.amount_cents for p in purchases if p.amount_cents) == 249
    assert {p.sku for p in purchases} == set(STOCK)


def test_declines_and_stock_outs_follow_from_the_data_alone():
    purchases = list(read_purchases())
    assert Counter(p.ending for p in purchases) == {
        "confirmed": 6308,
        "payment refused": 335,
        "out of stock": 276,
    }
    # A process with another hash seed draws the same.
    script = "from examples.shop.orders import read_purchases as r\nprint([(p.order_id, p.card, p.sku) for p in r()])"
    command = [sys.executable, "-c", script]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([(p.order_id, p.card, p.sku) for p in purchases])


def test_the_first_twenty_orders_hold_every_ending():
    endings = Counter(p.ending for p in read_purchases(20))
    assert endings == {"confirmed": 17, "payment refused": 2, "out of stock": 1}


def test_an_order_of_nothing_is_never_refused_by_the_card():
    free = [p for p in read_purchases() if p.amount_cents == 0]
    assert {p.ending for p in free} <= {"confirmed", "out of stock"}
    assert all(p.ending == "confirmed" or p.sku == SOLD_OUT for p in free)


@pytest.mark.parametrize("line", ["00004 0001 19970101 2", "00004 0001 19970101 0 29.33", "4 1 19971301 1 1.234", ""])
def test_a_line_that_is_no_purchase_is_named(tmp_path, line):
    (tmp_path / "bad.txt").write_text(f" 00004 0001 19970101  2   29.33\n{line}\n")
    with pytest.raises(OrderDataError, match=r"bad\.txt:2"):
        list(read_purchases(path=tmp_path / "bad.txt"))
