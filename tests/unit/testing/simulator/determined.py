"""Simulations for test_determinism.py, loaded in other processes too: one that repeats, and three that do not."""

import datetime as dt
import uuid

from trunkline import Context, Service, Stream, Struct, System
from trunkline.testing.simulator import Client, Simulation

orders = Stream("orders", key="order", partitions=2)
ends = Stream("ends", key="order", partitions=2)


@orders.event
class Ordered(Struct):
    order: str


@ends.event
class Ended(Struct):
    order: str
    stamp: str


shop = Service("shop")
archive = Service("archive")
shop.schema("CREATE TABLE IF NOT EXISTS ordered (name TEXT PRIMARY KEY, at TEXT DEFAULT CURRENT_TIMESTAMP)")


@shop.handle
async def end(message: Ordered, context: Context) -> Ended:
    transaction = await context.transaction()
    await transaction.execute("INSERT INTO ordered (name) VALUES (?)", (message.order,))
    return Ended(message.order, f"{uuid.uuid4()} {dt.datetime.now()}")


@archive.handle
async def keep(_: Ended) -> None:
    pass


def _publishing(names) -> Simulation:
    async def workload(client: Client) -> None:
        for name in names():
            await client.publish(Ordered(name))

    return Simulation(System("determined", [shop, archive]), workload, broker="kafka")


class ByAddress:
    def __init__(self, name: str) -> None:
        self.name = name


_numbers = (number for number in range(1_000_000))  # not a count, which each run finds as it was

repeats = _publishing(lambda: ["a", "b", "c"])
by_text = _publishing(lambda: {"a", "b", "c", "d", "e"})
by_address = _publishing(lambda: [each.name for each in {ByAddress(str(number)) for number in range(8)}])
by_run = _publishing(lambda: [f"order {next(_numbers)}"])


def made() -> Simulation:
    return repeats
