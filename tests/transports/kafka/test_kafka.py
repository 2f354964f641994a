"""Apache Kafka as it is: declared, refused, restarted, shared, read by others."""

import asyncio
import threading
import time
from contextlib import suppress

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from tests.brokers import broker_url, kill, restart, resume
from tests.transports.kafka.rig import (
    before_the_broker,
    nothing,
    numbers,
    produce,
    staged,
    started,
    take,
    take_different,
    until,
)
from trunkline import Service, Struct
from trunkline.app import App
from trunkline.channel import Queue, Stream, Topic
from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError, PublishError, TransportError
from trunkline.inflow import ROOM
from trunkline.transport import Subscription, load_adapter, parse_address
from trunkline.transports.kafka import cluster as administering
from trunkline.transports.kafka import reader as reading
from trunkline.transports.kafka.cluster import Cluster
from trunkline.transports.kafka.probe import mechanisms_asked_for
from trunkline.transports.kafka.settings import MAX_MESSAGE_BYTES, passes, read_settings

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]


# --- declaration ---


async def test_topics_are_made_with_safe_settings(url, prefix, admin):
    jobs, events = Queue("jobs"), Stream("events", partitions=3, retention_s=60)
    async with started(f"{url}&queue_partitions=5", channels=[jobs, events]):
        pass
    assert len(admin.list_topics().topics[f"{prefix}.jobs"].partitions) == 5
    assert len(admin.list_topics().topics[f"{prefix}.events"].partitions) == 3
    asked = [ConfigResource(ResourceType.TOPIC, f"{prefix}.{name}") for name in ("jobs", "events")]
    jobs_config, events_config = (future.result() for future in admin.describe_configs(asked).values())
    assert jobs_config["retention.ms"].value == "-1"
    assert events_config["retention.ms"].value == "60000"
    assert events_config["cleanup.policy"].value == "delete"


async def test_a_stream_that_exists_with_other_partitions_is_refused(url):
    async with started(url, channels=[Stream("events", partitions=3)]):
        pass
    with pytest.raises(ConfigurationError, match=r"E207 .* with 4 partitions exists as topic .* with 3"):
        async with started(url, channels=[Stream("events", partitions=4)]):
            pass


async def test_a_queue_is_used_with_the_partitions_that_it_has(url, prefix, admin):
    admin.create_topics([NewTopic(f"{prefix}.jobs", 2)])[f"{prefix}.jobs"].result()
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        await transport.send([staged(jobs, 1)])
        assert numbers(await take(transport, reader, 1)) == [1]


async def test_two_processes_can_start_at_once_and_miss_nothing(url):
    news = Topic("news")
    readers = [Subscription("a", news), Subscription("a", news)]

    async def run(reader, number):
        async with started(url, reader) as transport:
            await transport.send([staged(news, number)])
            received.extend(numbers(await take(transport, reader, 1)))

    received = []
    await asyncio.gather(*(run(reader, number) for number, reader in enumerate(readers)))
    assert sorted(received) == [0, 1]


# --- where a reader begins ---


async def test_a_new_subscription_of_a_topic_begins_with_its_creation(url):
    news = Topic("news")
    first, second = Subscription("first", news), Subscription("second", news)
    async with started(url, first) as transport:
        await transport.send([staged(news, 1)])
        assert numbers(await take(transport, first, 1)) == [1]
    async with started(url, second) as transport:
        await transport.send([staged(news, 2)])
        assert numbers(await take(transport, second, 1)) == [2]
    async with started(url, first) as transport:
        assert numbers(await take(transport, first, 1)) == [2]


async def test_a_reader_of_a_stream_begins_at_its_start_and_goes_on_where_it_was(url):
    events = Stream("events", partitions=2)
    early, late = Subscription("early", events, "earliest"), Subscription("late", events, "latest")
    async with started(url, channels=[events]) as transport:
        await transport.send([staged(events, number, "k") for number in range(3)])
    async with started(url, early, late) as transport:
        assert numbers(await take(transport, early, 3)) == [0, 1, 2]
        await nothing(transport, late)
    async with started(url, early, late) as transport:
        await transport.send([staged(events, 3, "k")])
        assert numbers(await take(transport, early, 1)) == [3]
        assert numbers(await take(transport, late, 1)) == [3]


async def test_a_start_ends_in_time_when_nobody_answers_where_a_new_subscription_begins(url):
    reader = Subscription("a", Topic("news"))
    async with before_the_broker(url.replace("timeout_s=30", "timeout_s=5")) as (front, through):
        front.uncommitted = True
        began = time.monotonic()
        with pytest.raises(TransportError, match=r"E522 .*saying where group .* begins"):
            async with started(through, reader):
                pass
        assert time.monotonic() - began < 30


# --- redelivery ---


async def test_what_was_under_way_at_an_unclean_end_comes_again_as_a_suspect(url):
    events = Stream("events", partitions=1)
    reader = Subscription("a", events)
    async with started(url, reader) as transport:
        await transport.send([staged(events, number, "k") for number in range(3)])
        taken = await take(transport, reader, 3, settle=False)
        assert not any(delivery.suspect for delivery in taken)
        await transport.settle([taken[0], taken[2]])
    async with started(url, reader) as transport:
        again = await take(transport, reader, 2)
        assert [(delivery.position, delivery.suspect) for delivery in again] == [(1, True), (2, True)]
    async with started(url, reader) as transport:
        await transport.send([staged(events, 3, "k")])
        (fresh,) = await take(transport, reader, 1)
        assert not fresh.suspect


async def test_a_partition_that_moves_waits_for_what_is_under_way(url):
    events = Stream("events", partitions=4)
    first, second = Subscription("a", events), Subscription("a", events)
    async with started(url, first) as old:
        await old.send([staged(events, number, str(number)) for number in range(40)])
        taken = await take(old, first, 40, settle=False)
        async with started(url, second) as new:
            await nothing(new, second, for_s=3)
            assert all(old.owns(first, number) for number in range(4))
            await old.settle(taken)

            async def shared():
                return {
                    sum(one.owns(reader, n) for n in range(4)) for one, reader in ((old, first), (new, second))
                } == {2}

            await until(shared)
            assert not any(old.owns(first, number) and new.owns(second, number) for number in range(4))
            await nothing(new, second)
            assert await old.receive(first, 1) == []


async def test_settling_what_went_to_another_process_is_ignored(url, monkeypatch):
    monkeypatch.setattr(reading, "CLOSE_S", 0.5)
    events = Stream("events", partitions=2)
    first, second = Subscription("a", events), Subscription("a", events)
    async with started(url, first) as old:
        await old.send([staged(events, number, str(number)) for number in range(20)])
        taken = await take(old, first, 20, settle=False)
        async with started(url, second) as new:
            (moved,) = {delivery.partition for delivery in await take(new, second, 1, settle=False)}
            assert not old.owns(first, moved)
            await old.settle(taken)
            assert all(delivery.partition != moved for delivery in taken if old.owns(first, delivery.partition))


# --- how much waits ---


async def test_backlog_counts_what_is_not_settled(url):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        await transport.send([staged(jobs, number) for number in range(10)])
        taken = await take(transport, reader, 10, settle=False)
        backlog = await transport.backlog(reader)
        assert (backlog.waiting, backlog.in_flight) == (10, 10)
        await transport.settle(taken)
        backlog = await transport.backlog(reader)
        assert (backlog.waiting, backlog.in_flight) == (0, 0)


async def test_a_reader_that_takes_nothing_is_sent_no_more_than_it_has_room_for(url, monkeypatch):
    monkeypatch.setattr(reading, "STAND_BY_S", 0.2)
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        await transport.send([staged(jobs, number) for number in range(3 * ROOM)])
        inflow = transport._readers[reader.label].inflow

        async def is_full():
            return len(inflow) >= ROOM

        await until(is_full)
        await asyncio.sleep(1)
        assert len(inflow) < ROOM + reading.BATCH
        assert sorted(numbers(await take(transport, reader, 3 * ROOM))) == list(range(3 * ROOM))


async def test_what_all_groups_have_handled_is_deleted(url):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(f"{url}&queue_partitions=1", reader) as transport:
        await transport.send([staged(jobs, number) for number in range(10)])
        taken = await take(transport, reader, 10, settle=False)
        await transport.settle(taken[:7])
        topic = transport._settings.topic("jobs")

        async def deleted():
            await transport.tidy()
            return await asyncio.to_thread(transport._cluster.ends, topic, 1, earliest=True) == {0: 7}

        await until(deleted)


# --- messages of other programs ---


async def test_messages_of_other_programs_are_read(url, prefix, servers):
    events = Stream("events", partitions=1, plain="order.seen")
    reader = Subscription("a", events)
    binary = {"ce_specversion": "1.0", "ce_id": "7", "ce_type": "t", "ce_source": "s", "content-type": "text/plain"}
    async with started(url, reader) as transport:
        await produce(servers, f"{prefix}.events", b'{"n": 1}', key="k1")
        await produce(servers, f"{prefix}.events", b"hello", key="k2", headers=binary)
        plain, event = (delivery.message for delivery in await take(transport, reader, 2))
    assert (plain.type, plain.data, plain.partitionkey) == ("order.seen", b'{"n": 1}', "k1")
    # The moment too: on another cluster, or when the topic is made anew, the places begin again.
    assert plain.id == f"{prefix}.events/0/0/{round(plain.time * 1000)}"
    assert plain.time > 1_700_000_000
    assert (event.id, event.type, event.data, event.partitionkey) == ("7", "t", b"hello", "k2")
    assert event.datacontenttype == "text/plain"


async def test_what_is_no_message_comes_with_its_bytes(url, prefix, servers):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        await produce(servers, f"{prefix}.jobs", b"\xff\x00", None, partition=0)
        taken = await take(transport, reader, 2)
    assert [(delivery.message, delivery.raw) for delivery in taken] == [(None, b"\xff\x00"), (None, b"")]


# --- publishing ---


async def test_a_message_that_is_too_large_is_refused_alone(url):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        batch = [staged(jobs, 1), staged(jobs, "x" * MAX_MESSAGE_BYTES), staged(jobs, 3)]
        with pytest.raises(PublishError, match=f"E313 .*{MAX_MESSAGE_BYTES}") as caught:
            await transport.send(batch)
        assert caught.value.unsent == [batch[1]]
        assert sorted(numbers(await take(transport, reader, 2))) == [1, 3]


async def test_a_message_for_a_topic_that_is_gone_is_refused(url, admin):
    jobs = Queue(f"gone-{system_clock.new_id()}")
    async with started(url.replace("timeout_s=30", "timeout_s=10"), channels=[jobs]) as transport:
        await transport.send([staged(jobs, 1)])
        topic = next(name for name in admin.list_topics(timeout=10).topics if name.endswith(jobs.name))
        await asyncio.to_thread(admin.delete_topics([topic])[topic].result)
        with pytest.raises((PublishError, TransportError), match=r"E313|E521"):
            await transport.send([staged(jobs, 2)])


async def test_a_topic_that_was_deleted_is_made_again_and_read_on(url, admin, caplog):
    stream = Stream("orders", partitions=1)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as transport:
        for number in range(20):
            await transport.send([staged(stream, number)])
        assert numbers(await take(transport, subscription, 20)) == list(range(20))
        reader = transport._readers[subscription.label]
        await until(lambda: _is_committed(transport, reader, 20))
        await asyncio.to_thread(admin.delete_topics([reader.topic])[reader.topic].result)
        await until(lambda: _said(caplog, f"topic {reader.topic} was deleted"))
        await transport.send([staged(stream, number) for number in range(20, 25)])
        assert numbers(await take(transport, subscription, 5)) == list(range(20, 25))
        await until(lambda: _is_committed(transport, reader, 5))
    async with started(url, subscription) as transport:
        await transport.send([staged(stream, 25)])
        assert numbers(await take(transport, subscription, 1)) == [25]


async def _is_committed(transport, reader, offset):
    return transport._cluster.committed(reader.group, reader.topic, 1).get(0) == offset


async def _said(caplog, text):
    return text in caplog.text


async def test_a_publisher_makes_a_topic_again_that_was_deleted(url, admin):
    jobs = Queue(f"gone-{system_clock.new_id()}")
    async with started(url.replace("timeout_s=30", "timeout_s=5"), channels=[jobs]) as transport:
        await transport.send([staged(jobs, 1)])
        topic = transport._settings.topic(jobs.name)
        await asyncio.to_thread(admin.delete_topics([topic])[topic].result)
        await until(lambda: _is_gone(admin, topic))
        async with asyncio.timeout(60):
            while await _is_gone(admin, topic):
                with suppress(PublishError, TransportError):
                    await transport.send([staged(jobs, 2)])
            while transport._restoring:
                await asyncio.sleep(0.05)
            await transport.send([staged(jobs, 3)])


async def _is_gone(admin, topic):
    return topic not in admin.list_topics(timeout=10).topics


async def test_more_than_the_client_buffers_is_sent_all_the_same(url, monkeypatch):
    from trunkline.transports.kafka.settings import Settings

    usual = Settings.producer
    small = lambda self, *notes: usual(self, *notes) | {"queue.buffering.max.messages": 100}
    monkeypatch.setattr(Settings, "producer", small)
    events = Stream("events", partitions=1)
    reader = Subscription("a", events)
    async with started(url, reader) as transport:
        batches = [[staged(events, 300 * start + n, "k") for n in range(300)] for start in range(4)]
        await asyncio.gather(*(transport.send(batch) for batch in batches))
        assert numbers(await take(transport, reader, 1200)) == list(range(1200))


# --- what is refused at the start ---


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("?colour=red", "E240"), ("?timeout_s=never", "E241"), ("?prefix=a b", "E241"), ("?sasl=PLAIN", "E241"),
        ("?ca=ca.pem", "E241"), ("/path", "E206"), ("?prefix=", "E241"),
    ],
)  # fmt: skip
def test_a_url_that_is_wrong_is_refused(query, code):
    with pytest.raises(ConfigurationError, match=code):
        load_adapter("trunkline.transports", f"kafka://localhost:1{query}", system_clock)


async def test_a_cluster_that_does_not_answer_is_told_after_the_timeout():
    with pytest.raises(TransportError, match=r"E520 .* was not reached within 1 s: .*refused"):
        async with started("kafka://127.0.0.1:9?timeout_s=1"):
            pass


async def test_a_port_that_speaks_no_tls_is_told(url):
    with pytest.raises(ConfigurationError, match="E245"):
        async with started(url.replace("kafka://", "kafka+ssl://").replace("timeout_s=30", "timeout_s=5")):
            pass


async def test_a_lease_that_the_broker_does_not_take_ends_the_service_with_what_it_takes(url):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url.replace("lease_s=6", "lease_s=1"), reader) as transport:
        with pytest.raises(ConfigurationError, match=r"E241 lease_s=1 .* from 6 to"):
            await take(transport, reader, 1)


@pytest.fixture
def sasl_url():
    return f"{broker_url('kafka:sasl')}?timeout_s=20&prefix=t{time.time_ns()}"


async def test_a_wrong_password_is_told_without_it(sasl_url):
    user, _, rest = sasl_url.partition("@")
    wrong = f"{user.rpartition(':')[0]}:not-the-password@{rest}"
    with pytest.raises(ConfigurationError, match="E244") as caught:
        async with started(wrong):
            pass
    assert "not-the-password" not in str(caught.value)


async def test_a_port_that_asks_for_a_user_is_told(sasl_url):
    plain = f"kafka://{sasl_url.partition('@')[2]}".replace("timeout_s=20", "timeout_s=4")
    with pytest.raises(ConfigurationError, match=r"E244 .* asks for a user and password \(SCRAM-SHA-256\)"):
        async with started(plain):
            pass


def test_a_port_without_sasl_asks_for_nobody(url):
    settings = read_settings(parse_address(url))
    assert mechanisms_asked_for(settings.client) == []


async def test_user_and_password_of_the_url_sign_in(sasl_url):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(sasl_url, reader) as transport:
        await transport.send([staged(jobs, 1)])
        assert numbers(await take(transport, reader, 1)) == [1]


# --- the broker ends and comes back ---


async def test_publishing_and_reading_go_on_after_a_restart(url):
    events = Stream("events", partitions=2)
    reader = Subscription("a", events)
    async with started(url, reader) as transport:
        await transport.send([staged(events, 0, "k")])
        first = await take(transport, reader, 1)
        restarting = asyncio.create_task(asyncio.to_thread(restart, "kafka"))
        sending = []
        for number in range(1, 50):
            sending.append(transport.send([staged(events, number, "k")]))
            await asyncio.sleep(0.1)
        await asyncio.gather(restarting, *sending)
        assert numbers(first) == [0]
        assert await take_different(transport, reader, 49) >= set(range(1, 50))


async def test_publishing_while_the_broker_is_gone_ends_with_an_error_that_says_so(url):
    jobs = Queue("jobs")
    async with started(url.replace("timeout_s=30", "timeout_s=10"), channels=[jobs]) as transport:
        await transport.send([staged(jobs, 1)])
        await asyncio.to_thread(kill, "kafka")
        try:
            lost = [staged(jobs, 2)]
            with pytest.raises(TransportError, match=r"E52[01]") as caught:
                await transport.send(lost)
            assert caught.value.unsent == lost
            with pytest.raises(TransportError, match="E520"):
                await transport.send([staged(jobs, 3)])
        finally:
            await asyncio.to_thread(resume, "kafka")
        await transport.send([staged(jobs, 4)])


async def test_stopping_while_the_broker_is_gone_does_not_take_long(url):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        await transport.send([staged(jobs, 1)])
        await take(transport, reader, 1)
        await asyncio.to_thread(kill, "kafka")
        try:
            await asyncio.sleep(1)
            began = time.monotonic()
            await transport.drain()
            await transport.stop()
            assert time.monotonic() - began < 15
        finally:
            await asyncio.to_thread(resume, "kafka")


# --- a cluster that says for a moment that it has no brokers ---


async def forgotten(front, *clients):
    """Have every one of the clients told that there are no brokers, until none of them knows one."""
    front.empties = True
    front.reset()

    async def all_know_none():
        return all(one() for one in clients)

    await until(all_know_none)
    front.empties = False
    assert front.answered


@pytest.fixture
def never_closed(monkeypatch):
    """Consumers whose close waits until the test is over, as for a coordinator that is gone."""
    over = threading.Event()

    class NeverClosed(reading.Consumer):
        def close(self):
            over.wait()
            super().close()

    monkeypatch.setattr(reading, "Consumer", NeverClosed)
    yield over
    over.set()


async def test_a_reader_that_was_told_there_are_no_brokers_reads_on(url, caplog, never_closed):
    events = Stream("events", partitions=4)
    reader = Subscription("a", events)
    async with before_the_broker(url) as (front, through), started(through, reader) as transport:
        await transport.send([staged(events, number, str(number)) for number in range(8)])
        taken = await take(transport, reader, 8, settle=False)
        reads = transport._readers[reader.label]
        first = reads._consumer
        await forgotten(front, lambda: reads._consumer is not first)
        assert "has lost every broker" in caplog.text
        async with started(url, channels=[events]) as other:
            await other.send([staged(events, number, str(number)) for number in range(8, 16)])
        await transport.settle(taken)  # they were another's to settle meanwhile: they come again
        assert await take_different(transport, reader, 16) == set(range(16))
        never_closed.set()


async def test_a_client_that_was_left_behind_takes_no_partition_away(url):
    events = Stream("events", partitions=4)
    reader = Subscription("a", events)
    async with started(url, reader) as transport:
        await transport.send([staged(events, 1, "k")])
        await take(transport, reader, 1)
        reads = transport._readers[reader.label]
        left = reading.Consumer({"group.id": "left", "bootstrap.servers": "127.0.0.1:9"})
        for told in (reads._revoked, reads._lost):
            await asyncio.to_thread(told, left, reads._assignment())
            assert len(reads._places) == 4
        left.close()


async def test_a_producer_that_knows_no_broker_any_more_is_made_anew(url, caplog, monkeypatch):
    from trunkline.transports.kafka.settings import Settings
    from trunkline.transports.kafka.stranded import TIMES

    usual, said = Settings.producer, []

    def mute(self, error_cb, stats_cb):
        said.append(stats_cb)
        return usual(self, error_cb, lambda _statistics: None)

    monkeypatch.setattr(Settings, "producer", mute)
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as there, before_the_broker(url) as (front, through):
        said.clear()
        async with started(through, channels=[jobs]) as transport:
            await transport.send([staged(jobs, 1)])
            await front.stop()
            lost = [staged(jobs, 2)]
            sending = asyncio.ensure_future(transport.send(lost))
            for _ in range(TIMES):
                said[0]('{"brokers": {"GroupCoordinator": {"source": "logical"}}}')
            with pytest.raises(TransportError, match=r"E52[01]") as caught:
                await asyncio.wait_for(sending, 10)  # not only after timeout_s
            assert caught.value.unsent == lost
            await front.start()
            await transport.send([staged(jobs, 3)])
        assert len(said) == 2
        assert "publishing: the client has lost every broker" in caplog.text
        assert sorted(numbers(await take(there, reader, 2))) == [1, 3]


async def test_a_success_of_the_client_without_a_place_in_the_log_is_no_confirmation(url, prefix):
    jobs = Queue("jobs")
    async with before_the_broker(url) as (front, through), started(through, channels=[jobs]) as transport:
        front.repeated = f"{prefix}.jobs".encode()
        batch = [staged(jobs, 1)]
        with pytest.raises(TransportError, match=r"E521.*no broker says where") as caught:
            await transport.send(batch)
        assert caught.value.unsent == batch
        front.repeated = None
        await transport.send([staged(jobs, 3)])


async def test_what_is_settled_while_the_group_rebalances_is_committed_all_the_same(url, prefix):
    reader = Subscription("desk", Queue("jobs"))
    url += "&queue_partitions=1"
    async with before_the_broker(url) as (front, through), started(through, reader) as transport:
        reads = transport._readers[reader.label]
        for number, front.moving in ((1, None), (2, f"{prefix}.jobs".encode())):
            await transport.send([staged(reader.channel, number)])
            await take(transport, reader, 1)
            look = transport._cluster.committed, reads.group, reads.topic, 1
            async with asyncio.timeout(30):
                while await asyncio.to_thread(*look) != {0: number}:
                    await asyncio.sleep(0.05)
        assert front.moving is None


async def test_what_is_only_taken_for_written_because_a_later_one_was_is_no_confirmation(url, prefix):
    events = Queue("events")
    reader = Subscription("a", events)
    async with started(url + "&queue_partitions=1", reader) as there, before_the_broker(url) as (front, through):
        await there.send([staged(events, 0)])
        async with started(through, channels=[events]) as transport:
            front.unready = f"{prefix}.events".encode()
            first = asyncio.ensure_future(transport.send([staged(events, 1)]))
            while not front.holds:
                await asyncio.sleep(0.01)
            await transport.send([staged(events, 2)])
            with pytest.raises(TransportError, match="E521"):
                await first
            await transport.send([staged(events, 3)])
        assert numbers(await take(there, reader, 3)) == [0, 2, 3]


async def test_the_first_message_of_a_partition_goes_alone_so_that_none_overtakes_it(url, prefix):
    events = Stream("events", partitions=2)
    reader = Subscription("a", events)
    async with started(url, reader) as there, before_the_broker(url) as (front, through):
        async with started(through, channels=[events]) as transport:
            front.unready = f"{prefix}.events".encode()
            first = asyncio.ensure_future(transport.send([staged(events, n, "k") for n in range(3)]))
            while not front.holds:
                await asyncio.sleep(0.01)
            others = [asyncio.ensure_future(transport.send([staged(events, n, "k")])) for n in range(3, 6)]
            await asyncio.sleep(0.5)
            assert front.unready is not None, "a second one was on its way beside the first"
            front.unready = None
            front.reset()  # the client connects again and sends it once more
            await asyncio.gather(first, *others)
        assert numbers(await take(there, reader, 6)) == list(range(6))


async def test_a_question_ends_though_the_cluster_is_let_go_meanwhile(url, monkeypatch):
    asked = threading.Event()

    class Asked(AdminClient):
        def list_offsets(self, *arguments, **named):
            futures = super().list_offsets(*arguments, **named)
            asked.set()
            return futures

    monkeypatch.setattr(administering, "AdminClient", Asked)
    async with before_the_broker(url) as (front, through):
        settings = read_settings(parse_address(through.replace("timeout_s=30", "timeout_s=5")))
        cluster = Cluster(settings, system_clock)
        await asyncio.to_thread(cluster.connect)
        front.swallow()
        question = asyncio.ensure_future(asyncio.to_thread(cluster.ends, "t", 1))
        await asyncio.to_thread(asked.wait)
        cluster.close()
        with pytest.raises(TransportError, match="E522"):
            await asyncio.wait_for(question, 20)


def test_brokers_that_have_just_started_and_take_no_topic_yet_are_asked_again():
    cluster = Cluster(read_settings(parse_address("kafka://nowhere")), system_clock)
    refused = KafkaError(KafkaError.INVALID_REPLICATION_FACTOR, "all brokers are currently fenced")
    with pytest.raises(KafkaException) as again:
        cluster._not_made("t", refused, enough=True)
    assert passes(again.value.args[0])
    with pytest.raises(ConfigurationError, match="E207"):
        cluster._not_made("t", refused, enough=False)


# --- two Apps ---


class Order(Struct):
    order_id: str
    number: int


async def test_two_apps_share_a_stream_in_order_and_lose_nothing(url, tmp_path):
    events = Stream("kafka-orders", key="order_id", partitions=4)
    events.event(Order)
    handled = []

    def service():
        one = Service("shop")

        @one.handle(after_dead_letter="continue")
        async def note(order: Order) -> None:
            await asyncio.sleep(0.001)
            handled.append((order.order_id, order.number))

        return one

    async with App(service(), url, store=f"sqlite:///{tmp_path}/a.db") as first:
        for number in range(50):
            await first.publish_all([Order(order_id=f"o{key}", number=number) for key in range(8)])
            if number == 20:
                second = App(service(), url, store=f"sqlite:///{tmp_path}/a.db")
                await second.start()
            await asyncio.sleep(0.02)

        async def all_handled():
            return len(set(handled)) == 400

        await until(all_handled)
        await second.stop()
    assert len(handled) == 400
    for key in range(8):
        assert [number for name, number in handled if name == f"o{key}"] == list(range(50))
