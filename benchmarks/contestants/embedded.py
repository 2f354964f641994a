"""Trunkline on the embedded engine.

Read next: large.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import uvloop

from benchmarks.cases import Run
from benchmarks.contestants.handwritten import latencies
from benchmarks.contestants.orders import OrderCreated, OrderPriced, order
from trunkline import App, Context, Queue, Service, Stream, Topic

Kind = Literal["stream", "queue", "topic"]


def declare(kind: Kind) -> Stream | Queue | Topic:
    """Declare the channel that carries orders."""
    if kind == "queue":
        queue = Queue("orders")
        queue.command(OrderCreated)
        return queue
    channel = Topic("order-news") if kind == "topic" else Stream("order-events", key="order_id")
    channel.event(OrderCreated)
    return channel


class Counting:
    """A service whose handler counts; `await done` returns when it has seen so many."""

    def __init__(self, messages: int) -> None:
        self.service = Service("payment")
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.count = 0

        @self.service.handle
        async def charge(_order: OrderCreated) -> None:
            self.count += 1
            if self.count == messages:
                self.done.set_result(time.monotonic())


async def publish_from_100(app: App, messages: int) -> None:
    """Publish from 100 tasks; each waits for the confirmation of one before it goes on."""
    orders = [order(number) for number in range(1000)]

    async def publisher(first: int) -> None:
        for number in range(first, messages, 100):
            await app.publish(orders[number % 1000])

    await asyncio.gather(*(publisher(first) for first in range(100)))


def url(folder: Path) -> str:
    """Return the transport's URL of a file in `folder`."""
    return f"sqlite:///{folder}/trunkline.db"


def one_process(run: Run, *, kind: Kind) -> dict[str, float]:
    """Publish from 100 tasks; published, confirmed, handled, acknowledged, effects once."""
    return uvloop.run(load(run.folder, run.messages, kind))


async def load(folder: Path, messages: int, kind: Kind) -> dict[str, float]:
    """Publish so many messages and handle as many, on the file in `folder`.

    Returns: how many were published in a second, how many handled and acknowledged, be they these or what waited
        before them, and peak memory.
    """
    declare(kind)
    counting = Counting(messages)
    async with App(counting.service, transport=url(folder)) as app:
        gc.collect()
        gc.freeze()
        began = time.monotonic()
        await publish_from_100(app, messages)
        await counting.done
        handled = counting.count
        await app.publish(order(0))  # its commit comes after the last acknowledgement
        took = time.monotonic() - began
    return {
        "per_s": messages / took,
        "handled_per_s": handled / took,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def two_processes(run: Run, *, kind: Kind) -> dict[str, float]:
    """One process publishes from 100 tasks, the other handles."""
    given = json.dumps(
        {"messages": run.messages, "folder": str(run.folder), "shared": "", "options": {"kind": kind}}
    )  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.contest"]
    with subprocess.Popen([*command, "embedded:consume", given], stdout=subprocess.PIPE, text=True) as consumer:
        assert consumer.stdout is not None
        consumer.stdout.readline()  # it is ready
        with subprocess.Popen([*command, "embedded:produce", given], stdout=subprocess.PIPE, text=True) as producer:
            began = json.loads(producer.communicate()[0])["began"]
        ended = json.loads(consumer.communicate()[0])["ended"]
    return {"per_s": run.messages / (ended - began)}


def produce(run: Run, *, kind: Kind) -> dict[str, float]:
    """Publish only."""
    return {"began": uvloop.run(_produce(run, kind))}


async def _produce(run: Run, kind: Kind) -> float:
    declare(kind)
    async with App(Service("order"), transport=url(run.folder)) as app:
        began = time.monotonic()
        await publish_from_100(app, run.messages)
    return began


def consume(run: Run, *, kind: Kind) -> dict[str, float]:
    """Handle only."""
    return {"ended": uvloop.run(_consume(run, kind))}


async def _consume(run: Run, kind: Kind) -> float:
    declare(kind)
    counting = Counting(run.messages)
    async with App(counting.service, transport=url(run.folder)):
        print("ready", flush=True)
        return await counting.done


def one_at_a_time(run: Run) -> dict[str, float]:
    """Publish one message, wait for its confirmation, publish the next."""
    return latencies(uvloop.run(_one_at_a_time(run)))


async def _one_at_a_time(run: Run) -> list[float]:
    declare("stream")
    took = []
    async with App(Service("order"), transport=url(run.folder)) as app:
        placed = order(1)
        for _ in range(run.messages):
            began = time.perf_counter()
            await app.publish(placed)
            took.append(time.perf_counter() - began)
    return took


def handler_with_insert(run: Run) -> dict[str, float]:
    """Work off waiting orders: each handler inserts a row of its own and publishes one message."""
    return {"per_s": uvloop.run(_handler_with_insert(run))}


async def _handler_with_insert(run: Run) -> float:
    declare("queue")
    await fill(run.folder, run.messages)
    prices = Stream("prices", key="order_id")
    prices.event(OrderPriced)
    service = Service("payment")
    service.schema(
        "CREATE TABLE IF NOT EXISTS charge (id INTEGER PRIMARY KEY, order_id TEXT NOT NULL, cents INTEGER NOT NULL)"
    )
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    count = 0
    began = 0.0

    @service.handle(concurrency=64)
    async def charge(placed: OrderCreated, ctx: Context) -> OrderPriced:
        nonlocal count, began
        if not began:
            began = time.monotonic()
        transaction = await ctx.transaction()
        await transaction.execute(
            "INSERT INTO charge (order_id, cents) VALUES (?, ?)", (placed.order_id, placed.total_cents)
        )
        count += 1
        if count == run.messages:
            done.set_result(None)
        return OrderPriced(placed.order_id, placed.total_cents)

    gc.collect()
    gc.freeze()
    async with App(service, transport=url(run.folder)) as app:
        await done
        await app.publish(OrderPriced("last", 0))  # its commit comes after that of the last handler
        return run.messages / (time.monotonic() - began)


async def fill(folder: Path, messages: int) -> None:
    """Publish so many orders that nobody reads yet."""
    orders = [order(number) for number in range(1000)]
    async with App(Service("order"), transport=url(folder)) as app:
        for first in range(0, messages, 1000):
            await app.publish_all(orders[: min(1000, messages - first)])
