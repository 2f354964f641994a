"""Trunkline on a broker: an App as a user writes it.

Read next: sharing.py; kafka.py, rabbitmq.py, nats.py, redis.py, postgres_queue.py, what it is compared with.
"""

from __future__ import annotations

import asyncio
import gc

from benchmarks.cases import Run
from benchmarks.contestants.broker import Stopwatch, fresh_name, outstanding, url_of
from benchmarks.contestants.orders import OrderCreated, order
from trunkline import App, Queue, Service, Stream

BATCH = 1000
PARTITIONS = 8


def consume(run: Run, kind: str, store: str) -> dict[str, float]:
    """Handle and acknowledge a backlog with one process."""
    return _run(_consume(run, kind, store))


def publish(run: Run, kind: str) -> dict[str, float]:
    """Publish one by one, each awaited until it is confirmed, 100 callers at once."""
    return _run(_publish(run, kind))


def _run(work) -> dict[str, float]:  # noqa: ANN001
    import uvloop

    return uvloop.run(work)


def declare(kind: str) -> None:
    """Give the order its home."""
    if kind == "stream":
        Stream("orders", key="order_id", partitions=PARTITIONS).event(OrderCreated)
    else:
        Queue("orders").command(OrderCreated)


def address(run: Run) -> str:
    """Return the broker's URL, with room of its own for this run."""
    url = url_of(run)
    return f"{url}{'&' if '?' in url else '?'}prefix={fresh_name()}"


def _store(run: Run, store: str) -> str:
    """`none:`, `sqlite:` for a file of its own, or the transport's own database."""
    return f"sqlite:///{run.folder / 'store.db'}" if store == "sqlite" else store


async def _consume(run: Run, kind: str, store: str) -> dict[str, float]:
    declare(kind)
    url = address(run)
    service = Service("reader")
    handled = 0
    watch = Stopwatch()
    done = asyncio.Event()
    messages = run.messages

    @service.handle(after_dead_letter="continue")
    async def handle(_order: OrderCreated) -> None:
        nonlocal handled, watch
        handled += 1
        if handled == 1:
            watch = Stopwatch()  # joining a group takes seconds and is not what is measured
        if handled == messages:
            done.set()

    place = url if store == "own" else _store(run, store)
    await fill(run, url, place)
    gc.collect()
    gc.freeze()
    async with App(service, transport=url, store=place) as app:
        await done.wait()
        await settled(app)
        return watch.read(messages)


async def fill(run: Run, url: str, store: str) -> None:
    """Publish the backlog."""
    orders = [order(number) for number in range(BATCH)]
    publisher = Service("publisher")
    async with App(publisher, transport=url, store=store) as app:
        for first in range(0, run.messages, BATCH):
            await app.publish_all(orders[: min(BATCH, run.messages - first)])


async def settled(app: App) -> None:
    """Wait until the broker has every acknowledgement."""
    for consumer in app._consumers:  # noqa: SLF001
        while (await app.transport.backlog(consumer.subscription)).waiting:  # noqa: ASYNC110 - it is the broker's
            await asyncio.sleep(0.005)


async def _publish(run: Run, kind: str) -> dict[str, float]:
    declare(kind)
    orders = [order(number) for number in range(1000)]
    async with App(Service("publisher"), transport=address(run), store="none:") as app:
        gc.collect()
        gc.freeze()
        return await outstanding(run.messages, lambda number: app.publish(orders[number % 1000]))
