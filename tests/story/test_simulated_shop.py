"""The shop in simulated time: every crash of every service, random faults on every broker, and planted bugs."""

from __future__ import annotations

import itertools
import re
import sys
import types
from pathlib import Path

import pytest

from examples.shop import notification, payment
from examples.shop.clients.mail import Mail
from examples.shop.clients.stripe import Charges, Declined
from examples.shop.clients.twilio import Sms
from examples.shop.inventory import inventory
from examples.shop.order import order, site
from examples.shop.orders import DECLINED_CARD, GOOD_CARD
from examples.shop.simulation import MailServer, Stripe, Twilio, chosen, customers, never_more_than_ordered, simulation
from trunkline import System
from trunkline.clock import Draws
from trunkline.testing.simulator import Simulation, search
from trunkline.testing.simulator.broker import PROFILES
from trunkline.testing.simulator.campaign import Plan, carry_out, quiet
from trunkline.testing.simulator.tape import Tape

SEEDS = Plan(crash_sweep=False, points=False, seeds=12)


def test_every_crash_of_every_service_leaves_every_order_and_cent_where_it_belongs():
    report = carry_out(simulation, Plan(points=False))
    assert [failure.violation for failure in report.failures] == []
    assert set(report.plain) == {"order", "payment", "inventory", "notification"}
    assert report.fired["crash"] == sum(report.plain.values()) > 400


@pytest.mark.parametrize("broker", PROFILES)
def test_random_faults_do_no_harm(broker):
    report = carry_out(simulation.on(broker), SEEDS)
    assert [failure.violation for failure in report.failures] == []
    assert len(report.fired) > 8


def with_a_bug(module: types.ModuleType, right: str, wrong: str) -> types.ModuleType:
    """Return a module of the shop in which `right` reads `wrong`."""
    source = Path(str(module.__file__)).read_text("utf-8")
    assert source.count(right) == 1
    spoilt = types.ModuleType(f"{module.__name__}_with_a_bug")
    spoilt.numbers = itertools.count()
    sys.modules[spoilt.__name__] = spoilt
    exec(compile(source.replace(right, wrong), str(module.__file__), "exec"), spoilt.__dict__)
    return spoilt


def spoilt_shop(module: types.ModuleType, right: str, wrong: str) -> Simulation:
    spoilt = with_a_bug(module, right, wrong)
    services = {"payment": payment.payment, "notification": notification.notification}
    name = module.__name__.rpartition(".")[2]
    services[name] = getattr(spoilt, name)
    return Simulation(
        System("shop", [order, services["payment"], inventory, services["notification"]]),
        customers, override={Charges: Stripe, Mail: MailServer, Sms: Twilio},
        leave_out=[site], always=[never_more_than_ordered],
    )  # fmt: skip


BUGS = {
    "a charge without a key that stays": (payment, "order.card, ctx.message.id)", "order.card, str(next(numbers)))"),
    "an SMS that is not looked up": (notification, "may_have_been_sent=True", "may_have_been_sent=ctx.attempt > 1"),
    "a mail with another id each time": (
        notification,
        "message_id=ctx.message.id, to",
        "message_id=str(next(numbers)), to",
    ),
}
FOUND = re.compile(
    "captured beyond what was ordered|(charges refused|charges captured|SMS|mails), one per order: too many"
)


@pytest.mark.parametrize("bug", BUGS)
def test_a_crash_of_the_service_shows(bug):
    simulated = spoilt_shop(*BUGS[bug])
    crash = f"crash {BUGS[bug][0].__name__.rpartition('.')[2]}"
    with quiet():
        plain = search.run(simulated, search.Attempt(Tape(), "without faults"))
        assert plain.violations == []
        crashes = (attempt for attempt in search.crash_sweep(plain) if crash in attempt.tape.choices)
        broken = (violation for attempt in crashes for violation in search.run(simulated, attempt).violations)
        assert FOUND.search(next(broken).text)


# --- the stand-ins behave as what they stand for ---


def test_a_card_is_charged_once_for_each_key_and_refused_again_alike():
    stripe = Stripe()
    assert stripe.charge("o-1", 100, GOOD_CARD, "k-1") == stripe.charge("o-1", 100, GOOD_CARD, "k-1")
    for _ in range(2):
        with pytest.raises(Declined) as refused:
            stripe.charge("o-2", 100, DECLINED_CARD, "k-2")
        assert refused.value.code == "generic_decline"
    assert stripe.charges == [("o-1", 100, "succeeded", "pi_1"), ("o-2", 100, "declined", "pi_2")]
    assert stripe.replays == 2
    with pytest.raises(ValueError, match="idempotency key k-1 was used for"):
        stripe.charge("o-1", 101, GOOD_CARD, "k-1")
    with pytest.raises(ValueError, match="49 cents are less than 50"):
        stripe.charge("o-3", 49, GOOD_CARD, "k-3")


def test_a_charge_is_refunded_once_under_whatever_key():
    stripe = Stripe()
    charge = stripe.charge("o-1", 100, GOOD_CARD, "k-1")
    assert {stripe.refund(charge, key) for key in ("k-2", "k-2", "k-3")} == {"re_1"}
    assert stripe.refunds == [(charge, 100, "re_1")]


def test_each_run_places_a_refused_and_a_sold_out_order_and_some_a_free_one():
    runs = [chosen(Draws(seed)) for seed in range(30)]
    for orders in runs:
        assert len({purchase.order_id for purchase in orders}) == 5
        assert {purchase.ending for purchase in orders} == {"confirmed", "payment refused", "out of stock"}
    free = [sum(not purchase.amount_cents for purchase in orders) for orders in runs]
    assert set(free) == {0, 1}
    assert chosen(Draws(7)) == chosen(Draws(7)) != chosen(Draws(8))
