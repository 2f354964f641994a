"""The systems in which the catalogue plants its bugs, each with what it is given to do and what must hold.

Invariant: without a mutation no search finds anything in them, on any broker. Read next: safeguards.py, mistakes.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from trunkline import Batch, Context, Queue, Retry, Service, Stream, Struct, System, Topic
from trunkline.testing.simulator import Client, Simulation, View
from trunkline.testing.simulator.loop import LANE

OFTEN = Retry(immediate=1, delays_s=(1.0, 2.0, *[5.0] * 12), jitter=0.0)
"""More tries than faults before everything heals can use up."""


# --- the desk: a Stream with retries, long handlers, a message that kills its process, one that is refused ---

jobs = Stream("jobs", key="account", partitions=2)
notes = Stream("notes", key="account", partitions=2)


@jobs.event
class Job(Struct):
    """One piece of work of an account.

    Attributes:
        failures: its first so many tries fail.
        takes_s: how long a try of the slow reader takes. holds_s: how long a try of the other one takes.
        kills: whether a try takes its process down. refused: whether it is refused until it is changed.
    """

    account: str
    number: int
    failures: int = 0
    takes_s: float = 0.0
    holds_s: float = 0.0
    kills: bool = False
    refused: bool = False


@notes.event
class Noted(Struct):
    account: str
    number: int


class Machine:
    """Counts tries; the real one would be a device."""

    async def tried(self, job: str) -> int:
        raise NotImplementedError

    async def is_fixed(self) -> bool:
        raise NotImplementedError


class SimMachine:
    def __init__(self) -> None:
        self.tries: dict[str, int] = {}
        self.fixed = False

    def tried(self, job: str) -> int:
        self.tries[job] = self.tries.get(job, 0) + 1
        return self.tries[job]

    def is_fixed(self) -> bool:
        return self.fixed


async def die() -> None:
    """End this process as the kernel does when memory runs out."""
    lane = LANE.get()
    lane.world._died(lane)
    await asyncio.get_running_loop().create_future()


def desk_system() -> System:
    desk, book = Service("desk"), Service("book")
    desk.schema("CREATE TABLE IF NOT EXISTS done (account TEXT, number INT)")
    book.schema("CREATE TABLE IF NOT EXISTS noted (account TEXT, number INT)")
    desk.provide(Machine, Machine)

    @desk.handle(retry=OFTEN, publishes=[Noted])
    async def work(job: Job, ctx: Context, machine: Machine) -> None:
        tries = await machine.tried(f"{job.account}{job.number}") if job.failures or job.holds_s else 0
        if job.refused and not await machine.is_fixed():
            raise NotImplementedError(job.number)
        if job.holds_s:
            await asyncio.sleep(job.holds_s)
        transaction = await ctx.transaction()
        await transaction.execute("INSERT INTO done VALUES (?, ?)", (job.account, job.number))
        ctx.publish(Noted(job.account, job.number))
        if job.kills:
            await die()
        if tries and tries <= job.failures:
            raise OSError(f"try {tries} fails")

    @desk.handle(subscription="desk-slow", retry=OFTEN)
    async def work_slowly(job: Job) -> None:
        if job.takes_s:
            await asyncio.sleep(job.takes_s)

    @book.handle
    async def note(noted: Noted, ctx: Context) -> None:
        transaction = await ctx.transaction()
        await transaction.execute("INSERT INTO noted VALUES (?, ?)", (noted.account, noted.number))

    return System("office", [desk, book])


def once_each(service: str, table: str, count: int) -> Callable[[View], None]:
    def check(view: View) -> None:
        rows = view.rows(service, f"SELECT account, number, count(*) FROM {table} GROUP BY 1, 2")
        assert all(times == 1 for _, _, times in rows), rows
        assert len(rows) == count, rows

    check.__name__ = f"{table}_once_each"
    return check


def desk(broker: str, **options: Any) -> Simulation:
    """Jobs of two accounts, some of which fail at first, others take long."""

    async def workload(sim: Client) -> None:
        await sim.publish(Job("a", 1, takes_s=0.5))
        await sim.publish(Job("b", 1, failures=4))
        await sim.publish(Job("a", 2))
        await sim.publish(Job("b", 2))
        await sim.sleep(1.5)
        await sim.publish(Job("b", 3, takes_s=0.1))
        await sim.publish(Job("a", 3, takes_s=0.1))
        await sim.publish(Job("a", 4))
        await sim.sleep(2.5)
        await sim.publish(Job("b", 4))

    return Simulation(
        desk_system(),
        workload,
        broker=broker,
        override={Machine: SimMachine},
        eventually=[once_each("desk", "done", 8), once_each("book", "noted", 8)],
        **options,
    )


def desks(broker: str) -> Simulation:
    """The same in two processes of each service."""
    return desk(broker, processes=2)


def retries(broker: str, **options: Any) -> Simulation:
    """Jobs whose tries take long and fail at first; what waits behind them."""

    async def workload(sim: Client) -> None:
        await sim.publish(Job("a", 1, failures=3, holds_s=0.9))
        for account in "bcde":
            await sim.publish(Job(account, 1, failures=2, holds_s=0.1))
        await sim.publish(Job("a", 2, failures=2))
        await sim.publish(Job("b", 2))

    return Simulation(
        desk_system(),
        workload,
        broker=broker,
        override={Machine: SimMachine},
        eventually=[once_each("desk", "done", 7), once_each("book", "noted", 7)],
        **options,
    )


def retries_of_two(broker: str) -> Simulation:
    """The same in two processes of each service."""
    return retries(broker, processes=2)


def killer(broker: str, **options: Any) -> Simulation:
    """A job that takes its process down whenever it is tried, among others that do not."""

    async def workload(sim: Client) -> None:
        await sim.publish(Job("b", 1, kills=True))
        for account in "acd":
            await sim.publish(Job(account, 1))
        for _ in range(60):
            if await sim.request("desk", set_aside):
                break
            await sim.sleep(5)
        await sim.request("desk", discard)

    def only_the_killer(view: View) -> None:
        assert view.rows("desk", "SELECT account FROM done ORDER BY 1") == [("a",), ("c",), ("d",)]

    return Simulation(
        desk_system(),
        workload,
        broker=broker,
        override={Machine: SimMachine},
        eventually=[only_the_killer],
        dead_letters=True,
        rest_s=600.0,
        **options,
    )


async def is_there(_running: Any) -> None:
    pass


async def set_aside(running: Any) -> int:
    return len(await running.app.store.dead_letters())


async def discard(running: Any) -> None:
    for row in await running.app.store.dead_letters():
        await running.app.store.discard_dead_letter(row.number)


async def redrive(running: Any) -> None:
    for row in await running.app.store.dead_letters():
        await running.app.store.redrive(row.number)


def refusal(broker: str, **options: Any) -> Simulation:
    """A job that is set aside until its cause is mended; those behind it wait."""

    async def workload(sim: Client) -> None:
        await sim.publish(Job("a", 1, refused=True))
        await sim.publish(Job("a", 2))
        await sim.publish(Job("b", 1))
        while not await sim.request("desk", set_aside):
            await sim.sleep(5)
        sim.outside(Machine).fixed = True
        await sim.request("desk", redrive)

    return Simulation(
        desk_system(),
        workload,
        broker=broker,
        override={Machine: SimMachine},
        eventually=[once_each("desk", "done", 3), once_each("book", "noted", 3)],
        dead_letters=True,
        **options,
    )


def deploy(broker: str, **options: Any) -> Simulation:
    """Jobs that take a while, in processes that are stopped and started again, and never die."""

    async def workload(sim: Client) -> None:
        for number in (1, 2, 3):
            for account in "ab":
                await sim.publish(Job(account, number, holds_s=0.3))
            await sim.sleep(0.2)

    def tried_once_each(view: View) -> None:
        tries = view.outside(Machine).tries
        assert sorted(tries.values()) == [1] * 6, tries

    return Simulation(
        desk_system(),
        workload,
        broker=broker,
        override={Machine: SimMachine},
        eventually=[once_each("desk", "done", 6), tried_once_each],
        faults=("stop",),
        **options,
    )


# --- the post: a Queue with a `def` handler, a Topic, a batch, a schedule, tenants ---

letters = Queue("letters")
posted = Topic("posted")
weights = Stream("weights", key="box", partitions=2)
reminders = Queue("reminders")


@letters.command
class Letter(Struct):
    number: int


@posted.event
class Posted(Struct):
    number: int


@weights.event
class Weight(Struct):
    box: str
    grams: int


@reminders.command
class Remind(Struct):
    number: int
    not_before: float


def post_system() -> System:
    office, reader, scale = Service("office"), Service("reader"), Service("scale")
    office.schema("CREATE TABLE IF NOT EXISTS sent (number INT)")
    reader.schema("CREATE TABLE IF NOT EXISTS read (number INT, times INT, early INT)")

    @office.handle(retry=OFTEN)
    def post(letter: Letter, ctx: Context) -> Posted:
        return Posted(letter.number)

    @reader.handle(publishes=[Remind], retry=OFTEN)
    async def read(event: Posted, ctx: Context) -> None:
        transaction = await ctx.transaction()
        await transaction.execute("INSERT INTO read VALUES (?, 0, 0)", (event.number,))
        ctx.schedule(Remind(event.number, LANE.get().world.loop.time() + 3.0), timedelta(seconds=3))

    @reader.handle(retry=OFTEN)
    async def remind(command: Remind, ctx: Context) -> None:
        transaction = await ctx.transaction()
        early = LANE.get().world.loop.time() < command.not_before
        await transaction.execute(
            "UPDATE read SET times = times + 1, early = early + ? WHERE number = ?", (early, command.number)
        )

    @scale.handle(retry=OFTEN, batch=Batch(size=3, wait_s=0.02))
    async def weigh(items: list[Weight]) -> None:
        await asyncio.sleep(0.2)

    return System("post", [office, reader, scale])


def post(broker: str, **options: Any) -> Simulation:
    """Letters, what is told of them, and boxes that are weighed together; two customers count from 1 each."""

    async def workload(sim: Client) -> None:
        await sim.request("reader", is_there)  # a Topic is heard by those who are there
        for number in (1, 2):
            await sim.publish(Letter(number))
        for number, tenant in enumerate(("one", "two", "one")):
            await sim.publish(Weight("x", number), id=str(number // 2), tenantid=tenant)
        await sim.publish(Letter(3))
        await sim.publish(Weight("y", 8))

    def all_read(view: View) -> None:
        rows = view.rows("reader", "SELECT number, times FROM read ORDER BY 1")
        assert rows == [(1, 1), (2, 1), (3, 1)], rows

    def none_early(view: View) -> None:
        if not view._world.faults.fired.keys() & {"clock_skew", "clock_jump"}:
            assert view.rows("reader", "SELECT number FROM read WHERE early > 0") == []

    return Simulation(post_system(), workload, broker=broker, eventually=[all_read, none_early], **options)
