"""The simulator: schedules of a chain of three services, and the crash sweep of the shop.

Read next: ../simulator.py.
"""

from __future__ import annotations

import time
from importlib import import_module

from benchmarks.cases import Run
from trunkline import Context, Service, Stream, Struct, System
from trunkline.testing.simulator import Client, Simulation, View
from trunkline.testing.simulator.campaign import Plan, Report, carry_out

FAULTS = ("request_lost", "confirm_lost", "duplicate", "crash", "partition")
WARM_UP = 20
"""Schedules before the time is taken."""
ORDERS = 2

order_events = Stream("order-events", key="order_id", partitions=2)


@order_events.event
class Placed(Struct):
    """An order came in."""

    order_id: str


@order_events.event
class Paid(Struct):
    """It is paid."""

    order_id: str


@order_events.event
class Sent(Struct):
    """It is on its way."""

    order_id: str


def chain() -> Simulation:
    """Return orders that are paid, sent and closed, each by a service with a table of its own."""
    payment, shipping, books = Service("payment"), Service("shipping"), Service("books")
    for service in (payment, shipping, books):
        service.schema("CREATE TABLE IF NOT EXISTS done (order_id TEXT)")

    async def note(ctx: Context, order_id: str) -> None:
        transaction = await ctx.transaction()
        await transaction.execute("INSERT INTO done VALUES (?)", (order_id,))

    @payment.handle
    async def pay(order: Placed, ctx: Context) -> Paid:
        await note(ctx, order.order_id)
        return Paid(order.order_id)

    @shipping.handle
    async def send(order: Paid, ctx: Context) -> Sent:
        await note(ctx, order.order_id)
        return Sent(order.order_id)

    @books.handle
    async def close(order: Sent, ctx: Context) -> None:
        await note(ctx, order.order_id)

    async def workload(sim: Client) -> None:
        for number in range(ORDERS):
            await sim.publish(Placed(f"o-{number}"))

    def each_order_once(view: View) -> None:
        for name in ("payment", "shipping", "books"):
            rows = view.rows(name, "SELECT order_id FROM done ORDER BY order_id")
            assert rows == [(f"o-{number}",) for number in range(ORDERS)], (name, rows)

    return Simulation(
        System("chain", [payment, shipping, books]), workload, broker="kafka", faults=FAULTS,
        eventually=[each_order_once],
    )  # fmt: skip


def random_schedules(run: Run, *, processes: int) -> dict[str, float]:
    """Run so many schedules; none may break a promise."""
    simulation = chain()
    carry_out(simulation, _drawn(WARM_UP, 10**6))
    began = time.perf_counter()
    report = carry_out(simulation, _drawn(run.messages, 1, processes))
    took = time.perf_counter() - began
    _kept(report)
    return {"per_s": report.runs / took, "steps": report.steps / report.runs}


def shop_sweep(_run: Run, *, processes: int) -> dict[str, float]:
    """Crash each service of the shop at each of its steps."""
    simulation = import_module("examples.shop.simulation").simulation
    began = time.perf_counter()
    report = carry_out(simulation, Plan(points=False, processes=processes))
    took = time.perf_counter() - began
    _kept(report)
    return {"s": took, "runs": report.runs}


def _drawn(schedules: int, first_seed: int, processes: int = 1) -> Plan:
    return Plan(crash_sweep=False, points=False, seeds=schedules, first_seed=first_seed, processes=processes)


def _kept(report: Report) -> None:
    assert not report.failures, report.failures[0].violation
    assert not report.never_fired(), report.never_fired()
