"""Redis Streams without Trunkline: redis-py by hand, and FastStream. Runs in the environment of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from benchmarks.cases import Run
from benchmarks.contestants.broker import (
    BODIES,
    OUTSTANDING,
    Stopwatch,
    Together,
    fresh_name,
    outstanding,
    own_server,
    publish_and_consume,
    url_of,
)
from benchmarks.contestants.orders import decode

BATCH = 100


def raw_consume(run: Run) -> dict[str, float]:
    """Read 100 at a time, decode, acknowledge and delete them in one pipeline."""
    import uvloop

    return uvloop.run(_raw_consume(run))


async def _raw_consume(run: Run) -> dict[str, float]:
    client = _client(run)
    name = await _filled_stream(client, run)
    watch = Stopwatch()
    await _consume(client, name, run.messages)
    measured = watch.read(run.messages)
    await client.aclose()
    return measured


async def _consume(client: Any, name: str, messages: int) -> None:
    handled = 0
    while handled < messages:
        ((_, entries),) = await client.xreadgroup(name, "one", {name: ">"}, count=BATCH, block=0)
        for _, fields in entries:
            decode(fields[b"e"])
        ids = [number for number, _ in entries]
        pipeline = client.pipeline(transaction=False)
        pipeline.xack(name, name, *ids)
        pipeline.xdel(name, *ids)
        await pipeline.execute()
        handled += len(ids)


def raw_publish(run: Run) -> dict[str, float]:
    """Add 100 at a time in a pipeline."""
    import uvloop

    return uvloop.run(_raw_publish(run))


async def _raw_publish(run: Run) -> dict[str, float]:
    client = _client(run)
    name = fresh_name()
    watch = Stopwatch()
    await _add_all(client, name, run.messages, OUTSTANDING)
    measured = watch.read(run.messages)
    await client.aclose()
    return measured


def end_to_end(run: Run) -> dict[str, float]:
    """Add from 100 tasks, what waits at the same time in one pipeline; read at the same time as `raw_consume` does."""
    import uvloop

    with own_server(run, "redis") as own:
        return uvloop.run(_end_to_end(own))


async def _end_to_end(run: Run) -> dict[str, float]:
    client = _client(run)
    name = await _stream(client)
    together = Together(lambda numbers: _add(client, name, numbers))
    measured = await publish_and_consume(run.messages, together.publish, _consume(client, name, run.messages))
    await client.aclose()
    return measured


def faststream_consume(run: Run) -> dict[str, float]:
    """A subscriber of a group with a pydantic payload; acknowledged when the handler is done."""
    return asyncio.run(_faststream_consume(run))


async def _faststream_consume(run: Run) -> dict[str, float]:
    from faststream import AckPolicy
    from faststream.redis import RedisBroker, StreamSub

    from benchmarks.contestants.pydantic_orders import Order, pydantic_order

    name = fresh_name()
    broker = RedisBroker(url_of(run), logger=None)
    handled, watch = 0, None
    done = asyncio.Event()
    subscription = StreamSub(name, group=name, consumer="one", last_id=">", max_records=BATCH)

    @broker.subscriber(stream=subscription, ack_policy=AckPolicy.NACK_ON_ERROR)
    async def handle(_order: Order) -> None:
        nonlocal handled, watch
        handled += 1
        if watch is None:
            watch = Stopwatch()
        if handled == run.messages:
            done.set()

    client = _client(run)
    await client.xgroup_create(name, name, "0", mkstream=True)
    orders = [pydantic_order(number) for number in range(1000)]
    async with broker:
        await outstanding(run.messages, lambda number: broker.publish(orders[number % 1000], stream=name))
        await broker.start()
        await done.wait()
        assert watch is not None
        measured = watch.read(run.messages)
    await client.aclose()
    return measured


def faststream_publish(run: Run) -> dict[str, float]:
    """100 callers that await each publish."""
    return asyncio.run(_faststream_publish(run))


async def _faststream_publish(run: Run) -> dict[str, float]:
    from faststream.redis import RedisBroker

    from benchmarks.contestants.pydantic_orders import pydantic_order

    name = fresh_name()
    orders = [pydantic_order(number) for number in range(1000)]
    async with RedisBroker(url_of(run), logger=None) as broker:
        return await outstanding(run.messages, lambda number: broker.publish(orders[number % 1000], stream=name))


def _client(run: Run) -> Any:
    from redis.asyncio import Redis

    return Redis.from_url(url_of(run))


async def _filled_stream(client: Any, run: Run) -> str:
    name = await _stream(client)
    await _add_all(client, name, run.messages, 1000)
    return name


async def _stream(client: Any) -> str:
    name = fresh_name()
    await client.xgroup_create(name, name, "0", mkstream=True)
    return name


async def _add_all(client: Any, name: str, messages: int, batch: int) -> None:
    for first in range(0, messages, batch):
        await _add(client, name, range(first, min(first + batch, messages)))


async def _add(client: Any, name: str, numbers: Iterable[int]) -> None:
    pipeline = client.pipeline(transaction=False)
    for number in numbers:
        pipeline.xadd(name, {"e": BODIES[number % 1000]})
    await pipeline.execute()
