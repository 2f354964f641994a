"""Trunkline on the memory transport: publish → decode → handle → settle.

Read next: embedded.py.
"""

from __future__ import annotations

import asyncio
import gc
import time

import uvloop

from benchmarks.cases import Run
from benchmarks.contestants.orders import OrderCreated, order
from trunkline import App, Service, Stream


def one_by_one(run: Run, *, suspend: bool) -> dict[str, float]:
    """Publish with `await app.publish(...)`, one message at a time."""
    return {"cpu_us": uvloop.run(_measure(run.messages, suspend=suspend, batch=1))}


def in_batches(run: Run, *, suspend: bool) -> dict[str, float]:
    """Publish with `await app.publish_all(...)`, 100 messages at a time."""
    return {"cpu_us": uvloop.run(_measure(run.messages, suspend=suspend, batch=100))}


async def _measure(messages: int, *, suspend: bool, batch: int) -> float:
    stream = Stream("order-events", key="order_id")
    stream.event(OrderCreated)
    service = Service("payment")
    handled = asyncio.Semaphore(0)
    count = 0

    if suspend:

        @service.handle
        async def charge(_order: OrderCreated) -> None:
            nonlocal count
            await asyncio.sleep(0)
            count += 1
            if count % 100 == 0:
                handled.release()

    else:

        @service.handle
        async def charge_at_once(_order: OrderCreated) -> None:
            nonlocal count
            count += 1
            if count % 100 == 0:
                handled.release()

    orders = [order(number) for number in range(1000)]
    async with App(service, transport="memory:") as app:
        gc.collect()
        gc.freeze()
        began = time.process_time()
        for first in range(0, messages, 100):
            hundred = orders[first % 1000 : first % 1000 + 100]
            if batch == 1:
                for each in hundred:
                    await app.publish(each)
            else:
                await app.publish_all(hundred)
            await handled.acquire()
        return (time.process_time() - began) / messages * 1e6
