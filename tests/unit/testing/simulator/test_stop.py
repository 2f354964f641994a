"""A process that is told to stop: what it has begun is written as a whole, or not at all."""

import asyncio

from trunkline import Context, Queue, Service, Struct, System
from trunkline.testing.simulator import Simulation
from trunkline.testing.simulator.campaign import Plan, carry_out

notes = Queue("simulated-notes")


@notes.command
class Note(Struct):
    number: int


answers = Queue("simulated-answers")


@answers.command
class Read(Struct):
    number: int


desk, reader = Service("desk"), Service("reader")
desk.schema("CREATE TABLE IF NOT EXISTS asked (number INTEGER PRIMARY KEY)")
reader.schema("CREATE TABLE IF NOT EXISTS noted (number INTEGER PRIMARY KEY)")


async def ask(running, number):
    """What a web request does, outside of handlers."""
    async with running.unit_of_work() as ctx:
        tx = await ctx.transaction()
        if await tx.execute("INSERT INTO asked VALUES (?) ON CONFLICT DO NOTHING", (number,)):
            ctx.publish(Note(number))


@reader.handle
async def note(message: Note, ctx: Context) -> Read:
    await (await ctx.transaction()).execute("INSERT INTO noted VALUES (?)", (message.number,))
    return Read(message.number)


@desk.handle
async def read(message: Read) -> None:
    """Be glad."""


async def customers(sim):
    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(sim.request("desk", ask, number))
            await sim.clock.sleep(0.005)


def asked_is_noted(view):
    assert view.rows("desk", "SELECT number FROM asked") == view.rows("reader", "SELECT number FROM noted")


def test_a_request_that_a_stop_meets_writes_its_rows_and_its_message_or_neither():
    both = System("asking", [desk, reader])
    simulation = Simulation(both, customers, eventually=[asked_is_noted], faults=["stop"])
    report = carry_out(simulation, Plan(crash_sweep=False, points=False, seeds=150))
    assert report.fired["stop"] > 0
    assert report.failures == []
