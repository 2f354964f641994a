"""RabbitMQ without Trunkline: aiormq by hand on a quorum queue, and FastStream. Runs in the environment of peers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.cases import Run
from benchmarks.contestants.broker import (
    BODIES,
    Stopwatch,
    fresh_name,
    outstanding,
    own_server,
    publish_and_consume,
    url_of,
)
from benchmarks.contestants.orders import decode

PREFETCH = 1000
ACK_EVERY = 100


def raw_consume(run: Run) -> dict[str, float]:
    """Callbacks, decoded, every hundredth delivery acknowledged with all before it."""
    import uvloop

    return uvloop.run(_raw_consume(run))


async def _raw_consume(run: Run) -> dict[str, float]:
    import aiormq

    connection = await aiormq.connect(url_of(run))
    name = await _filled_queue(connection, run)
    channel = await connection.channel(publisher_confirms=False)
    watch = await _consume(channel, name, run.messages)
    measured = watch.read(run.messages)
    await connection.close()
    return measured


async def _consume(channel: Any, name: str, messages: int) -> Stopwatch:
    """Return a stopwatch that was started with the first delivery, once the last acknowledgement has left."""
    await channel.basic_qos(prefetch_count=PREFETCH)
    handled, watch = 0, None
    done = asyncio.Event()

    async def handle(message: Any) -> None:
        nonlocal handled, watch
        if watch is None:
            watch = Stopwatch()
        decode(message.body)
        handled += 1
        if handled % ACK_EVERY == 0 or handled == messages:
            await channel.basic_ack(message.delivery_tag, multiple=True, wait=False)
        if handled == messages:
            done.set()

    await channel.basic_consume(name, handle)
    await done.wait()
    assert watch is not None
    return watch


def raw_publish(run: Run) -> dict[str, float]:
    """100 callers that await each confirmation."""
    import uvloop

    return uvloop.run(_raw_publish(run))


async def _raw_publish(run: Run) -> dict[str, float]:
    import aiormq

    connection = await aiormq.connect(url_of(run))
    name = await _queue(connection)
    measured = await outstanding(run.messages, await _publisher(connection, name))
    await connection.close()
    return measured


async def _publisher(connection: Any, name: str) -> Callable[[int], Awaitable[object]]:
    """Return what publishes the message of a number and awaits its confirmation."""
    import aiormq

    channel = await connection.channel(publisher_confirms=True)
    properties = aiormq.spec.Basic.Properties(delivery_mode=2)
    return lambda number: channel.basic_publish(
        BODIES[number % 1000], routing_key=name, properties=properties, mandatory=True, wait=False
    )


def end_to_end(run: Run) -> dict[str, float]:
    """Publish from 100 tasks on one channel; at the same time consume on another as `raw_consume` does."""
    import uvloop

    with own_server(run, "rabbitmq") as own:
        return uvloop.run(_end_to_end(own))


async def _end_to_end(run: Run) -> dict[str, float]:
    import aiormq

    connection = await aiormq.connect(url_of(run))
    name = await _queue(connection)
    channel = await connection.channel(publisher_confirms=False)

    async def consume() -> None:
        await _consume(channel, name, run.messages)
        await channel.close()  # answered after the last acknowledgement, which has no answer

    measured = await publish_and_consume(run.messages, await _publisher(connection, name), consume())
    await connection.close()
    return measured


def faststream_consume(run: Run) -> dict[str, float]:
    """A subscriber with a pydantic payload; acknowledged when the handler is done."""
    return asyncio.run(_faststream_consume(run))


async def _faststream_consume(run: Run) -> dict[str, float]:
    import aiormq
    from faststream import AckPolicy
    from faststream.rabbit import Channel, RabbitBroker, RabbitQueue
    from faststream.rabbit.schemas.queue import QueueType

    from benchmarks.contestants.pydantic_orders import Order

    connection = await aiormq.connect(url_of(run))
    name = await _filled_queue(connection, run)
    await connection.close()
    broker = RabbitBroker(url_of(run), logger=None, default_channel=Channel(prefetch_count=PREFETCH))
    queue = RabbitQueue(name, queue_type=QueueType.QUORUM, durable=True)
    handled, watch = 0, None
    done = asyncio.Event()

    @broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)
    async def handle(_order: Order) -> None:
        nonlocal handled, watch
        handled += 1
        if watch is None:
            watch = Stopwatch()
        if handled == run.messages:
            done.set()

    async with broker:
        await broker.start()
        await done.wait()
        assert watch is not None
        return watch.read(run.messages)


def faststream_publish(run: Run) -> dict[str, float]:
    """100 callers that await each publish."""
    return asyncio.run(_faststream_publish(run))


async def _faststream_publish(run: Run) -> dict[str, float]:
    import aiormq
    from faststream.rabbit import RabbitBroker

    from benchmarks.contestants.pydantic_orders import pydantic_order

    connection = await aiormq.connect(url_of(run))
    name = await _queue(connection)
    await connection.close()
    orders = [pydantic_order(number) for number in range(1000)]
    async with RabbitBroker(url_of(run), logger=None) as broker:
        await broker.start()
        return await outstanding(
            run.messages, lambda number: broker.publish(orders[number % 1000], queue=name, persist=True)
        )


async def _queue(connection: Any) -> str:
    name = fresh_name()
    channel = await connection.channel()
    await channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
    return name


async def _filled_queue(connection: Any, run: Run) -> str:
    name = await _queue(connection)
    await outstanding(run.messages, await _publisher(connection, name))
    return name
