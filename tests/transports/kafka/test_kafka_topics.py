"""Topics of Apache Kafka that change behind the services: added to, deleted, limited."""

import asyncio
from contextlib import suppress

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from tests.brokers import broker_url
from tests.transports.kafka.rig import is_made, numbers, produce, staged, started, take, take_different, until
from trunkline.channel import Queue, Stream, Topic
from trunkline.transport import Subscription
from trunkline.transports.kafka.place import CLEAN, metadata

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]
EVENT = b'{"specversion":"1.0","id":"%d","type":"t","source":"s","time":"2026-01-01T00:00:00Z","data":%d}'


async def alter(admin, topic, name, value):
    """Set one setting of a topic, as an operator does."""
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    await asyncio.to_thread(admin.incremental_alter_configs([resource])[resource].result)


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


async def test_a_topic_whose_messages_cannot_be_deleted_keeps_no_other_from_being_tidied(url, prefix, admin, caplog):
    channels = [Queue(f"jobs-{number}") for number in range(4)]
    readers = [Subscription("a", channel) for channel in channels]
    async with started(f"{url}&queue_partitions=1", *readers) as transport:
        await alter(admin, f"{prefix}.jobs-0", "cleanup.policy", "compact")
        await transport.send([staged(channel, 1, "k") for channel in channels])
        for reader in readers:
            await take(transport, reader, 1)

        async def tidied():
            await transport.tidy()
            begins = [
                await asyncio.to_thread(transport._cluster.ends, f"{prefix}.{channel.name}", 1, earliest=True)
                for channel in channels
            ]
            return begins == [{0: 0}, {0: 1}, {0: 1}, {0: 1}]

        await until(tidied)
    assert "handled messages of 'jobs-0' stay on the disk" in caplog.text


async def test_a_broker_that_makes_topics_by_itself_does_not_make_a_deleted_one(prefix):
    url = f"{broker_url('kafka@auto', 'auto.create.topics.enable=true')}?timeout_s=10&lease_s=6&prefix={prefix}"
    admin = AdminClient({"bootstrap.servers": url.removeprefix("kafka://").partition("?")[0]})
    events = Stream("events", partitions=4)
    topic = f"{prefix}.events"
    async with started(url, channels=[events]) as transport:
        await transport.send([staged(events, number, f"k{number}") for number in range(20)])
        await asyncio.to_thread(admin.delete_topics([topic])[topic].result)

        async def sent():
            batch = [staged(events, number, f"k{number}") for number in range(20)]
            (error,) = await asyncio.gather(transport.send(batch), return_exceptions=True)
            return error is None

        await until(sent, within_s=60)
    found = admin.describe_configs([resource := ConfigResource(ResourceType.TOPIC, topic)])[resource].result()
    assert found["retention.ms"].value == "-1"
    assert len(admin.list_topics(topic, timeout=10).topics[topic].partitions) == 4


async def test_messages_that_fit_are_not_refused_because_others_are_in_their_batch(url, prefix, admin):
    jobs, events = Queue("jobs"), Stream("events", partitions=1)
    reader = Subscription("a", events)
    async with started(f"{url}&queue_partitions=1", channels=[jobs, events]):
        for channel in (jobs, events):
            await alter(admin, f"{prefix}.{channel.name}", "max.message.bytes", "10000")
    async with started(url, reader, channels=[jobs]) as transport:
        large = [staged(events, [number, "x" * 1000], "k") for number in range(50)]
        small = [staged(events, [number, ""], "k") for number in range(50, 100)]
        await transport.send([*large, *small])
        assert [number for number, _ in numbers(await take(transport, reader, 100))] == list(range(100))
        await asyncio.gather(*(transport.send([staged(jobs, "x" * 1000)]) for _ in range(100)))


async def test_a_topic_that_takes_no_message_without_a_key_is_told(url, prefix, admin):
    jobs = Queue("jobs")
    async with started(url, channels=[jobs]) as transport:
        await alter(admin, f"{prefix}.jobs", "cleanup.policy", "compact")

        async def refused():
            (error,) = await asyncio.gather(transport.send([staged(jobs, 1)]), return_exceptions=True)
            return error

        await until(refused)
        error = await refused()
    assert error.code == "E313"
    assert "each message needs a key" in error.hint


async def test_a_topic_that_takes_less_than_it_did_is_sent_smaller_batches(url, prefix, admin):
    jobs = Queue("jobs")
    async with started(f"{url}&queue_partitions=1", channels=[jobs]) as transport:
        await alter(admin, f"{prefix}.jobs", "max.message.bytes", "10000")

        async def sent():
            batch = [staged(jobs, "x" * 1000) for _ in range(100)]
            (error,) = await asyncio.gather(transport.send(batch), return_exceptions=True)
            assert error is None or error.code == "E313"
            return error is None

        await until(sent)


@pytest.mark.parametrize("partitions", [1, 3])
async def test_a_topic_that_was_made_anew_and_filled_at_once_is_read_from_its_first_message(
    url, prefix, servers, admin, partitions
):
    events = Stream("events", partitions=partitions)
    reader = Subscription("a", events)
    topic = f"{prefix}.events"
    async with started(url, reader) as transport:
        await transport.send([staged(events, number, f"k{number}") for number in range(60)])
        assert len(await take(transport, reader, 60)) == 60
        await until(lambda: _commits(transport, reader, 60))
        await asyncio.to_thread(admin.delete_topics([topic])[topic].result)
        await until(lambda: is_made(admin, NewTopic(topic, partitions, 1)))
        for partition in range(partitions):
            values = [EVENT % (number, number) for number in range(1000 * partition, 1000 * partition + 200)]
            await produce(servers, topic, *values, partition=partition)
        wanted = {1000 * partition + number for partition in range(partitions) for number in range(200)}
        assert await take_different(transport, reader, len(wanted)) == wanted

        async def settled():
            with suppress(TimeoutError):
                await take(transport, reader, 500, within_s=0.2)  # what was read before it was seen comes twice
            return await _commits(transport, reader, 200 * partitions)

        await until(settled)
    async with started(url, reader) as transport:
        await transport.send([staged(events, 9999)])
        assert numbers(await take(transport, reader, 1)) == [9999]


async def make_anew(admin, servers, topic, partitions, *found):
    """Delete a topic and make it anew with some messages in its first partition, as an operator does."""
    await asyncio.to_thread(admin.delete_topics([topic])[topic].result)
    await until(lambda: is_made(admin, NewTopic(topic, partitions, 1)))
    await produce(servers, topic, *(EVENT % (number, number) for number in found), partition=0)


@pytest.mark.parametrize("channel", [Stream("log", partitions=1), Queue("jobs")], ids=lambda channel: channel.kind)
async def test_what_was_under_way_when_its_topic_was_made_anew_settles_nothing_of_the_new_one(
    url, prefix, servers, admin, channel
):
    url += "&queue_partitions=1"
    reader = Subscription("a", channel)
    async with started(url, reader) as transport:
        await transport.send([staged(channel, number) for number in range(3)])
        old = await take(transport, reader, 3, settle=False)
        await make_anew(admin, servers, f"{prefix}.{channel.name}", 1, 10, 11, 12)
        new = await take(transport, reader, 3, settle=False)
        assert numbers(new) == [10, 11, 12]
        await transport.settle(old)
        await transport.settle(new[:1])
    async with started(url, reader) as transport:
        assert numbers(await take(transport, reader, 2)) == [11, 12]


async def test_a_topic_made_anew_is_read_from_its_first_message_by_the_next_process_too(url, prefix, servers, admin):
    url += "&queue_partitions=1"
    news = Topic("news")
    reader = Subscription("a", news)
    async with started(url, reader) as transport:
        await transport.send([staged(news, number) for number in range(3)])
        await take(transport, reader, 3)
        one = transport._readers[reader.label]
        await until(lambda: _is_known(transport, one, {0: 3}))
        await make_anew(admin, servers, f"{prefix}.news", 1, 10, 11, 12)
        assert numbers(await take(transport, reader, 3, settle=False)) == [10, 11, 12]
    async with started(url, reader) as transport:
        assert numbers(await take(transport, reader, 3)) == [10, 11, 12]


async def test_offsets_that_were_committed_for_a_topic_made_anew_since_count_for_nothing(url, servers, admin):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(f"{url}&queue_partitions=1", reader) as transport:
        await transport.send([staged(jobs, number) for number in range(5)])
        await take(transport, reader, 5)
        group, topic = transport._readers[reader.label].group, transport._readers[reader.label].topic
    left = Consumer({"bootstrap.servers": servers, "group.id": group})
    old = TopicPartition(topic, 0, 3, metadata(CLEAN, "another"))
    await asyncio.to_thread(left.commit, offsets=[old], asynchronous=False)
    left.close()
    async with started(url, reader) as transport:
        await transport.tidy()
        assert numbers(await take(transport, reader, 5)) == list(range(5))


async def _is_known(transport, one, offsets):
    return await asyncio.to_thread(transport._cluster.committed, one.group, one.topic, 1) == offsets


async def _commits(transport, reader, count):
    one = transport._readers[reader.label]
    known = await asyncio.to_thread(transport._cluster.committed, one.group, one.topic, reader.channel.partitions)
    return sum(known.values()) == count
