"""JetStream without Trunkline: nats-py by hand, and FastStream. Runs in the environment of peers."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.cases import Run
from benchmarks.contestants.broker import (
    BODIES,
    Stopwatch,
    Together,
    fresh_name,
    outstanding,
    own_server,
    publish_and_consume,
    url_of,
)
from benchmarks.contestants.orders import decode

ACKS = 1000
"""Most messages sent and not acknowledged."""


def raw_consume(run: Run, retention: str = "limits") -> dict[str, float]:
    """Push consumer with a callback, decoded, acknowledged one by one, 1,000 pending at most.

    Of a stream that keeps its messages, or of a work queue, which removes each when it is acknowledged.
    """
    import uvloop

    return uvloop.run(_raw_consume(run, retention))


async def _raw_consume(run: Run, retention: str) -> dict[str, float]:
    import nats
    from nats.js.api import ConsumerConfig

    client = await nats.connect(url_of(run))
    stream = client.jetstream()
    name = await _filled_stream(client, stream, run, retention)
    handled, watch = 0, None
    done = asyncio.Event()

    async def handle(message: Any) -> None:
        nonlocal handled, watch
        if watch is None:
            watch = Stopwatch()
        decode(message.data)
        await message.ack()
        handled += 1
        if handled == run.messages:
            done.set()

    await stream.subscribe(name, durable=name, cb=handle, manual_ack=True, config=ConsumerConfig(max_ack_pending=ACKS))
    await done.wait()
    while (await stream.consumer_info(name, name)).num_ack_pending:  # noqa: ASYNC110 - it is the server's
        await asyncio.sleep(0.005)
    assert watch is not None
    measured = watch.read(run.messages)
    await client.close()
    return measured


def raw_publish(run: Run) -> dict[str, float]:
    """100 callers that await each publish."""
    import uvloop

    return uvloop.run(_raw_publish(run))


async def _raw_publish(run: Run) -> dict[str, float]:
    import nats

    client = await nats.connect(url_of(run))
    stream = client.jetstream()
    name = await _stream(stream)
    measured = await outstanding(run.messages, lambda number: stream.publish(name, BODIES[number % 1000]))
    await client.close()
    return measured


def end_to_end(run: Run) -> dict[str, float]:
    """Publish from 100 tasks, what waits at the same time in one atomic batch, which is one sync.

    At the same time fetch what is there, 1,000 at most, decode, acknowledge all by the last and await the answer.
    """
    import uvloop

    with own_server(run, "nats") as own:
        return uvloop.run(_end_to_end(own))


async def _end_to_end(run: Run) -> dict[str, float]:
    import nats

    client = await nats.connect(url_of(run))
    stream = client.jetstream()
    name = await _stream(stream, allow_atomic=True)
    together = Together(lambda numbers: _batch(client, stream, name, numbers))
    measured = await publish_and_consume(run.messages, together.publish, _fetch(stream, name, run.messages))
    await client.close()
    return measured


async def _batch(client: Any, stream: Any, name: str, numbers: list[int]) -> None:
    """Publish all or none; the server answers to the last (ADR-50 of NATS: atomic batch publishing)."""
    batch = {"Nats-Batch-Id": fresh_name()}
    for place, number in enumerate(numbers[:-1], 1):
        await client.publish(name, BODIES[number % 1000], headers={**batch, "Nats-Batch-Sequence": str(place)})
    last = {**batch, "Nats-Batch-Sequence": str(len(numbers)), "Nats-Batch-Commit": "1"}
    await stream.publish(name, BODIES[numbers[-1] % 1000], headers=last)


async def _fetch(stream: Any, name: str, messages: int) -> None:
    from nats.js.api import AckPolicy, ConsumerConfig

    config = ConsumerConfig(ack_policy=AckPolicy.ALL, max_ack_pending=ACKS)
    subscription = await stream.pull_subscribe(name, durable=name, config=config)
    handled = 0
    while handled < messages:
        fetched = await subscription.fetch(ACKS)
        for message in fetched:
            decode(message.data)
        await fetched[-1].ack_sync()
        handled += len(fetched)


def faststream_consume(run: Run) -> dict[str, float]:
    """A push subscriber with a pydantic payload; acknowledged when the handler is done."""
    return asyncio.run(_faststream_consume(run))


async def _faststream_consume(run: Run) -> dict[str, float]:
    import nats
    from faststream import AckPolicy
    from faststream.nats import JStream, NatsBroker
    from nats.js.api import ConsumerConfig

    from benchmarks.contestants.pydantic_orders import Order

    client = await nats.connect(url_of(run))
    name = await _filled_stream(client, client.jetstream(), run)
    await client.close()
    broker = NatsBroker(url_of(run), logger=None)
    handled, watch = 0, None
    done = asyncio.Event()

    @broker.subscriber(
        name, stream=JStream(name, declare=False), durable=name, ack_policy=AckPolicy.NACK_ON_ERROR,
        config=ConsumerConfig(max_ack_pending=ACKS),
    )  # fmt: skip
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
    import nats
    from faststream.nats import NatsBroker

    from benchmarks.contestants.pydantic_orders import pydantic_order

    client = await nats.connect(url_of(run))
    name = await _stream(client.jetstream())
    await client.close()
    orders = [pydantic_order(number) for number in range(1000)]
    async with NatsBroker(url_of(run), logger=None) as broker:
        await broker.start()
        return await outstanding(run.messages, lambda number: broker.publish(orders[number % 1000], name, stream=name))


async def _stream(stream: Any, **settings: Any) -> str:
    name = fresh_name()
    await stream.add_stream(name=name, subjects=[name], **settings)
    return name


async def _filled_stream(client: Any, stream: Any, run: Run, retention: str = "limits") -> str:
    name = await _stream(stream, retention=retention)
    for number in range(run.messages - 1):
        await client.publish(name, BODIES[number % 1000])
        if number % 1000 == 0:
            await stream.publish(name, BODIES[0])
    info = await stream.stream_info(name)
    run_short = run.messages - info.state.messages
    for number in range(run_short):
        await stream.publish(name, BODIES[number])
    return name
