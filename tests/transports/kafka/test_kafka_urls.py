"""URLs of Apache Kafka that the client library refuses: told in our words, before or in place of its own errors."""

import time

import pytest

from tests.brokers import broker_url
from tests.transports.kafka.rig import numbers, staged, started, take
from trunkline.channel import Queue
from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError
from trunkline.transport import Subscription, load_adapter

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]


@pytest.mark.parametrize(
    ("query", "allowed"),
    [
        ("lease_s=3601", "0.5 or more and at most 3600"), ("lease_s=0.0005", "0.5 or more"),
        ("timeout_s=3601", "at most 3600"), ("replication=10001", "1 to 10000"),
        ("queue_partitions=100001", "1 to 100000"),
    ],
)  # fmt: skip
def test_numbers_that_the_client_does_not_take_are_refused(query, allowed):
    with pytest.raises(ConfigurationError, match=f"E241 .*{allowed}"):
        load_adapter("trunkline.transports", f"kafka://localhost:1?{query}", system_clock)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ("kafka://user@", "", "E241 .* has a user without a password"),
        ("kafka://user:@", "", "E241 .* has a user without a password"),
        ("kafka+ssl://", "&ca=/no/such.pem", "E245 .* ca, cert or key .* cannot be used"),
        ("kafka+ssl://", "&cert=/no/such.pem", "E245 .* ca, cert or key .* cannot be used"),
        ("kafka+ssl://", "&key=/no/such.pem", "E245 .* ca, cert or key .* cannot be used"),
    ],
)
async def test_what_the_client_would_not_start_with_is_told(start, end, expected):
    with pytest.raises(ConfigurationError, match=expected):
        async with started(f"{start}127.0.0.1:9?timeout_s=1{end}"):
            pass


async def test_a_lease_longer_than_five_minutes_is_taken():
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(f"{broker_url('kafka')}?lease_s=600&prefix=t{time.time_ns()}", reader) as transport:
        await transport.send([staged(jobs, 1)])
        assert numbers(await take(transport, reader, 1)) == [1]
