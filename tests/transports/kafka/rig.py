"""A transport on Apache Kafka that is started, and what is done to it and behind its back."""

import asyncio
import json
from contextlib import asynccontextmanager

from confluent_kafka import Producer

from tests.transports.kafka.front import Front
from trunkline.clock import system_clock
from trunkline.message import Message
from trunkline.transport import Staged, load_adapter, parse_address
from trunkline.transports.kafka.inspector import KafkaInspector


@asynccontextmanager
async def started(url, *subscriptions, channels=()):
    transport = load_adapter("trunkline.transports", url, system_clock)
    await transport.start([*channels, *(one.channel for one in subscriptions)], subscriptions)
    try:
        yield transport
    finally:
        await transport.drain()
        await transport.stop()


@asynccontextmanager
async def before_the_broker(url):
    """Stand before the broker; gives what stands there, and the URL by which it is reached."""
    port = url.partition("?")[0].rpartition(":")[2]
    async with Front(int(port)) as front:
        yield front, url.replace(f":{port}", f":{front.port}")


@asynccontextmanager
async def looking(url, kind=KafkaInspector):
    """Look at the cluster as an operator does."""
    inspector = kind(parse_address(url), system_clock)
    await inspector.open()
    try:
        yield inspector
    finally:
        await inspector.close()


def staged(channel, number, key=None, **attributes):
    attributes = {"id": system_clock.new_id(), "data": json.dumps(number).encode(), **attributes}
    return Staged(channel, Message(type="t", source="s", time=1.0, partitionkey=key, **attributes))


async def take(transport, subscription, count, *, settle=True, within_s=30):
    """Receive `count` messages, settling each batch."""
    taken = []
    async with asyncio.timeout(within_s):
        while len(taken) < count:
            batch = await transport.receive(subscription, count - len(taken))
            if settle:
                await transport.settle(batch)
            taken += batch
    return taken


async def take_different(transport, subscription, count, within_s=60):
    """Receive and settle until there were `count` different numbers; return them."""
    found = set()
    async with asyncio.timeout(within_s):
        while len(found) < count:
            batch = await transport.receive(subscription, 100)
            await transport.settle(batch)
            found |= set(numbers(batch))
    return found


def numbers(deliveries):
    return [json.loads(one.message.data) for one in deliveries]


async def nothing(transport, subscription, for_s=1.0):
    """Check that nothing comes."""
    receiving = asyncio.create_task(take(transport, subscription, 1, within_s=60))
    await asyncio.sleep(for_s)
    assert not receiving.done()
    receiving.cancel()


async def until(condition, within_s=30):
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.05)


async def produce(servers, topic, *values, **options):
    """Publish as a program that does not know Trunkline."""
    producer = Producer({"bootstrap.servers": servers})
    for value in values:
        producer.produce(topic, value, **options)
    await asyncio.to_thread(producer.flush, 10)


async def transact(servers, topic, *values, end="commit_transaction"):
    """Publish as a program with transactions: behind its records the log has a marker, which is no record."""

    def work():
        producer = Producer({"bootstrap.servers": servers, "transactional.id": topic})
        producer.init_transactions(30)
        producer.begin_transaction()
        for value in values:
            producer.produce(topic, value, partition=0)
        producer.flush(30)
        getattr(producer, end)(30)

    await asyncio.to_thread(work)


async def is_made(admin, new):
    """Make a topic; return whether that was done: its name may still be taken."""
    return await asyncio.to_thread(admin.create_topics([new])[new.topic].exception, 10) is None
