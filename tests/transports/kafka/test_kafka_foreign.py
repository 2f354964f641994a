"""Records of other programs on Apache Kafka that no Kafka client of Python could write, or that are no messages."""

import asyncio
import json
import socket
import struct
import time

import pytest
from confluent_kafka.admin import NewTopic

from tests.transports.kafka.rig import is_made, looking, numbers, started, take, transact, until
from trunkline.channel import Queue
from trunkline.message import to_structured
from trunkline.transport import Subscription

pytestmark = [pytest.mark.xdist_group("kafka"), pytest.mark.timeout(180)]
NOT_UTF8 = b"\xff\xfe"
NOT_READY = {3, 5, 6}
"""Of a topic that was just made. Source: Kafka protocol guide, "Error codes": no leader is known yet."""


@pytest.fixture
def url(url):
    return url.replace("?", "?queue_partitions=1&")


def crc32c(data):
    """Source: RFC 3720 appendix B.4."""
    found = 0xFFFFFFFF
    for byte in data:
        found ^= byte
        for _ in range(8):
            found = (found >> 1) ^ (0x82F63B78 if found & 1 else 0)
    return found ^ 0xFFFFFFFF


def varint(number):
    number = (number << 1) ^ (number >> 63)
    found = bytearray()
    while number & ~0x7F:
        found.append((number & 0x7F) | 0x80)
        number >>= 7
    return bytes((*found, number))


def sized(data):
    return varint(-1) if data is None else varint(len(data)) + data


def batch(value, headers, timestamp):
    """Return one record as a batch. Source: Kafka protocol guide, "Record Batch", magic 2."""
    body = bytes(3) + sized(None) + sized(value) + varint(len(headers))
    body += b"".join(sized(name) + sized(text) for name, text in headers)
    after = struct.pack(">hiqqqhii", 0, 0, timestamp, timestamp, -1, -1, -1, 1) + sized(body)
    return struct.pack(">qiibI", 0, 9 + len(after), -1, 2, crc32c(after)) + after


def produce(servers, topic, value, headers=(), timestamp=1_700_000_000_000):
    """Write one record to partition 0, with headers as bytes. Source: Kafka protocol guide, Produce, version 3."""
    host, _, port = servers.rpartition(":")
    records, name = batch(value, headers, timestamp), topic.encode()
    body = struct.pack(">hhiih", -1, -1, 10_000, 1, len(name)) + name
    body += struct.pack(">iii", 1, 0, len(records)) + records
    request = struct.pack(">hhih", 0, 3, 1, 1) + b"x" + body
    with socket.create_connection((host, int(port)), 10) as peer:
        peer.sendall(struct.pack(">i", len(request)) + request)
        (size,) = struct.unpack(">i", peer.recv(4, socket.MSG_WAITALL))
        answer = peer.recv(size, socket.MSG_WAITALL)
    (error,) = struct.unpack_from(">h", answer, 4 + 4 + 2 + len(name) + 4 + 4)
    if error in NOT_READY:
        time.sleep(0.1)
        produce(servers, topic, value, headers, timestamp)
    else:
        assert error == 0


async def test_a_header_whose_name_is_no_utf8_is_unreadable_and_ends_nothing(url, prefix, servers):
    jobs = Queue("jobs")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        for _ in range(50):
            produce(servers, f"{prefix}.jobs", b"x", [(NOT_UTF8, b"x")])
        taken = await take(transport, reader, 50)
        assert {(one.message, one.raw, one.unread[0]) for one in taken} == {(None, b"x", "E404")}
    async with looking(url) as inspector:
        assert [seen.raw async for seen in inspector.read(jobs, from_start=True, follow=False)] == [b"x"] * 50


async def test_two_records_of_one_place_with_one_moment_of_their_producers_are_two(url, prefix, servers, admin):
    jobs = Queue("jobs", plain="t")
    reader = Subscription("a", jobs)
    topic = f"{prefix}.jobs"
    found = []
    for value in (b"1", b"2"):
        made = NewTopic(topic, 1, 1, config={"message.timestamp.type": "CreateTime"})
        await until(lambda made=made: is_made(admin, made))
        produce(servers, topic, value, timestamp=-1)
        async with started(url, reader) as transport:
            found += await take(transport, reader, 1)
        await asyncio.to_thread(admin.delete_topics([topic])[topic].result)
    assert numbers(found) == [1, 2]
    assert found[0].message.identity != found[1].message.identity


@pytest.mark.parametrize("timestamp", [-1, -5, 1_700_000_000_000_000, 2**63 - 1])
async def test_a_moment_that_is_no_time_is_none(url, prefix, servers, admin, timestamp):
    jobs = Queue("jobs", plain="t")
    topic = f"{prefix}.jobs"
    config = {"message.timestamp.type": "CreateTime", "message.timestamp.after.max.ms": str(2**63 - 1)}
    assert await is_made(admin, NewTopic(topic, 1, 1, config=config))
    produce(servers, topic, b"1", timestamp=timestamp)
    async with looking(url) as inspector:
        (seen,) = [one async for one in inspector.read(jobs, from_start=True, follow=False)]
    assert (seen.message.time, json.loads(to_structured(seen.message))["data"]) == (0.0, 1)


async def test_markers_of_transactions_and_what_was_aborted_are_no_backlog(url, prefix, servers):
    jobs = Queue("jobs", plain="t")
    reader = Subscription("a", jobs)
    async with started(url, reader) as transport:
        await transact(servers, f"{prefix}.jobs", b"1", b"2")
        await transact(servers, f"{prefix}.jobs", b"3", end="abort_transaction")
        taken = await take(transport, reader, 2, settle=False)
        assert numbers(taken) == [1, 2]
        await until(lambda: end_is_known(transport, reader))
        assert (await transport.backlog(reader)).waiting >= 2
        await transport.settle(taken)
        await until(lambda: nothing_waits(transport, reader))
    async with looking(url) as inspector:
        assert [lag.waiting for lag in await inspector.look([reader])] == [0]


async def end_is_known(transport, reader):
    return transport._readers[reader.label]._ends


async def nothing_waits(transport, reader):
    return (await transport.backlog(reader)).waiting == 0
