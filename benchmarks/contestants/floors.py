"""Hand-written floors in memory: the least that the same work costs in Python.

Read next: memory.py, which does it with Trunkline.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable

import uvloop

from benchmarks.cases import Run
from benchmarks.contestants.orders import OrderCreated, decode, encode, order

IN_FLIGHT = 1000


async def never_suspends(_order: OrderCreated) -> None:
    """Handle an order at once."""


async def suspends_once(_order: OrderCreated) -> None:
    """Handle an order after one turn of the loop."""
    await asyncio.sleep(0)


def direct_step(run: Run) -> dict[str, float]:
    """Decode and step the handler's coroutine by hand."""
    bodies = [encode(order(number)) for number in range(1000)]
    gc.collect()
    gc.freeze()
    began = time.process_time()
    for number in range(run.messages):
        try:
            never_suspends(decode(bodies[number % 1000])).send(None)
        except StopIteration:
            pass
    return {"cpu_us": (time.process_time() - began) / run.messages * 1e6}


def task_per_message(run: Run, *, suspend: bool) -> dict[str, float]:
    """Decode, then give each message a task of its own, 1,000 in flight."""
    return {"cpu_us": uvloop.run(_tasks(run.messages, suspends_once if suspend else never_suspends))}


async def _tasks(messages: int, handler: Callable[[OrderCreated], Awaitable[None]]) -> float:
    bodies = [encode(order(number)) for number in range(IN_FLIGHT)]

    async def one(body: bytes) -> None:
        await handler(decode(body))

    gc.collect()
    gc.freeze()
    began = time.process_time()
    for _ in range(messages // IN_FLIGHT):
        await asyncio.gather(*[asyncio.create_task(one(body)) for body in bodies])
    return (time.process_time() - began) / (messages // IN_FLIGHT * IN_FLIGHT) * 1e6
