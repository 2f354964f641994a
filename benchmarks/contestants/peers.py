"""Peers: durable queues of others with the same payload, published and consumed, every message safe on disk.

Each is used as its own documentation shows, with the setting that syncs before it confirms, and in the shape that
suits it best: publish all, then consume and acknowledge all, one process. Runs in the environment of peers.
Read next: postgres.py.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.cases import Run
from benchmarks.contestants.orders import decode, encode, order


def persist_queue(run: Run) -> dict[str, float]:
    """persist-queue, SQLite with acknowledgements: put, get, ack."""
    from persistqueue import SQLiteAckQueue

    queue = SQLiteAckQueue(str(run.folder), multithreading=False, auto_commit=True)
    bodies = [encode(order(number)) for number in range(1000)]
    began = time.perf_counter()
    for number in range(run.messages):
        queue.put(bodies[number % 1000])
    for _ in range(run.messages):
        body = queue.get(block=False)
        decode(body)
        queue.ack(body)
    return {"per_s": run.messages / (time.perf_counter() - began)}


def litequeue(run: Run) -> dict[str, float]:
    """Litequeue: put, pop, done; `synchronous` raised to FULL, for its default may lose the last commits."""
    from litequeue import LiteQueue

    queue = LiteQueue(str(run.folder / "lite.db"))
    queue.conn.execute("PRAGMA synchronous = FULL")
    bodies = [encode(order(number)).decode() for number in range(1000)]
    began = time.perf_counter()
    for number in range(run.messages):
        queue.put(bodies[number % 1000])
    for _ in range(run.messages):
        message = queue.pop()
        decode(message.data)
        queue.done(message.message_id)
    return {"per_s": run.messages / (time.perf_counter() - began)}


def huey(run: Run) -> dict[str, float]:
    """Huey on SQLite, synced: enqueue, dequeue, execute, without the worker's own waits."""
    from huey import SqliteHuey

    tasks = SqliteHuey(filename=str(run.folder / "huey.db"), fsync=True, results=False)

    @tasks.task()
    def handle(body: bytes) -> None:
        decode(body)

    bodies = [encode(order(number)) for number in range(1000)]
    began = time.perf_counter()
    for number in range(run.messages):
        handle(bodies[number % 1000])
    for _ in range(run.messages):
        tasks.execute(tasks.dequeue())
    return {"per_s": run.messages / (time.perf_counter() - began)}


def faststream(run: Run) -> dict[str, float]:
    """FastStream's pipeline in memory: its test broker for NATS, a pydantic payload; CPU per message."""
    return asyncio.run(_faststream(run.messages))


async def _faststream(messages: int) -> dict[str, float]:
    from faststream.nats import NatsBroker, TestNatsBroker

    from benchmarks.contestants.pydantic_orders import Order, pydantic_order

    broker = NatsBroker()
    count = 0

    @broker.subscriber("orders")
    async def handle(_order: Order) -> None:
        nonlocal count
        count += 1

    orders = [pydantic_order(number) for number in range(1000)]
    async with TestNatsBroker(broker):
        began = time.process_time()
        for number in range(messages):
            await broker.publish(orders[number % 1000], "orders")
        took = time.process_time() - began
    if count != messages:
        raise RuntimeError(f"handled {count} of {messages}")
    return {"cpu_us": took / messages * 1e6}
