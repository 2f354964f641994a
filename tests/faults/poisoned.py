"""A service with a message that kills its process each time; `python -m tests.faults.poisoned FILE`."""

import logging
import os
import signal
import sys

from trunkline import App, Context, Queue, Retry, Service, Stream, Struct

orders = Stream("poisoned-orders", key="key")
jobs = Queue("poisoned-jobs")


@orders.event
class Order(Struct):
    key: str
    number: int
    deadly: bool = False
    bad: bool = False


@jobs.command
class Job(Struct):
    number: int


worker = Service("poisoned")
worker.schema(
    "CREATE TABLE IF NOT EXISTS effect"
    " (n INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, number INTEGER NOT NULL)"
)
once = Retry(immediate=1, delays_s=())


@worker.handle(retry=once)
async def note(order: Order, ctx: Context) -> None:
    if order.deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    if order.bad:
        raise ValueError(f"order {order.number} is bad")
    tx = await ctx.transaction()
    await tx.execute("INSERT INTO effect (key, number) VALUES (?, ?)", (order.key, order.number))


@worker.handle(retry=once)
async def work(job: Job, ctx: Context) -> None:
    tx = await ctx.transaction()
    await tx.execute("INSERT INTO effect (key, number) VALUES ('job', ?)", (job.number,))


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    App(worker, f"sqlite:///{sys.argv[1]}").run()
