"""Redis Streams against a real server: declaring, refusals, sharing, faults, what other programs write.

What is true of every transport is tested by the conformance suite.
"""

import asyncio
import contextlib
import gc
import itertools
import os
import re
import signal
import socket
import ssl
import sys
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from zlib import crc32

import msgspec
import pytest

from tests import brokers
from trunkline import App, Queue, Service, Stream, Topic
from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError, PublishError, TransportError
from trunkline.message import Message
from trunkline.transport import Staged, Subscription, load_adapter, parse_address
from trunkline.transports.redis.connection import Refusal, failure, pack
from trunkline.transports.redis.layout import Positions
from trunkline.transports.redis.scripts import ALL
from trunkline.transports.redis.server import Server
from trunkline.wire import MAX_WIRE_BYTES, encode

FAULTY = "redis@faults"
pytestmark = [pytest.mark.xdist_group("redis"), pytest.mark.timeout(120)]


@pytest.fixture(scope="session")
def server() -> str:
    return brokers.broker_url("redis")


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def url(server, prefix) -> str:
    return f"{server}?prefix={prefix}&lease_s=1&timeout_s=5"


@contextlib.asynccontextmanager
async def opened(url, *subscriptions, channels=()):
    transport = load_adapter("trunkline.transports", url, system_clock)
    await transport.start([*channels, *(subscription.channel for subscription in subscriptions)], subscriptions)
    try:
        yield transport
    finally:
        await transport.drain()
        await transport.stop()


async def raw(url, *command):
    """Run one command on the server, as another program would."""
    address = parse_address(url)
    plain = msgspec.structs.replace(address, options={})
    connection = await Server(plain, system_clock).connect(lambda _: None)
    try:
        (reply,) = await connection.request(pack(command))
        return reply
    finally:
        await connection.close()


def message(number, key=None, data=None):
    body = data if data is not None else b'{"n":%d}' % number
    return Message(str(uuid.uuid4()), "thing", "tests", body, 1_700_000_000.0, key)


def staged(channel, *numbers, key=None):
    return [Staged(channel, message(number, key)) for number in numbers]


def numbers(deliveries):
    return [msgspec.json.decode(delivery.message.data)["n"] for delivery in deliveries]


async def receive(transport, subscription, count, within_s=20.0):
    """Receive exactly `count` deliveries."""
    found = []
    async with asyncio.timeout(within_s):
        while len(found) < count:
            found += await transport.receive(subscription, count - len(found))
    return found


async def until(condition, within_s=20.0):
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.05)


async def refusal(url, *subscriptions, channels=()):
    with pytest.raises((ConfigurationError, TransportError)) as raised:
        async with opened(url, *subscriptions, channels=channels):
            pass
    return raised.value


# --- declaring ---


async def test_two_processes_that_start_at_once_both_succeed(url):
    subscriptions = [Subscription("a", Queue("q")), Subscription("a", Topic("t")), Subscription("a", Stream("s"))]
    async with contextlib.AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(opened(url, *subscriptions)) for _ in range(4)))


async def test_a_stream_that_exists_with_other_partitions_is_refused(url):
    async with opened(url, channels=[Stream("s", partitions=4)]):
        pass
    error = await refusal(url, channels=[Stream("s", partitions=5)])
    assert error.code == "E207"
    assert "with 5 partitions exists as stream with 4" in str(error)


async def test_a_channel_of_another_kind_is_refused(url):
    async with opened(url, channels=[Queue("s")]):
        pass
    assert (await refusal(url, channels=[Topic("s")])).code == "E207"


async def test_a_key_that_holds_something_else_is_refused(url, prefix):
    await raw(url, "SET", f"{prefix}:{{q}}:log", "text")
    assert (await refusal(url, channels=[Queue("q")])).code == "E207"


@pytest.mark.parametrize(
    ("extra", "code"),
    [("&colour=red", "E240"), ("&lease_s=0", "E241"), ("&replicas=x", "E241"), ("&ca=/tmp/ca", "E241"),
     ("&prefix=%7Bx%7D", "E241"), ("&prefix=Bad:Name", "E241"), ("&lease_s=0.001", "E241")],
)  # fmt: skip
def test_options_are_checked(server, extra, code):
    with pytest.raises(ConfigurationError) as raised:
        load_adapter("trunkline.transports", f"{server}?timeout_s=1{extra}", system_clock)
    assert raised.value.code == code


@pytest.mark.parametrize(("database", "code"), [("x", "E241"), ("99", "E246")])
async def test_a_database_that_is_none_is_refused(server, database, code):
    with pytest.raises(ConfigurationError) as raised:
        async with opened(server.replace("/0", f"/{database}")):
            pass
    assert raised.value.code == code


async def test_databases_are_apart(server, prefix):
    queue = Queue("q")
    async with opened(server.replace("/0", f"/3?prefix={prefix}"), channels=[queue]) as transport:
        await transport.send(staged(queue, 1))
    assert await raw(server, "EXISTS", f"{prefix}:{{q}}:log") == 0


# --- who may ---


async def test_a_wrong_or_missing_password_is_told_at_once():
    url = brokers.broker_url("redis:password")
    secret = url.partition(":")[2].partition("@")[0].rpartition(":")[2]
    assert secret
    for wrong in (url.replace(secret, "open-sesame"), url.replace(f":{secret}@", "")):
        error = await refusal(f"{wrong}?timeout_s=5")
        assert error.code == "E244"
        assert "open-sesame" not in str(error)
    async with opened(url):
        pass


async def test_a_user_without_permission_is_told_which(server, prefix):
    await raw(server, "ACL", "SETUSER", "reader", "on", ">pw", f"~{prefix}*", "+@all", "-xreadgroup")
    url = server.replace("//", "//reader:pw@") + f"?prefix={prefix}"
    error = await refusal(url, Subscription("a", Queue("q")))
    assert error.code == "E246"
    assert "xreadgroup" in str(error)
    error = await refusal(url.replace(prefix, "foreign"), Subscription("a", Queue("q")))
    assert error.code == "E246"
    await raw(server, "ACL", "DELUSER", "reader")


async def test_the_permissions_of_the_page_are_enough(server, prefix):
    page = (brokers.ROOT / "docs" / "reference" / "redis.md").read_text(encoding="utf-8")
    allowed = [word for line in re.findall(r"`([^`]*)`", page) for word in line.split() if word.startswith("+")]
    assert len(allowed) > 30
    await raw(server, "ACL", "SETUSER", prefix, "on", ">pw", f"~{prefix}*", "-@all", *allowed)
    url = server.replace("//", f"//{prefix}:pw@") + f"?prefix={prefix}&lease_s=1&replicas=0"
    channels = [Queue("q"), Topic("t"), Stream("s", partitions=2, retention_s=60)]
    subscriptions = [Subscription("a", channel) for channel in channels]
    async with opened(url, *subscriptions) as transport, opened(url, *subscriptions):
        for subscription in subscriptions:
            await transport.send(staged(subscription.channel, 1))
        await asyncio.sleep(1.5)
        await transport.tidy()
        for subscription in subscriptions:
            await transport.backlog(subscription)
    entries = await raw(server, "ACL", "LOG")
    assert not [entry for entry in entries if prefix.encode() in entry]
    await raw(server, "ACL", "DELUSER", prefix)


async def test_tls_is_verified():
    url = brokers.broker_url("redis:tls")
    assert (await refusal(f"{url}?timeout_s=5")).code == "E245"
    async with opened(f"{url}?timeout_s=5&ca={brokers.certificate('redis:tls')}"):
        pass
    error = await refusal(url.replace("rediss", "redis") + "?timeout_s=5")
    assert error.code == "E245"
    assert "write rediss://" in str(error)


def test_the_look_for_tls_leaves_nothing_open():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    brokers.broker_url("redis:tls")
    certificate = brokers.certificate("redis:tls")
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    held = []

    def serve(listener):
        """Take whoever greets, and never answer a farewell."""
        while not held:
            with contextlib.suppress(ssl.SSLError):
                held.append(context.wrap_socket(listener.accept()[0], server_side=True))

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve, listener)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            error = asyncio.run(refusal(f"redis://127.0.0.1:{listener.getsockname()[1]}?timeout_s=5"))
            gc.collect()
        served.result()
        held.pop().close()
    assert error.code == "E245"
    assert [str(warning.message) for warning in told] == []


async def test_a_port_without_tls_is_told(server):
    error = await refusal(server.replace("redis://", "rediss://") + "?timeout_s=5")
    assert error.code == "E245"
    assert "write redis://" in str(error)


async def test_tls_to_a_port_without_is_told(server):
    error = await refusal(server.replace("redis", "rediss", 1) + "?timeout_s=2")
    assert error.code in ("E245", "E520")
    assert "TLS" in str(error)


async def test_a_node_of_a_cluster_is_refused():
    url = await asyncio.to_thread(brokers.broker_url, "redis@cluster", "cluster-enabled=yes")
    try:
        error = await refusal(url)
    finally:
        await asyncio.to_thread(brokers.stop, "redis@cluster")
    assert error.code == "E248"
    assert "runs as cluster" in str(error)


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (b"-ERR unknown command `HELLO`\r\n", "6.0 or older"),
        (b"*4\r\n$7\r\nversion\r\n$5\r\n6.0.9\r\n$4\r\nrole\r\n$6\r\nmaster\r\n", "6.0.9"),
    ],
)
async def test_a_server_that_is_too_old_is_refused(answer, shown):
    async def serve(reader, writer):
        await reader.readuntil(b"PING\r\n")
        writer.write(answer + b"+OK\r\n+PONG\r\n")
        await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as old:
        error = await refusal(f"redis://127.0.0.1:{old.sockets[0].getsockname()[1]}")
    assert error.code == "E248"
    assert shown in str(error)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "E207"),
        ("ERR Error running script (call to f_1): @user_script:3: WRONGTYPE Operation against a key", "E207"),
        ("NOPERM this user has no permissions to run the 'xadd' command", "E246"),
        ("ERR The user executing the script can't run this command or subcommand", "E246"),
        ("MISCONF Errors writing to the AOF file: No space left on device", "E522"),
        ("READONLY You can't write against a read only replica.", "E522"),
        ("ERR something new", "E522"),
    ],
)
def test_what_the_server_says_is_told_in_our_words(text, code):
    error = failure("redis://there", Refusal(text))
    assert error.code == code
    assert getattr(error, "retryable", False) == (code == "E522")


@pytest.mark.parametrize("place", ["no.such.host.invalid:1", "127.0.0.1:1"])
async def test_a_server_that_cannot_be_reached_is_told_in_time(place):
    error = await refusal(f"redis://{place}/0?timeout_s=0.5")
    assert error.code == "E520"


async def test_the_next_host_is_tried(server, prefix):
    place = server.partition("//")[2]
    queue = Queue("q")
    async with opened(f"redis://127.0.0.1:1,{place}?prefix={prefix}", channels=[queue]) as transport:
        await transport.send(staged(queue, 1))


# --- publishing ---


async def test_what_is_too_large_is_refused_and_the_rest_is_sent(url):
    queue = Queue("q")
    subscription = Subscription("a", queue)
    large = Staged(queue, message(0, data=b'"%s"' % (b"x" * MAX_WIRE_BYTES)))
    async with opened(url, subscription) as transport:
        with pytest.raises(PublishError) as raised:
            await transport.send([*staged(queue, 1), large, *staged(queue, 2)])
        assert raised.value.code == "E313"
        assert raised.value.unsent == [large]
        assert numbers(await receive(transport, subscription, 2)) == [1, 2]


async def test_replicas_that_are_not_there_leave_the_outcome_open(server, prefix):
    queue = Queue("q")
    async with opened(f"{server}?prefix={prefix}&timeout_s=3&replicas=1", channels=[queue]) as transport:
        batch = staged(queue, 1)
        with pytest.raises(TransportError) as raised:
            await transport.send(batch)
        assert raised.value.code == "E521"
        assert raised.value.unsent == batch


async def test_many_callers_are_told_each_for_itself(url):
    queue, topic = Queue("q"), Topic("t")
    subscription = Subscription("a", queue)
    async with opened(url, subscription, channels=[topic]) as transport:
        await asyncio.gather(
            *(transport.send(staged(queue, number)) for number in range(50)),
            transport.send([*staged(topic, 1), *staged(queue, 50)]),
            transport.send([]),
        )
        assert sorted(numbers(await receive(transport, subscription, 51))) == list(range(51))


# --- sharing ---


async def test_a_queue_keeps_nothing_that_is_settled(url, prefix):
    queue = Queue("q")
    subscription = Subscription("a", queue)
    async with opened(url, subscription) as transport:
        await transport.send(staged(queue, *range(10)))
        found = await receive(transport, subscription, 10)
        backlog = await transport.backlog(subscription)
        assert (backlog.waiting, backlog.in_flight) == (10, 10)
        await transport.settle(found[5:])
        await transport.settle(found[:5])
        assert (await transport.backlog(subscription)).waiting == 0
    assert await raw(url, "XLEN", f"{prefix}:{{q}}:log") == 0


async def test_a_topic_is_trimmed_to_what_its_slowest_subscription_needs(url, prefix):
    topic = Topic("t")
    fast, slow = Subscription("fast", topic), Subscription("slow", topic)
    async with opened(url, fast, slow) as transport:
        await transport.send(staged(topic, *range(10)))
        await transport.settle(await receive(transport, fast, 10))
        held = await receive(transport, slow, 10)
        await transport.settle(held[:4] + held[5:])
        await transport.tidy()
        assert await raw(url, "XLEN", f"{prefix}:{{t}}:log") == 6
        assert (await transport.backlog(slow)).waiting == 1
        await transport.settle(held[4:5])
        await until(lambda: has_length(url, f"{prefix}:{{t}}:log", 0))


async def has_length(url, key, length):
    return await raw(url, "XLEN", key) == length


async def test_a_topic_that_nobody_reads_does_not_grow(url, prefix):
    topic = Topic("t")
    async with opened(url, channels=[topic]) as transport:
        await transport.send(staged(topic, *range(10)))
        await transport.tidy()
        assert await raw(url, "XLEN", f"{prefix}:{{t}}:log") == 0


async def test_a_topic_keeps_what_comes_while_its_reader_is_down(url):
    topic = Topic("t")
    subscription = Subscription("a", topic)
    async with opened(url, subscription):
        pass
    async with opened(url, channels=[topic]) as transport:
        await transport.send(staged(topic, 1, 2))
        await transport.tidy()
    async with opened(url, subscription) as transport:
        assert (await transport.backlog(subscription)).waiting == 2
        assert numbers(await receive(transport, subscription, 2)) == [1, 2]


async def test_what_a_process_gives_back_comes_at_once_and_is_no_suspect(server, prefix):
    queue = Queue("q")
    subscription = Subscription("a", queue)
    url = f"{server}?prefix={prefix}&lease_s=60"
    async with opened(url, subscription) as first:
        await first.send(staged(queue, *range(500)))
        held = await receive(first, subscription, 5)  # and more wait for it in this process
        await first.settle(held[:2])
    async with opened(url, subscription) as second:
        found = await receive(second, subscription, 498)
        assert sorted(numbers(found)) == list(range(2, 500))
        assert not any(delivery.suspect for delivery in found)


async def test_what_a_silent_process_held_is_taken_over_as_suspect(url, prefix):
    queue = Queue("q")
    subscription = Subscription("a", queue)
    async with opened(url, channels=[queue]) as transport:
        await transport.send(staged(queue, 1, 2))
    await raw(url, "XREADGROUP", "GROUP", "receivers", "dead", "COUNT", 1, "STREAMS", f"{prefix}:{{q}}:log", ">")
    async with opened(url, subscription) as transport:
        (new,) = await receive(transport, subscription, 1)
        (old,) = await receive(transport, subscription, 1)
        assert (numbers([new]), new.suspect) == ([2], False)
        assert (numbers([old]), old.suspect) == ([1], True)
        await transport.settle([old, new])
        assert (await transport.backlog(subscription)).waiting == 0


async def test_a_long_handler_keeps_its_message(server, prefix):
    url = f"{server}?prefix={prefix}&lease_s=2"
    queue = Queue("q")
    subscription = Subscription("a", queue)
    async with opened(url, subscription) as first, opened(url, subscription) as second:
        await first.send(staged(queue, 1))
        taken = await asyncio.wait(
            [asyncio.ensure_future(receive(t, subscription, 1, within_s=60)) for t in (first, second)],
            timeout=3,
        )
        done, pending = taken
        assert len(done) == 1
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        # Drained as at a stop: it is still worked on.
        await first.drain()
        await second.drain()
        await asyncio.sleep(4)
        async with opened(url, subscription) as third:
            with pytest.raises(TimeoutError):
                await receive(third, subscription, 1, within_s=1)


async def test_a_late_settle_harms_nobody(url):
    queue = Queue("q")
    subscription = Subscription("a", queue)
    async with opened(url, subscription) as first:
        await first.send(staged(queue, 1))
        held = await receive(first, subscription, 1)
        await first.drain()
        for reader in first._readers.values():
            await reader.stop()
        async with opened(url, subscription) as second:
            again = await receive(second, subscription, 1)
            await second.settle(again)
            await first.settle(held)
            assert (await second.backlog(subscription)).waiting == 0


# --- streams ---


async def test_partitions_move_to_a_process_that_comes_and_back_when_it_goes(url):
    stream = Stream("s", partitions=8)
    subscription = Subscription("a", stream)

    def owned(transport):
        return {number for number in range(8) if transport.owns(subscription, number)}

    async with opened(url, subscription) as first:
        assert owned(first) == set(range(8))
        async with opened(url, subscription) as second:

            async def shared():
                return len(owned(first)) == len(owned(second)) == 4

            await until(shared)
            assert owned(first) | owned(second) == set(range(8))

        async def alone():
            return len(owned(first)) == 8

        await until(alone)


async def test_a_planned_move_waits_for_what_is_under_way(server, prefix):
    url = f"{server}?prefix={prefix}&lease_s=2"
    stream = Stream("s", partitions=2)
    subscription = Subscription("a", stream)
    batch = [Staged(stream, message(number, f"key-{number % 16}")) for number in range(64)]
    async with opened(url, subscription) as first:
        await first.send(batch)
        held = await receive(first, subscription, 64)
        async with opened(url, subscription) as second:
            await asyncio.sleep(4)
            assert [first.owns(subscription, number) for number in (0, 1)] == [True, True]
            await first.settle(held)

            async def moved():
                return second.owns(subscription, 0) or second.owns(subscription, 1)

            await until(moved)
            assert (await second.backlog(subscription)).waiting == 0


async def test_a_process_whose_whole_inflow_moves_away_reads_on(url):
    stream = Stream("s", partitions=2)
    subscription = Subscription("a", stream)
    stays, leaves = (next(k for k in map(str, itertools.count()) if crc32(k.encode()) % 2 == n) for n in (0, 1))
    async with opened(url, subscription) as first:
        await first.send(staged(stream, *range(3000), key=leaves))
        inflow = first._readers[subscription.label].inflow

        async def full():
            return inflow._writers

        async def gone():
            return not len(inflow)

        await until(full)
        async with opened(url, subscription):
            await until(gone)
            await first.send(staged(stream, 7, key=stays))
            assert numbers(await receive(first, subscription, 1)) == [7]


async def test_only_the_owner_moves_the_cursor(url):
    stream = Stream("s", partitions=1)
    subscription = Subscription("a", stream)
    async with opened(url, subscription) as first:
        await first.send(staged(stream, *range(10), key="k"))
        held = await receive(first, subscription, 10)
        (reader,) = first._readers.values()
        await reader.stop()  # no sign of life from now on
        await asyncio.sleep(1.2)
        async with opened(url, subscription) as second:
            again = await receive(second, subscription, 10)
            assert numbers(again) == list(range(10))
            assert all(delivery.suspect for delivery in again)
            await first.settle(held)
            assert (await second.backlog(subscription)).waiting == 10
            await second.settle(again[:3])
            assert (await second.backlog(subscription)).waiting == 7


async def test_the_cursor_stops_at_the_lowest_unfinished(url):
    stream = Stream("s", partitions=1)
    subscription = Subscription("a", stream)
    async with opened(url, subscription) as first:
        await first.send(staged(stream, *range(10), key="k"))
        held = await receive(first, subscription, 10)
        await first.settle(held[:3] + held[5:])
        backlog = await first.backlog(subscription)
        assert (backlog.waiting, backlog.in_flight) == (7, 7)
    async with opened(url, subscription) as second:
        again = await receive(second, subscription, 7)
        assert numbers(again) == list(range(3, 10))
        assert not any(delivery.suspect for delivery in again)  # the first process ended by itself
        assert [delivery.position for delivery in again] == [delivery.position for delivery in held[3:]]


async def test_a_new_name_replays_and_latest_begins_at_the_end(url):
    stream = Stream("s", partitions=2)
    async with opened(url, channels=[stream]) as transport:
        await transport.send(staged(stream, 1, 2, key="k"))
    early, late = Subscription("early", stream), Subscription("late", stream, "latest")
    async with opened(url, early, late) as transport:
        assert numbers(await receive(transport, early, 2)) == [1, 2]
        assert (await transport.backlog(late)).waiting == 0
        await transport.send(staged(stream, 3, key="k"))
        assert numbers(await receive(transport, late, 1)) == [3]


async def test_retention_removes_what_is_old(url, prefix):
    stream = Stream("s", partitions=1, retention_s=1.0)
    subscription = Subscription("a", stream)
    async with opened(url, channels=[stream]) as transport:
        await transport.send(staged(stream, 1, 2, key="k"))
        await transport.tidy()
        assert await raw(url, "XLEN", f"{prefix}:{{s}}:0") == 2
        await asyncio.sleep(2.1)
        await transport.send(staged(stream, 3, key="k"))
        await transport.tidy()
        assert await raw(url, "XLEN", f"{prefix}:{{s}}:0") == 1
    async with opened(url, subscription) as transport:
        assert (await transport.backlog(subscription)).waiting == 1
        assert numbers(await receive(transport, subscription, 1)) == [3]


@pytest.mark.parametrize(
    "entry_id", [b"5-7", b"1700000000000-2097151", b"1700000000000-2097152", b"9999999999999999-1"]
)
def test_positions_rise_and_lead_back_to_their_ids(entry_id):
    positions = Positions()
    first = positions.of(b"1-0")
    position = positions.of(entry_id)
    assert first < position < 1 << 63
    assert positions.id_of(position) == entry_id


# --- other programs ---

ODD = ("1700000000000-2097151", "1700000000000-2097152", "1700000000001-0", "4398046511105-7", "99999999999999999-1")
"""Ids of which some do not fit into a position, and then share one with others."""


@pytest.mark.parametrize("channel", [Queue("odd"), Topic("odd"), Stream("odd", partitions=1)], ids=lambda c: c.kind)
async def test_ids_that_other_programs_chose_are_settled_too(url, prefix, channel):
    subscription = Subscription("a", channel)
    key = f"{prefix}:{{odd}}:{'0' if channel.kind == 'stream' else 'log'}"
    async with opened(url, subscription) as transport:
        for number, entry_id in enumerate(ODD):
            await raw(url, "XADD", key, entry_id, "e", encode(message(number)))
        found = await receive(transport, subscription, len(ODD))
        assert numbers(found) == list(range(len(ODD)))
        assert len({delivery.position for delivery in found}) == len(ODD)
        await transport.settle(found)
        assert (await transport.backlog(subscription)).waiting == 0


async def test_other_programs_write_events_and_plain_fields(url, prefix):
    queue = Queue("q", plain="sensor.read")
    subscription = Subscription("a", queue)
    key = f"{prefix}:{{q}}:log"
    binary = ("ce_id", "7", "ce_source", "dev", "ce_type", "t", "ce_specversion", "1.0", "ce_partitionkey", "k")
    async with opened(url, subscription) as transport:
        await raw(url, "XADD", key, "*", "e", encode(message(1)))
        await raw(url, "XADD", key, "*", *binary, "data", '{"n":2}')
        await raw(url, "XADD", key, "*", "data", encode(message(3)), "content-type", "application/cloudevents+json")
        await raw(url, "XADD", key, "*", "body", '{"n":4}', "room", "kitchen")
        await raw(url, "XADD", key, "*", "value", '{"n":5}')
        found = await receive(transport, subscription, 5)
        assert numbers(found) == [1, 2, 3, 4, 5]
        assert [delivery.message.type for delivery in found] == ["thing", "t", "thing", "sensor.read", "sensor.read"]
        assert found[1].key == "k"
        assert found[3].message.id.startswith(f"{key}/")
        await transport.settle(found)


async def test_what_is_no_message_is_handed_over_with_its_bytes(url, prefix):
    queue = Queue("q")
    subscription = Subscription("a", queue)
    key = f"{prefix}:{{q}}:log"
    async with opened(url, subscription) as transport:
        await raw(url, "XADD", key, "*", "e", b"\xff\x00")
        await raw(url, "XADD", key, "*", "data", b"plain")
        await raw(url, "XADD", key, "99999999999999999-5", "data", b"odd")
        found = await receive(transport, subscription, 3)
        assert [(delivery.message, delivery.raw) for delivery in found] == [
            (None, b"\xff\x00"), (None, b"plain"), (None, b"odd"),
        ]  # fmt: skip
        await transport.settle(found)
        assert (await transport.backlog(subscription)).waiting == 0


# --- faults ---


@pytest.fixture
def faulty(prefix):
    """A server of its own, as it was before when the test ends."""
    url = brokers.broker_url(FAULTY)
    yield f"{url}?prefix={prefix}&lease_s=2&timeout_s=20"
    brokers.resume(FAULTY)


class Traffic:
    """Publishes numbers to channels and receives them, all at once; knows what was confirmed and what came."""

    def __init__(self, transport, subscriptions):
        self.transport = transport
        self.confirmed = {subscription.channel.name: [] for subscription in subscriptions}
        self.seen = {subscription.channel.name: [] for subscription in subscriptions}
        self._over = False
        self._subscriptions = subscriptions
        self._publishers = [asyncio.ensure_future(self._publish(s.channel)) for s in subscriptions]
        self._consumers = [asyncio.ensure_future(self._consume(s)) for s in subscriptions]

    async def _publish(self, channel):
        for number in itertools.count():
            if self._over:
                return
            with contextlib.suppress(TransportError):  # what was not confirmed may be lost
                await self.transport.send(staged(channel, number, key=str(number % 8)))
                self.confirmed[channel.name].append(number)

    async def _consume(self, subscription):
        while True:
            found = await self.transport.receive(subscription, 100)
            self.seen[subscription.channel.name] += numbers(found)
            await self.transport.settle(found)

    async def goes_on(self):
        """Wait until every channel confirms more than now."""
        before = {name: len(found) for name, found in self.confirmed.items()}

        async def more():
            return all(len(found) > before[name] + 50 for name, found in self.confirmed.items())

        await until(more, 20)

    async def end(self):
        """Publish no more; wait until everything confirmed has come and nothing waits."""
        self._over = True
        await asyncio.gather(*self._publishers)

        async def complete():
            if not all(set(found) <= set(self.seen[name]) for name, found in self.confirmed.items()):
                return False
            waiting = [await self.transport.backlog(subscription) for subscription in self._subscriptions]
            return not any(backlog.waiting for backlog in waiting)

        try:
            await until(complete, 20)
        finally:
            for task in self._consumers:
                task.cancel()
            await asyncio.gather(*self._consumers, return_exceptions=True)


async def test_a_server_that_dies_loses_nothing_that_was_confirmed(faulty):
    subscriptions = [Subscription("a", channel) for channel in (Queue("q"), Topic("t"), Stream("s", partitions=4))]
    async with opened(faulty, *subscriptions) as transport:
        traffic = Traffic(transport, subscriptions)
        await traffic.goes_on()
        await asyncio.to_thread(brokers.kill, FAULTY)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(brokers.resume, FAULTY)
        await traffic.goes_on()
        await asyncio.to_thread(brokers.restart, FAULTY)
        await traffic.goes_on()
        await traffic.end()
    for key in range(8):  # first deliveries of each key come in order
        order = list(dict.fromkeys(number for number in traffic.seen["s"] if number % 8 == key))
        assert order == sorted(order)


async def test_while_the_server_is_down_only_the_connection_says_so(faulty, caplog):
    subscriptions = [Subscription("a", channel) for channel in (Queue("q"), Topic("t"), Stream("s", partitions=4))]
    async with opened(faulty, *subscriptions):
        caplog.clear()
        await asyncio.to_thread(brokers.kill, FAULTY)
        await asyncio.sleep(3)
        said = [record for record in caplog.records if record.levelname == "WARNING"]
        await asyncio.to_thread(brokers.resume, FAULTY)
        async with asyncio.timeout(20):
            while "connected again after" not in caplog.text:
                await asyncio.sleep(0.05)
    assert "trunkline.link" in {record.name for record in said}
    others = [record.getMessage() for record in said if record.name != "trunkline.link"]
    assert [text for text in others if "lost partitions" not in text] == []


async def test_without_a_server_publishing_ends_in_time(faulty):
    queue = Queue("q")
    async with opened(faulty.replace("timeout_s=20", "timeout_s=3"), channels=[queue]) as transport:
        await asyncio.to_thread(brokers.kill, FAULTY)
        batch = staged(queue, 1)
        for _ in range(2):
            with pytest.raises(TransportError) as raised:
                await transport.send(batch)
            assert raised.value.code in ("E520", "E521")
            assert raised.value.unsent == batch
        assert raised.value.code == "E520"


async def test_a_server_that_stops_answering_is_left(faulty):
    queue = Queue("q")
    pid = (
        brokers.record(FAULTY)["nodes"][0]["pid"]
        if "nodes" in brokers.record(FAULTY)
        else brokers.record(FAULTY)["pid"]
    )
    async with opened(faulty.replace("timeout_s=20", "timeout_s=3"), channels=[queue]) as transport:
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(TransportError) as raised:
                await transport.send(staged(queue, 1))
            assert raised.value.code == "E521"
        finally:
            os.kill(pid, signal.SIGCONT)

        async def sends_again():
            try:
                await transport.send(staged(queue, 2))
            except TransportError:
                return False
            return True

        await until(sends_again)


@contextlib.asynccontextmanager
async def full(url):
    """While this lasts the server has no memory left, whatever is deleted."""
    await raw(url, "CONFIG", "SET", "maxmemory", "1")
    try:
        yield
    finally:
        await raw(url, "CONFIG", "SET", "maxmemory", "0")


async def refused(transport, channel):
    """Publish to a full server."""
    batch = staged(channel, -1)
    with pytest.raises(TransportError) as raised:
        await transport.send(batch)
    assert raised.value.code == "E522"
    assert "memory" in str(raised.value)
    assert raised.value.unsent == batch


async def emptied(transport, subscription):
    """Receive and settle until nothing waits; return what came."""
    found = []
    async with asyncio.timeout(20):
        while (await transport.backlog(subscription)).waiting:
            deliveries = await transport.receive(subscription, 100)
            found += numbers(deliveries)
            await transport.settle(deliveries)
    return found


def three_kinds():
    return [Subscription("a", channel) for channel in (Queue("q"), Topic("t"), Stream("s", partitions=2))]


async def test_a_full_server_says_so_and_takes_more_later(faulty):
    queue = Queue("q")
    async with opened(faulty, channels=[queue]) as transport:
        async with full(faulty):
            await refused(transport, queue)
        await transport.send(staged(queue, 1))


async def test_a_process_that_starts_while_the_server_is_full_empties_it(faulty):
    subscriptions = three_kinds()
    async with opened(faulty, *subscriptions):
        pass
    async with opened(faulty, channels=[subscription.channel for subscription in subscriptions]) as transport:
        for subscription in subscriptions:
            await transport.send(staged(subscription.channel, *range(300)))
    async with full(faulty), opened(faulty, *subscriptions) as transport:
        for subscription in subscriptions:
            assert sorted(await emptied(transport, subscription)) == list(range(300))
            await refused(transport, subscription.channel)
        await transport.tidy()
    async with opened(faulty, *subscriptions) as transport:
        for subscription in subscriptions:
            await transport.send(staged(subscription.channel, 300))
            assert await emptied(transport, subscription) == [300]


async def test_a_process_that_is_cut_off_from_a_full_server_comes_back_and_empties_it(faulty):
    subscriptions = three_kinds()
    async with opened(faulty, *subscriptions) as transport:
        held = {}
        for subscription in subscriptions:
            await transport.send(staged(subscription.channel, *range(3000)))  # more than a process takes at once
            held[subscription.label] = await receive(transport, subscription, 10)
        async with full(faulty):
            await raw(faulty, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            for subscription in subscriptions:
                first = held[subscription.label]
                await transport.settle(first)
                came = numbers(first) + await emptied(transport, subscription)
                assert sorted(came) == list(range(3000))
                await refused(transport, subscription.channel)
        for subscription in subscriptions:
            await transport.send(staged(subscription.channel, 3000))
            assert await emptied(transport, subscription) == [3000]


async def test_a_process_keeps_its_partitions_while_the_server_is_full(faulty):
    subscription = Subscription("a", Stream("s", partitions=2))
    async with opened(faulty, subscription) as transport, full(faulty):
        owners, assignment = transport._readers[subscription.label]._owners, transport.assignment(subscription)

        async def lease_ends():
            return [int(held.partition(b" ")[0]) for held in await raw(faulty, "HVALS", owners)]

        latest = max(await lease_ends())

        async def renewed():
            return min(await lease_ends()) > latest + 2500  # the lease is of 2 s: the first one is over

        await until(renewed)
        assert [transport.owns(subscription, number) for number in range(2)] == [True, True]
        assert transport.assignment(subscription) == assignment


async def test_what_is_new_is_declared_while_the_server_is_full(faulty):
    subscriptions = three_kinds()
    async with full(faulty), opened(faulty, *subscriptions) as transport:
        for subscription in subscriptions:
            await refused(transport, subscription.channel)
            assert (await transport.backlog(subscription)).waiting == 0


def test_every_script_that_may_take_memory_begins_with_a_deletion():
    # Redis 6.2 refuses all of XGROUP to the first write of a script while memory is full, 7 XGROUP CREATE only.
    taking = re.compile(r"'(HSET|HSETNX|ZADD|XADD|XGROUP)'")
    deletion = re.compile(r"^(?:though_full|redis\.call)\('(?:HDEL|XDEL|ZREMRANGEBYSCORE)'", re.MULTILINE)
    takers = [script._text for script in ALL if taking.search(script._text)]
    assert len(takers) == 8
    for text in takers:
        first = deletion.search(text)
        assert first, text
        assert first.start() < taking.search(text).start(), text


async def test_everything_deleted_on_the_server_is_declared_again(faulty):
    queue, stream = Queue("q"), Stream("s", partitions=2)
    subscriptions = [Subscription("a", queue), Subscription("a", stream)]
    async with opened(faulty, *subscriptions) as transport:
        await raw(faulty, "FLUSHALL")
        await raw(faulty, "SCRIPT", "FLUSH")
        await asyncio.sleep(2.5)
        await transport.send([*staged(queue, 1), *staged(stream, 2, key="k")])
        assert numbers(await receive(transport, subscriptions[0], 1)) == [1]
        assert numbers(await receive(transport, subscriptions[1], 1)) == [2]


async def test_a_stream_is_read_on_after_everything_but_the_scripts_was_deleted(faulty, caplog):
    subscription = Subscription("a", Stream("s", partitions=2))
    async with opened(faulty, subscription) as transport:
        await raw(faulty, "FLUSHALL")
        await transport.send(staged(subscription.channel, 1, key="k"))
        await transport.send(staged(subscription.channel, 2, key="k"))
        assert numbers(await receive(transport, subscription, 2, 15)) == [1, 2]
    assert "NOGROUP" in caplog.text


@pytest.mark.parametrize("start", ["earliest", "latest", datetime(2025, 11, 1, tzinfo=UTC)], ids=str)
async def test_a_group_that_was_deleted_begins_where_its_owner_is(url, prefix, start):
    subscription = Subscription("a", Stream("s", partitions=1), start)
    async with opened(url, subscription) as transport:
        await transport.send(staged(subscription.channel, 1, 2))
        await transport.settle(await receive(transport, subscription, 2))
        stream = transport._readers[subscription.label].names.streams[0]
        assert await raw(url, "XGROUP", "DESTROY", stream, transport._readers[subscription.label].group) == 1
        await transport.send(staged(subscription.channel, 3, 4))
        third, _ = await receive(transport, subscription, 2)
        await transport.settle([third])
    async with opened(url, subscription) as transport:
        assert numbers(await receive(transport, subscription, 1)) == [4]


async def test_a_partition_whose_group_was_deleted_is_taken_over(server, prefix):
    url = f"{server}?prefix={prefix}&lease_s=1"
    subscription = Subscription("a", Stream("s", partitions=1), "latest")
    async with opened(url, subscription) as first, opened(url, subscription) as second:
        await first.send(staged(subscription.channel, 1))
        await receive(first, subscription, 1)
        reader = first._readers[subscription.label]
        await raw(url, "XGROUP", "DESTROY", reader.names.streams[0], reader.group)
        await reader.stop()  # it shows no sign of life any more
        assert numbers(await receive(second, subscription, 1)) == [1]


async def test_a_connection_that_is_cut_is_made_again(url):
    queue = Queue("q")
    subscription = Subscription("a", queue)
    async with opened(url, subscription) as transport:
        await transport.send(staged(queue, 1))
        held = await receive(transport, subscription, 1)
        await raw(url, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await transport.settle(held)
        await transport.send(staged(queue, 2))
        assert numbers(await receive(transport, subscription, 1)) == [2]


# --- whole systems ---

orders = Stream("redis-orders", key="customer", partitions=4)
jobs = Queue("redis-jobs")


@orders.event
class Order(msgspec.Struct):
    customer: str
    n: int


@jobs.command
class Job(msgspec.Struct):
    n: int


def worker(path, *, pause_s=0.0):
    """Return a service that writes down what it handled."""
    service = Service("worker")

    @service.handle
    async def order(message: Order) -> None:
        with path.open("a") as file:
            file.write(f"{message.customer} {message.n}\n")
        await asyncio.sleep(pause_s)

    @service.handle
    async def job(message: Job) -> None:
        with path.open("a") as file:
            file.write(f"job {message.n}\n")
        await asyncio.sleep(pause_s)

    return service


def main(url, store, path):
    App(worker(Path(path), pause_s=0.01), url, store=store).run()


async def run_until_half(url, store, path):
    """Handle in another process, and kill it in the middle."""
    script = f"from tests.transports.test_redis import main; main({url!r}, {store!r}, {str(path)!r})"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, cwd=brokers.ROOT)

    async def half_way():
        return path.exists() and len(path.read_text().splitlines()) > 40

    try:
        await until(half_way, 20)
    finally:
        process.kill()
        await process.wait()


async def test_a_killed_process_is_survived(url, tmp_path):
    path, store = tmp_path / "handled", f"sqlite:///{tmp_path / 's.db'}"
    async with opened(url, Subscription("worker", orders), channels=[jobs]):
        pass
    async with App(Service("publisher"), url, store="none:") as app:
        for number in range(100):
            await app.publish(Order(f"c{number % 4}", number))
            await app.publish(Job(number))
    await run_until_half(url, store, path)
    async with App(worker(path), url, store=store):

        async def complete():
            return len(set(path.read_text().splitlines())) == 200

        await until(complete, 20)
    lines = path.read_text().splitlines()
    for customer in range(4):
        order = list(dict.fromkeys(line for line in lines if line.startswith(f"c{customer} ")))
        assert order == [f"c{customer} {number}" for number in range(customer, 100, 4)]
