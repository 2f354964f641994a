"""Trunkline on a file that already holds much: waiting, delayed and parked messages.

Read next: start.py.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import uvloop

from benchmarks.cases import Run
from benchmarks.contestants.embedded import declare, fill, load, url
from benchmarks.contestants.orders import OrderCreated, OrderPriced, order
from trunkline import App, Queue, Retry, Service

DELAYED_SHARE = 100
PARKED_SHARE = 1000
"""Of 1,000,000 waiting messages: 10,000 delayed, 1,000 parked keys."""


def make(run: Run) -> dict[str, float]:
    """Fill a file: orders that wait in a queue, prices to be sent tomorrow, orders parked until tomorrow."""
    given = json.dumps({"messages": run.messages, "folder": str(run.folder), "shared": "", "options": {}})
    # A process of its own: there the orders' home is another channel.
    subprocess.run([sys.executable, "-m", "benchmarks.contest", "large:park", given], check=True)
    uvloop.run(_make(run.folder, run.messages))
    return {}


async def _make(folder: Path, messages: int) -> None:
    declare("queue")
    await fill(folder, messages)
    prices = Queue("prices")
    prices.command(OrderPriced)
    tomorrow = timedelta(days=1)
    async with App(Service("order"), transport=url(folder)) as app:
        delayed = (app.schedule(OrderPriced(str(n), n), tomorrow) for n in range(max(1, messages // DELAYED_SHARE)))
        await asyncio.gather(*delayed)


def park(run: Run) -> dict[str, float]:
    """Let the first try of so many keys fail; the next is tomorrow."""
    uvloop.run(_park(run.folder, max(1, run.messages // PARKED_SHARE)))
    return {}


async def _park(folder: Path, keys: int) -> None:
    declare("stream")
    service = Service("payment")
    failed = 0
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @service.handle(retry=Retry(immediate=0, delays_s=(86_400.0,)))
    async def refuse(_order: OrderCreated) -> None:
        nonlocal failed
        failed += 1
        if failed == keys:
            done.set_result(None)
        raise ConnectionError("the bank is closed until tomorrow")

    async with App(service, transport=url(folder)) as app:
        for number in range(keys):
            await app.publish(order(1_000_000 + number))
        await done


def beside(run: Run, *, full: bool) -> dict[str, float]:
    """Publish and handle on the stream, with the rest in the same file, or in an empty file."""
    _copy(run, full=full)
    return uvloop.run(load(run.folder, run.messages // 10, "stream"))


def working_off(run: Run, *, full: bool) -> dict[str, float]:
    """Publish to and handle from the queue where the others wait, or an empty one."""
    _copy(run, full=full)
    return uvloop.run(load(run.folder, run.messages // 10, "queue"))


def _copy(run: Run, *, full: bool) -> None:
    if full:
        for path in run.shared.glob("trunkline.db*"):
            shutil.copy(path, run.folder / path.name)
