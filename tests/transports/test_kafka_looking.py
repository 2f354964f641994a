"""What an operator reads of Apache Kafka ends where the topic ended, or with an error that says why not."""

import asyncio
import time

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from tests.brokers import broker_url
from tests.transports.kafka_front import Front
from trunkline.channel import Stream
from trunkline.clock import system_clock
from trunkline.errors import TransportError
from trunkline.transport import parse_address
from trunkline.transports.kafka.inspector import KafkaInspector

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(60)]
EVENTS = Stream("events", partitions=3, plain="order.seen")


@pytest.fixture
def prefix():
    return f"t{time.time_ns()}"


@pytest.fixture
def url():
    return broker_url("kafka")


@pytest.fixture
def servers(url):
    return url.removeprefix("kafka://")


@pytest.fixture
async def topic(servers, prefix):
    name = f"{prefix}.events"
    admin = AdminClient({"bootstrap.servers": servers})  # held until it has answered
    await asyncio.to_thread(admin.create_topics([NewTopic(name, 3, 1)])[name].result, 30)
    return name


def produce_in_a_transaction(servers, topic, *values):
    """Publish as a program with transactions: behind its records the log has a marker, which is no record."""
    producer = Producer({"bootstrap.servers": servers, "transactional.id": topic})
    producer.init_transactions(30)
    producer.begin_transaction()
    for value in values:
        producer.produce(topic, value, partition=0)
    producer.commit_transaction(30)


async def read_all(inspector):
    return [seen.message.data async for seen in inspector.read(EVENTS, from_start=True, follow=False)]


async def test_a_topic_that_ends_with_the_marker_of_a_transaction_is_read_to_its_end(url, servers, topic, prefix):
    await asyncio.to_thread(produce_in_a_transaction, servers, topic, b"1", b"2")
    inspector = KafkaInspector(parse_address(f"{url}?prefix={prefix}"), system_clock)
    await inspector.open()
    try:
        async with asyncio.timeout(30):
            assert await read_all(inspector) == [b"1", b"2"]
    finally:
        await inspector.close()


async def test_a_broker_that_is_lost_while_its_topic_is_read_is_named(url, servers, topic, prefix):
    await asyncio.to_thread(produce_in_a_transaction, servers, topic, b"1")

    class Lost(KafkaInspector):
        def _assigned(self, *arguments) -> Consumer:
            front.toxics.down = True
            return super()._assigned(*arguments)

    port = url.rpartition(":")[2]
    async with Front(int(port)) as front:
        place = url.replace(port, str(front.port))
        inspector = Lost(parse_address(f"{place}?prefix={prefix}&timeout_s=3"), system_clock)
        await inspector.open()
        with pytest.raises(TransportError, match=f"E522 .*{topic} was not read to its end: nothing came for 3 s"):
            await read_all(inspector)
        await inspector.close()


async def test_a_lost_broker_is_named_while_its_topic_is_followed(url, servers, topic, prefix, caplog):
    port = url.rpartition(":")[2]
    async with Front(int(port)) as front:
        inspector = KafkaInspector(parse_address(f"{url.replace(port, str(front.port))}?prefix={prefix}"), system_clock)
        await inspector.open()
        following = inspector.read(EVENTS, from_start=True, follow=True)
        await asyncio.to_thread(produce_in_a_transaction, servers, topic, b"1")
        assert (await anext(following)).message.data == b"1"
        seen = asyncio.create_task(anext(following))
        await front.stop()
        await until(lambda: f"topic {topic}: no broker of kafka:" in caplog.text)
        await front.start()
        await asyncio.to_thread(produce_in_a_transaction, servers, topic, b"2")
        async with asyncio.timeout(30):
            assert (await seen).message.data == b"2"
        assert "is reached again" in caplog.text
        await following.aclose()
        await inspector.close()


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)
