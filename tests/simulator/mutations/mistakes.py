"""A small shop, as a user would write it, and mistakes that users make in it.

Invariant: the shop without a mistake keeps every promise on every broker. Read next: hunt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tests.simulator.mutations.bed import OFTEN, is_there
from tests.simulator.mutations.hunt import Mutation
from trunkline import Context, Retry, Running, Service, Stream, Struct, System
from trunkline.testing.simulator import Client, Simulation, View

orders = Stream("orders", key="order", partitions=2)
stock = Stream("stock", key="order", partitions=2)
payments = Stream("payments", key="order", partitions=2)
told = Stream("told", key="order", partitions=2)


@orders.event
class Placed(Struct):
    order: str
    cents: int


@orders.event
class Changed(Struct):
    order: str
    cents: int


@orders.event
class Closed(Struct):
    order: str
    how: str


@orders.event
class TimeIsUp(Struct):
    order: str


@stock.event
class Reserved(Struct):
    order: str
    cents: int


@stock.event
class Counted(Struct):
    """For a mistake only: how many are left, as somebody has read it."""

    order: str
    left: int


@stock.event
class SoldOut(Struct):
    order: str


@stock.event
class Released(Struct):
    order: str


@payments.event
class Paid(Struct):
    order: str


@payments.event
class Refused(Struct):
    order: str


@told.event
class PriceSeen(Struct):
    order: str
    number: int


class Bank:
    """Takes money once per key."""

    async def charge(self, key: str, cents: int) -> bool:
        raise NotImplementedError


class SimBank:
    def __init__(self) -> None:
        self.charges: dict[str, int] = {}

    def charge(self, key: str, cents: int) -> bool:
        if cents > 1000:
            return False
        self.charges[key] = cents
        return True


class Memory:
    """What a process keeps in its memory."""

    def __init__(self) -> None:
        self.running: Any = None
        self.count: int | None = None
        self.prices: dict[str, int] = {}


STOCK = 3


def shop_system(bug: str) -> System:
    """Return the shop with one mistake in it, or none."""
    services = [_order(bug), _inventory(bug), _payment(bug)]
    return System("shop", services)


def _order(bug: str) -> Service:
    order = Service("order")
    order.schema("CREATE TABLE IF NOT EXISTS o (id TEXT PRIMARY KEY, how TEXT, at REAL)")

    async def close(ctx: Context, name: str, how: str) -> None:
        transaction = await ctx.transaction()
        await transaction.execute("INSERT INTO o VALUES (?, ?, 0)", (name, how))

    @order.handle(retry=OFTEN)
    async def paid(event: Paid, ctx: Context) -> Closed:
        if bug == "ignores what comes late":
            transaction = await ctx.transaction()
            if await transaction.fetch("SELECT 1 FROM o WHERE id = ?", (event.order,)):
                return None  # type: ignore[return-value]
        await close(ctx, event.order, "paid")
        return Closed(event.order, "paid")

    @order.handle(retry=OFTEN)
    async def released(event: Released, ctx: Context) -> Closed:
        await close(ctx, event.order, "refused")
        return Closed(event.order, "refused")

    if bug != "forgets a branch":

        @order.handle(retry=OFTEN)
        async def sold_out(event: SoldOut, ctx: Context) -> Closed:
            await close(ctx, event.order, "sold out")
            return Closed(event.order, "sold out")

    if bug == "ignores what comes late":
        _give_up_soon(order)
    return order


def _give_up_soon(order: Service) -> None:
    @order.handle(retry=OFTEN, publishes=[TimeIsUp])
    async def placed(event: Placed, ctx: Context) -> None:
        ctx.schedule(TimeIsUp(event.order), timedelta(seconds=1))

    @order.handle(retry=OFTEN)
    async def time_is_up(event: TimeIsUp, ctx: Context) -> None:
        transaction = await ctx.transaction()
        await transaction.execute("INSERT OR IGNORE INTO o VALUES (?, 'too late', 0)", (event.order,))


def _inventory(bug: str) -> Service:
    inventory = Service("inventory")
    inventory.schema("CREATE TABLE IF NOT EXISTS s (left INT)")
    inventory.schema("CREATE TABLE IF NOT EXISTS r (id TEXT PRIMARY KEY)")
    inventory.provide(Memory, Memory)

    @inventory.handle(retry=OFTEN)
    async def reserve(event: Placed, ctx: Context, memory: Memory) -> Reserved | SoldOut | Counted:
        transaction = await ctx.transaction()
        rows = await transaction.fetch("SELECT left FROM s")
        if not rows:
            await transaction.execute("INSERT INTO s VALUES (?)", (STOCK,))
        left = rows[0][0] if rows else STOCK
        if bug == "keeps its state in memory":
            left = STOCK if memory.count is None else memory.count
            memory.count = left - 1
        if not left:
            return SoldOut(event.order)
        await transaction.execute("INSERT INTO r VALUES (?)", (event.order,))
        if bug == "reads and writes in two units":
            ctx.publish(Reserved(event.order, event.cents))
            return Counted(event.order, left)
        await transaction.execute("UPDATE s SET left = ?", (left - 1,))
        return Reserved(event.order, event.cents)

    if bug == "reads and writes in two units":

        @inventory.handle(retry=OFTEN)
        async def write(event: Counted, ctx: Context) -> None:
            transaction = await ctx.transaction()
            await transaction.execute("UPDATE s SET left = ?", (event.left - 1,))

    @inventory.handle(retry=OFTEN)
    async def release(event: Refused, ctx: Context) -> Released:
        if bug != "forgets to compensate":
            transaction = await ctx.transaction()
            await transaction.execute("DELETE FROM r WHERE id = ?", (event.order,))
            await transaction.execute("UPDATE s SET left = left + 1")
        return Released(event.order)

    return inventory


def _payment(bug: str) -> Service:
    payment = Service("payment")
    payment.schema("CREATE TABLE IF NOT EXISTS p (id TEXT PRIMARY KEY, cents INT)")
    payment.schema("CREATE TABLE IF NOT EXISTS log (id TEXT)")
    payment.provide(Bank, Bank)
    payment.provide(Memory, Memory)

    @payment.background
    async def remember(running: Running) -> None:
        running.resource(Memory).running = running

    @payment.handle(retry=OFTEN)
    async def charge(event: Reserved, ctx: Context, bank: Bank, memory: Memory) -> Paid | Refused:
        key = memory.running.app.clock.stamp()[0] if bug == "has no idempotency key" else event.order
        if bug == "swallows an exception":
            try:
                taken = await bank.charge(key, event.cents)
            except ConnectionError:
                taken = True
        else:
            taken = await bank.charge(key, event.cents)
        if not taken:
            return Refused(event.order)
        if bug == "writes outside of its unit":
            async with memory.running.unit_of_work() as own:
                transaction = await own.transaction()
                await transaction.execute("INSERT INTO log VALUES (?)", (event.order,))
        else:
            transaction = await ctx.transaction()
            await transaction.execute("INSERT INTO log VALUES (?)", (event.order,))
        if bug == "publishes through the App":
            await memory.running.publish(Paid(event.order))
            return None  # type: ignore[return-value]
        return Paid(event.order)

    return payment


def shop(broker: str, bug: str = "", **options: Any) -> Simulation:
    """Five orders for a stock of three, of which one cannot be paid."""

    async def workload(sim: Client) -> None:
        for number, cents in enumerate((500, 2000, 300, 100, 200), 1):
            await sim.publish(Placed(f"o{number}", cents))

    def each_order_is_closed(view: View) -> None:
        assert len(view.rows("order", "SELECT id FROM o")) == 5, view.rows("order", "SELECT id, how FROM o")

    def what_is_reserved_is_paid(view: View) -> None:
        reserved = {name for (name,) in view.rows("inventory", "SELECT id FROM r")}
        paid = {name for (name,) in view.rows("order", "SELECT id FROM o WHERE how = 'paid'")}
        assert reserved == paid, (reserved, paid)
        (left,) = view.rows("inventory", "SELECT left FROM s") or [(STOCK,)]
        assert left[0] == STOCK - len(reserved), (left, reserved)

    def charged_once_each(view: View) -> None:
        paid = [name for (name,) in view.rows("order", "SELECT id FROM o WHERE how = 'paid'")]
        assert len(view.outside(Bank).charges) == len(paid), (view.outside(Bank).charges, paid)
        log = [name for (name,) in view.rows("payment", "SELECT id FROM log ORDER BY 1")]
        assert log == sorted(paid), (log, paid)

    def never_oversold(view: View) -> None:
        assert len(view.rows("inventory", "SELECT id FROM r")) <= STOCK

    return Simulation(
        shop_system(bug),
        workload,
        broker=broker,
        override={Bank: SimBank},
        always=[never_oversold],
        eventually=[each_order_is_closed, what_is_reserved_is_paid, charged_once_each],
        **options,
    )


# --- prices: order of events, clocks, requests ---


SLOWLY = Retry(immediate=0, delays_s=OFTEN.delays_s, jitter=0.0)


class Screen:
    async def show(self, cents: int) -> None:
        raise NotImplementedError


class SimScreen:
    def show(self, cents: int) -> None:
        pass


def prices_system(bug: str) -> System:
    shelf, label = Service("shelf"), Service("label")
    shelf.schema("CREATE TABLE IF NOT EXISTS asked (order_id TEXT)")
    label.provide(Screen, Screen)
    label.schema("CREATE TABLE IF NOT EXISTS l (id TEXT PRIMARY KEY, cents INT, at REAL)")

    @shelf.handle(publishes=[Changed], retry=OFTEN)
    async def price(event: PriceSeen, ctx: Context) -> None:
        key = f"{event.order}-{event.number}" if bug == "publishes with the wrong key" else event.order
        ctx.publish(Changed(event.order, event.number * 100), key=key)

    @label.handle(retry=SLOWLY)
    async def show(event: Changed, ctx: Context, screen: Screen) -> None:
        await screen.show(event.cents)
        transaction = await ctx.transaction()
        if bug == "orders by the clock":
            newer = "SELECT 1 FROM l WHERE id = ? AND at > ?"
            if await transaction.fetch(newer, (event.order, ctx.message.time)):
                return
        statement = (
            "INSERT INTO l VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET cents = excluded.cents, at = excluded.at"
        )
        await transaction.execute(statement, (event.order, event.cents, ctx.message.time))

    if bug == "expects another stream to be faster":

        @label.handle(retry=SLOWLY)
        async def close(event: Paid, ctx: Context) -> None:
            transaction = await ctx.transaction()
            await transaction.execute("UPDATE l SET cents = 0 WHERE id = ?", (event.order,))

    return System("prices", [shelf, label])


def prices(broker: str, bug: str = "", **options: Any) -> Simulation:
    """Three prices of one thing, asked for by requests that are sent again when no answer comes."""

    async def publish(running: Running, number: int) -> None:
        async with running.unit_of_work() as ctx:
            transaction = await ctx.transaction()
            name = f"thing {number}"
            known = await transaction.fetch("SELECT 1 FROM asked WHERE order_id = ?", (name,))
            if known and bug != "takes a request twice":
                return
            await transaction.execute("INSERT INTO asked VALUES (?)", (name,))
            ctx.publish(PriceSeen("thing", number))

    async def workload(sim: Client) -> None:
        await sim.request("shelf", is_there)
        for number in (1, 2, 3):
            await sim.request("shelf", publish, number)
            await sim.sleep(0.3)
            if bug == "expects another stream to be faster" and number == 3:
                await sim.publish(Changed("other", 700))
                await sim.publish(Paid("other"))

    def newest_price(view: View) -> None:
        if bug == "expects another stream to be faster":
            rows = view.rows("label", "SELECT cents FROM l WHERE id = 'other'")
            assert rows == [(0,)], rows
        rows = view.rows("label", "SELECT cents FROM l WHERE id = 'thing'")
        assert rows == [(300,)], rows

    def asked_once(view: View) -> None:
        rows = view.rows("shelf", "SELECT order_id FROM asked")
        assert len(rows) == 3, rows

    return Simulation(
        prices_system(bug),
        workload,
        broker=broker,
        override={Screen: SimScreen},
        eventually=[newest_price, asked_once],
        **options,
    )


def _mistake(name: str, bed: Callable[..., Simulation], by: str, broker: str = "kafka") -> Mutation:
    return Mutation(name, lambda on: bed(on, name), lambda _patch: None, by, broker)


MISTAKES = (
    _mistake("forgets to compensate", shop, "plain"),
    _mistake("forgets a branch", shop, "plain"),
    _mistake("has no idempotency key", shop, "crash sweep"),
    _mistake("swallows an exception", shop, "point sweep"),
    _mistake("keeps its state in memory", shop, "plain"),
    _mistake("reads and writes in two units", shop, "plain"),
    _mistake("writes outside of its unit", shop, "crash sweep"),
    _mistake("publishes through the App", shop, "crash sweep"),
    _mistake("ignores what comes late", shop, "point sweep"),
    _mistake("publishes with the wrong key", prices, "point sweep"),
    _mistake("orders by the clock", prices, "point sweep"),
    _mistake("expects another stream to be faster", prices, "point sweep"),
    _mistake("takes a request twice", prices, "crash sweep"),
)
