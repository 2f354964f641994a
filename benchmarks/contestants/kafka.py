"""Kafka without Trunkline: confluent-kafka by hand, and FastStream. Runs in the environment of peers."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.cases import Run
from benchmarks.contestants.broker import BODIES, OUTSTANDING, Stopwatch, fresh_name, outstanding, url_of
from benchmarks.contestants.orders import decode

PARTITIONS = 8
BATCH = 500
SAFE = {"enable.idempotence": True, "acks": "all", "linger.ms": 5}


def raw_consume(run: Run) -> dict[str, float]:
    """Take batches of 500, decode, commit after each batch."""
    from confluent_kafka import Consumer

    topic = _filled_topic(run)
    consumer = Consumer(
        {
            "bootstrap.servers": _hosts(run), "group.id": topic, "auto.offset.reset": "earliest",
            "enable.auto.commit": False, "enable.auto.offset.store": False,
            "partition.assignment.strategy": "cooperative-sticky",
        }
    )  # fmt: skip
    consumer.subscribe([topic])
    handled, watch = 0, None
    while handled < run.messages:
        batch = consumer.consume(BATCH, 1.0)
        if batch and watch is None:
            watch = Stopwatch()
        for message in batch:
            decode(message.value())
            consumer.store_offsets(message)
        handled += len(batch)
        if batch:
            consumer.commit(asynchronous=True)
    consumer.commit(asynchronous=False)
    assert watch is not None
    measured = watch.read(run.messages)
    consumer.close()
    return measured


def raw_publish(run: Run) -> dict[str, float]:
    """Produce with at most 100 unconfirmed."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": _hosts(run), **SAFE})
    topic = _topic(run)
    under_way = 0

    def confirmed(error: Any, _message: Any) -> None:
        nonlocal under_way
        if error is not None:
            raise RuntimeError(error)
        under_way -= 1

    watch = Stopwatch()
    for number in range(run.messages):
        while under_way >= OUTSTANDING:
            producer.poll(0.01)
        producer.produce(topic, BODIES[number % 1000], partition=number % PARTITIONS, on_delivery=confirmed)
        under_way += 1
    producer.flush()
    return watch.read(run.messages)


def faststream_consume(run: Run) -> dict[str, float]:
    """A subscriber with a pydantic payload that commits after each message."""
    return asyncio.run(_faststream_consume(run))


async def _faststream_consume(run: Run) -> dict[str, float]:
    from faststream import AckPolicy
    from faststream.confluent import KafkaBroker

    from benchmarks.contestants.pydantic_orders import Order

    topic = _filled_topic(run)
    broker = KafkaBroker(_hosts(run), logger=None, allow_auto_create_topics=False)
    handled, watch = 0, None
    done = asyncio.Event()

    @broker.subscriber(topic, group_id=topic, auto_offset_reset="earliest", ack_policy=AckPolicy.ACK)
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
    from faststream.confluent import KafkaBroker

    from benchmarks.contestants.pydantic_orders import pydantic_order

    topic = _topic(run)
    orders = [pydantic_order(number) for number in range(1000)]
    async with KafkaBroker(_hosts(run), logger=None, allow_auto_create_topics=False, acks="all") as broker:
        await broker.start()
        return await outstanding(run.messages, lambda number: broker.publish(orders[number % 1000], topic))


def _hosts(run: Run) -> str:
    return url_of(run).removeprefix("kafka://")


def _topic(run: Run) -> str:
    from confluent_kafka.admin import AdminClient, NewTopic

    topic = fresh_name()
    admin = AdminClient({"bootstrap.servers": _hosts(run)})
    for future in admin.create_topics([NewTopic(topic, PARTITIONS, 1)]).values():
        future.result(30)
    return topic


def _filled_topic(run: Run) -> str:
    from confluent_kafka import Producer

    topic = _topic(run)
    producer = Producer({"bootstrap.servers": _hosts(run), **SAFE})
    for number in range(run.messages):
        if number % 10_000 == 0:
            producer.flush()
        producer.produce(topic, BODIES[number % 1000], partition=number % PARTITIONS)
    producer.flush()
    return topic
