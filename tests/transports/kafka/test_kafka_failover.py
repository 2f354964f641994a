"""A cluster of three nodes that loses one of them while messages are published and handled."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from confluent_kafka import ElectionType
from confluent_kafka.admin import AdminClient

from tests import brokers
from trunkline.channel import Topic
from trunkline.clock import system_clock
from trunkline.message import Message
from trunkline.testing import Kind
from trunkline.testing.conformance import Bench
from trunkline.transport import Staged, Subscription, load_adapter

pytestmark = [pytest.mark.xdist_group("kafka-failover"), pytest.mark.timeout(240)]

CLUSTER = "kafka3@failover"
COPIES = 3
OFFSETS = "__consumer_offsets"


@pytest.fixture(scope="module")
def cluster_url():
    """Three nodes take much of a small machine, so they end with the tests that need them."""
    brokers.broker_url.cache_clear()
    yield brokers.broker_url(CLUSTER)
    brokers.stop(CLUSTER)
    brokers.broker_url.cache_clear()


@pytest.fixture
async def bench(cluster_url, tmp_path):
    async with Bench(f"{cluster_url}?timeout_s=60&lease_s=6", "sqlite:///store.db", folder=tmp_path) as made:
        yield made


class View:
    """What the cluster says of itself, and of the topics and groups of one prefix."""

    def __init__(self, url, until):
        self.url = url
        self.admin = AdminClient({"bootstrap.servers": url.removeprefix("kafka://").partition("?")[0]})
        self.prefix = url.rpartition("prefix=")[2]
        self._until = until

    def partitions(self):
        known = self.admin.list_topics(timeout=30).topics
        return [
            (name, partition)
            for name, topic in known.items()
            if name.startswith(f"{self.prefix}.") or name == OFFSETS
            for partition in topic.partitions.values()
        ]

    def led_by(self, node):
        """Return the topics of which `node` leads partitions."""
        return {name for name, partition in self.partitions() if partition.leader == node} - {OFFSETS}

    def coordinator(self, subscription, channel):
        """Return the node that coordinates the group of a subscription."""
        group = f"{self.prefix}.{subscription}.{channel}"
        return self.admin.describe_consumer_groups([group])[group].result().coordinator.id

    async def whole(self):
        """Wait until every copy of every partition is in step."""

        def complete():
            return all(len(partition.isrs) == COPIES for _, partition in self.partitions())

        await self._until(lambda: asyncio.to_thread(complete), "the copies are not in step", 60)

    async def spread(self):
        """Have each node lead what it led when the cluster was new: after a death they do not take it back at once."""
        await self.whole()
        await asyncio.to_thread(self.admin.elect_leaders(ElectionType.PREFERRED).result)
        await self.whole()


@asynccontextmanager
async def without(node):
    """Kill a node at once; resume it in the end."""
    await asyncio.to_thread(brokers.kill, f"{CLUSTER}/{node}")
    try:
        yield
    finally:
        await asyncio.to_thread(brokers.resume, f"{CLUSTER}/{node}")


def last_of(entries, kind):
    """Return the highest number of each key among the entries of a kind."""
    found = {}
    for entry in entries:
        if entry.kind is kind:
            found[entry.key] = max(found.get(entry.key, 0), entry.seq)
    return found


async def all_keys_go_on(bench, publisher):
    """See of every key messages confirmed and handled that are published from now on."""
    now = last_of(publisher.journal(), Kind.INVOKE)

    async def handled():
        confirmed = last_of(publisher.journal(), Kind.OK)
        effects = last_of(await bench.effects(), Kind.EFFECT)
        return all(min(confirmed.get(key, 0), effects.get(key, 0)) > seq + 5 for key, seq in now.items())

    await bench.until(handled, "some keys stand still", 60)


async def test_broker_leader_change_loses_nothing_doubles_nothing_and_keeps_order(bench):
    jobs, log = bench.line("queue"), bench.line("stream")
    readers = [await bench.process(jobs, log, work_s=0.002) for _ in range(2)]
    publisher = await bench.process(jobs, log, role="publish", keys=8, pause_s=0.1)
    await bench.until(lambda: all(reader.begun() for reader in readers), "a reader got nothing", 30)
    view = View(bench.url, bench.until)
    await view.whole()
    await all_keys_go_on(bench, publisher)
    node = view.coordinator("reader", log.name)
    assert len(view.led_by(node)) == 2, "it leads partitions of both channels"

    async with without(node):
        await all_keys_go_on(bench, publisher)
        assert not view.led_by(node)
    await view.whole()
    await all_keys_go_on(bench, publisher)

    await publisher.process.stop()
    await bench.drained()
    await bench.quiet()
    verdict = await bench.verdict_by_channel({log.name})
    assert verdict.passed, verdict.describe()
    ends = {entry.kind for entry in publisher.journal()}
    assert ends == {Kind.BEGIN, Kind.INVOKE, Kind.OK, Kind.END}, "a publish waits longer than the choice of a leader"


async def test_what_a_dead_node_does_not_say_is_not_taken_for_nothing(bench):
    news = Topic("news")
    view = View(bench.url, bench.until)
    await view.spread()
    transport = load_adapter("trunkline.transports", bench.url, system_clock)
    names = [f"reader{number}" for number in range(8)]
    subscriptions = [Subscription(name, news) for name in names]
    await transport.start([news], subscriptions)
    try:
        message = Message(type="t", source="s", time=1.0, id="1", data=b"1")
        await transport.send([Staged(news, message)] * 60)
        await view.whole()
        coordinators = {name: view.coordinator(name, "news") for name in names}
        node = coordinators[names[0]]
        assert len(set(coordinators.values())) > 1, "some groups stay"
        assert view.led_by(node)
        # What is deleted is what every group has settled; the groups of `node` have settled nothing.
        for one in subscriptions:
            if coordinators[one.name] != node:
                taken = 0
                while taken < 60:
                    deliveries = await transport.receive(one, 60)
                    await transport.settle(deliveries)
                    taken += len(deliveries)
        await transport.drain()
        await asyncio.sleep(1)

        async with without(node):
            await asyncio.gather(*(asyncio.to_thread(transport._cluster.delete_handled, "news", 12) for _ in range(2)))
            ends = await asyncio.to_thread(transport._cluster.ends, f"{view.prefix}.news", 12)
            begins = await asyncio.to_thread(transport._cluster.ends, f"{view.prefix}.news", 12, earliest=True)
        assert sum(ends.values()) == 60
        assert set(begins.values()) == {0}, "messages that a group has not read are gone"
    finally:
        await transport.drain()
        await transport.stop()
