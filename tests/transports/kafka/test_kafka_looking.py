"""What an operator reads of Apache Kafka ends where the topic ended, or with an error that says why not."""

import asyncio

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import NewTopic

from tests.transports.kafka.rig import before_the_broker, is_made, looking, transact, until
from trunkline.channel import Stream
from trunkline.errors import TransportError
from trunkline.transports.kafka.inspector import KafkaInspector

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]
EVENTS = Stream("events", partitions=3, plain="order.seen")


@pytest.fixture
async def topic(admin, prefix):
    name = f"{prefix}.events"
    assert await is_made(admin, NewTopic(name, 3, 1))
    return name


async def read_all(inspector):
    return [seen.message.data async for seen in inspector.read(EVENTS, from_start=True, follow=False)]


async def test_a_topic_that_ends_with_the_marker_of_a_transaction_is_read_to_its_end(url, servers, topic):
    await transact(servers, topic, b"1", b"2")
    async with looking(url) as inspector, asyncio.timeout(30):
        assert await read_all(inspector) == [b"1", b"2"]


async def test_a_broker_that_is_lost_while_its_topic_is_read_is_named(url, servers, topic):
    await transact(servers, topic, b"1")

    class Lost(KafkaInspector):
        def _assigned(self, *arguments) -> Consumer:
            front.toxics.down = True
            return super()._assigned(*arguments)

    impatient = url.replace("timeout_s=30", "timeout_s=3")
    async with before_the_broker(impatient) as (front, place), looking(place, Lost) as inspector:
        with pytest.raises(TransportError, match=f"E522 .*{topic} was not read to its end: nothing came for 3 s"):
            await read_all(inspector)


async def test_a_lost_broker_is_named_while_its_topic_is_followed(url, servers, topic, caplog):
    async def said(words):
        return words in caplog.text

    async with before_the_broker(url) as (front, place), looking(place) as inspector:
        following = inspector.read(EVENTS, from_start=True, follow=True)
        await transact(servers, topic, b"1")
        assert (await anext(following)).message.data == b"1"
        seen = asyncio.create_task(anext(following))
        await front.stop()
        await until(lambda: said(f"topic {topic}: no broker of kafka:"))
        await front.start()
        await transact(servers, topic, b"2")
        async with asyncio.timeout(30):
            assert (await seen).message.data == b"2"
        assert "is reached again" in caplog.text
        await following.aclose()
