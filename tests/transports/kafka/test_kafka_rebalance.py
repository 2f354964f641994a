"""Partitions on Apache Kafka that go and come back while the loop of their process stands still."""

import asyncio
import threading
import time

import pytest

from tests.brokers import broker_url
from tests.transports.kafka.rig import numbers, staged, started, take, until
from trunkline.channel import Queue
from trunkline.transport import Subscription
from trunkline.transports.kafka import reader as reading

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]


async def test_partitions_that_went_and_came_back_while_a_handler_blocked_are_read_on(monkeypatch):
    monkeypatch.setattr(reading, "CLOSE_S", 0.5)
    monkeypatch.setattr(reading, "CALL_S", 1.5)
    url = f"{broker_url('kafka')}?timeout_s=20&lease_s=6&queue_partitions=4&prefix=t{time.time_ns()}"
    jobs = Queue("jobs")
    subscription = Subscription("a", jobs)

    async def visit():
        async with started(url, subscription) as other:
            await until(lambda: _holds(other._readers[subscription.label], 2))

    async with started(url, subscription) as transport:
        reader = transport._readers[subscription.label]
        await until(lambda: _holds(reader, 4))
        visitor = threading.Thread(target=asyncio.run, args=[visit()])
        visitor.start()
        visitor.join()  # as a handler does that blocks
        while len(reader._places) < 4:
            time.sleep(0.1)  # noqa: ASYNC251
        await transport.send([staged(jobs, number) for number in range(40)])
        assert sorted(numbers(await take(transport, subscription, 40))) == list(range(40))
        assert sorted(reader.held) == [0, 1, 2, 3]


async def _holds(reader, count):
    return len(reader.held) == count
