"""Topics of Apache Kafka that change behind the services: added to, deleted, limited."""

import asyncio
import time

import pytest
from confluent_kafka.admin import AdminClient, NewPartitions

from tests.brokers import broker_url
from tests.transports.test_kafka import numbers, produce, staged, started, take, until
from trunkline.channel import Topic
from trunkline.transport import Subscription

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(90)]
EVENT = b'{"specversion":"1.0","id":"%d","type":"t","source":"s","time":"2026-01-01T00:00:00Z","data":%d}'


@pytest.fixture
def url():
    return f"{broker_url('kafka')}?timeout_s=20&lease_s=6&prefix=t{time.time_ns()}"


@pytest.fixture
def prefix(url):
    return url.rpartition("=")[2]


@pytest.fixture
def servers(url):
    return url.removeprefix("kafka://").partition("?")[0]


@pytest.fixture
def admin(servers):
    return AdminClient({"bootstrap.servers": servers})


async def test_what_is_published_to_partitions_that_were_added_is_read_from_the_first_message(
    url, prefix, servers, admin
):
    news = Topic("news")
    reader = Subscription("a", news)
    async with started(f"{url}&queue_partitions=2", reader) as transport:
        await transport.send([staged(news, 0)])
        await take(transport, reader, 1)
    topic = f"{prefix}.news"
    await asyncio.to_thread(admin.create_partitions([NewPartitions(topic, 4)])[topic].result)
    await until(lambda: _has_partitions(admin, topic, 4))
    await produce(servers, topic, EVENT % (3, 3), partition=3)
    async with started(url, reader) as transport:
        assert numbers(await take(transport, reader, 1)) == [3]


async def _has_partitions(admin, topic, count):
    return len(admin.list_topics(topic, timeout=10).topics[topic].partitions) == count
