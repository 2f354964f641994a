"""RabbitMQ against a real server: declaring, refusals, sharing, faults, what other programs write.

What is true of every transport is tested by the conformance suite.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
import uuid
from zlib import crc32

import pytest
from pamqp import body as bodies
from pamqp import commands, frame, header

from tests import brokers
from trunkline import App, Queue, Service, Stream, Struct, Topic
from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError, PublishError, StoreFullError, TransportError, UnroutableError
from trunkline.handler import make_message
from trunkline.message import Message
from trunkline.testing.proxy import Proxy
from trunkline.transport import Staged, Subscription, load_adapter, parse_address
from trunkline.transports.rabbitmq.client import AmqpError, Arrived, Channel, Connection, connect
from trunkline.transports.rabbitmq.names import Declarer, Names
from trunkline.transports.rabbitmq.queue_reader import Unacked, read_message
from trunkline.transports.rabbitmq.stream_reader import offset_of
from trunkline.transports.rabbitmq.tokens import Token, Tokens
from trunkline.wire import MAX_WIRE_BYTES

FAULTY = "rabbitmq@faults"
YOUNG = "rabbitmq@young"
pytestmark = [pytest.mark.xdist_group("rabbitmq"), pytest.mark.timeout(180)]


@pytest.fixture(scope="session")
def server() -> str:
    return brokers.broker_url("rabbitmq")


@pytest.fixture
def prefix() -> str:
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def url(server, prefix) -> str:
    return f"{server}?prefix={prefix}&timeout_s=10"


@pytest.fixture(autouse=True)
async def _removed(request, prefix):
    """Remove what a test has declared."""
    yield
    if "url" not in request.fixturenames:
        return
    async with raw(brokers.broker_url("rabbitmq")) as connection:
        for name, kind in declared.pop(prefix, ()):
            channel = await connection.channel()
            request = commands.Queue.Delete(queue=name) if kind == "queue" else commands.Exchange.Delete(exchange=name)
            with contextlib.suppress(AmqpError):
                await channel.call(request, object)


declared: dict[str, list[tuple[str, str]]] = {}


def note(url, channels, subscriptions):
    """Remember what `_removed` is to remove."""
    prefix = parse_address(url).options["prefix"]
    names = Names(prefix)
    found = declared.setdefault(prefix, [])
    for channel in channels:
        found += [(names.channel(channel.name), "exchange"), (names.channel(channel.name), "queue")]
        found += [
            (names.partition(channel.name, number), "queue") for number in range(getattr(channel, "partitions", 0))
        ]
    for subscription in subscriptions:
        found += [(names.subscription(subscription, part), "queue") for part in (None, "members")]
        numbers = range(getattr(subscription.channel, "partitions", 0))
        found += [(names.subscription(subscription, number), "queue") for number in numbers]


async def started(url, *subscriptions, channels=()):
    channels = [*channels, *(subscription.channel for subscription in subscriptions)]
    note(url, channels, subscriptions)
    transport = load_adapter("trunkline.transports", url, system_clock)
    await transport.start(channels, subscriptions)
    return transport


@contextlib.asynccontextmanager
async def opened(url, *subscriptions, channels=()):
    transport = await started(url, *subscriptions, channels=channels)
    try:
        yield transport
    finally:
        await transport.drain()
        await transport.stop()


@contextlib.asynccontextmanager
async def raw(server):
    """Connect as another program would."""
    address = parse_address(server)
    host, port = address.hosts[0]
    connection: Connection = await connect(host, port, None, system_clock, lost=lambda _: None)
    await connection.handshake(address.user, address.password, "/", 20)
    try:
        yield connection
    finally:
        await connection.close()


def staged(channel, number=0, key=None, data=b"1"):
    message = Message(f"id-{uuid.uuid4()}", "test.happened", "test", data, time.time(), key, subject=str(number))
    return Staged(channel, message)


def subjects(deliveries):
    return [int(delivery.message.subject) for delivery in deliveries]


async def received(transport, subscription, count, *, within_s=20.0, settle=True):
    """Receive `count` deliveries."""
    found = []
    async with asyncio.timeout(within_s):
        while len(found) < count:
            batch = await transport.receive(subscription, 1000)
            found += batch
            if settle:
                await transport.settle(batch)
    return found


async def until(condition, within_s=20.0):
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.02)


# --- the URL, signing in ---


def load(url):
    return load_adapter("trunkline.transports", url, system_clock)


def test_an_unknown_option_is_refused():
    with pytest.raises(ConfigurationError, match=r"E240.*options are: ca, cert, heartbeat, key, prefix, timeout_s"):
        load("amqp://localhost?prefetch=1")


def test_a_heartbeat_that_the_protocol_cannot_say_is_refused():
    with pytest.raises(ConfigurationError, match=r"E241 heartbeat='100000' .* from 1 to 65535"):
        load("amqp://localhost?heartbeat=100000")


def test_a_prefix_that_would_make_names_ambiguous_is_refused():
    with pytest.raises(ConfigurationError, match=r"E241 prefix='a:b'"):
        load("amqp://localhost?prefix=a:b")


def test_a_certificate_without_tls_is_refused():
    with pytest.raises(ConfigurationError, match=r"E241.*without TLS; write amqps://"):
        load("amqp://localhost?ca=/etc/ca.pem")


async def test_a_wrong_password_is_refused_at_once_and_not_shown(server):
    wrong = server.replace("guest:guest", "guest:wrong-secret")
    with pytest.raises(ConfigurationError, match=r"E244.*'guest'") as caught:
        await load(wrong).start([], [])
    assert "wrong-secret" not in str(caught.value)


async def test_a_virtual_host_that_does_not_exist_is_named(server):
    with pytest.raises(ConfigurationError, match=r"E246.*nowhere not found"):
        await load(f"{server}nowhere").start([], [])


async def test_a_broker_that_is_not_there_is_said_within_the_timeout():
    begin = time.monotonic()
    with pytest.raises(TransportError, match=r"E520 amqp://127.0.0.1:1.*within 0.5 s"):
        await load("amqp://127.0.0.1:1?timeout_s=0.5").start([], [])
    assert time.monotonic() - begin < 10


async def test_the_next_host_is_tried_when_one_is_down(server, prefix):
    several = server.replace("@", "@127.0.0.1:1,")
    transport = load(f"{several}?prefix={prefix}&timeout_s=10")
    await transport.start([], [])
    await transport.stop()


async def test_a_server_that_says_nothing_is_said_within_the_timeout():
    silent = await asyncio.start_server(lambda _reader, writer: writers.append(writer), "127.0.0.1", 0)
    writers = []
    port = silent.sockets[0].getsockname()[1]
    with pytest.raises(TransportError, match=r"E520"):
        await load(f"amqp://127.0.0.1:{port}?timeout_s=0.5").start([], [])
    for writer in writers:
        writer.close()
    silent.close()
    await silent.wait_closed()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x03\x01\x00\x00", b"-ERR unknown command"]
)
async def test_a_server_of_another_protocol_is_no_broker(answer):
    async def talk(_reader, writer):
        writer.write(answer)
        writers.append(writer)

    writers = []
    other = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    with pytest.raises(ConfigurationError, match=r"E248.*AMQP"):
        await load(f"amqp://127.0.0.1:{port}?timeout_s=5").start([], [])
    for writer in writers:
        writer.close()
    other.close()
    await other.wait_closed()


# --- TLS ---


async def test_tls_is_verified_with_the_given_authority(prefix):
    tls = brokers.broker_url("rabbitmq:tls")
    certificate = brokers.certificate("rabbitmq:tls")
    with pytest.raises(ConfigurationError, match=r"E245.*ca=FILE"):
        await load(f"{tls}?prefix={prefix}").start([], [])
    queue = Queue(f"tls-{uuid.uuid4()}")
    transport = load(f"{tls}?prefix={prefix}&ca={certificate}")
    await transport.start([queue], [])
    await transport.send([staged(queue)])
    await transport.stop()
    with pytest.raises(ConfigurationError, match=r"E245.*speaks TLS; write amqps"):
        await load(f"{tls.replace('amqps', 'amqp')}?prefix={prefix}").start([], [])


async def test_tls_to_a_port_without_it_is_said(server):
    with pytest.raises(ConfigurationError, match=r"E245"):
        await load(server.replace("amqp", "amqps")).start([], [])


def test_a_file_for_tls_that_is_not_there_is_said():
    with pytest.raises(ConfigurationError, match=r"E245.*PEM"):
        load("amqps://localhost?ca=/nowhere/ca.pem")


# --- declaring ---


async def test_a_channel_that_exists_as_another_kind_is_refused(url):
    async with opened(url, channels=[Queue("orders")]):
        pass
    with pytest.raises(ConfigurationError, match=r"E207 topic 'orders' exists as queue"):
        await started(url, channels=[Topic("orders")])
    with pytest.raises(ConfigurationError, match=r"E207 stream 'orders' exists as queue"):
        await started(url, channels=[Stream("orders", partitions=2)])


async def test_a_stream_with_another_number_of_partitions_is_refused(url):
    async with opened(url, channels=[Stream("log", partitions=3)]):
        pass
    for other in (1, 2, 4, 7):
        with pytest.raises(ConfigurationError, match=f"E207.*'log' with {other} partitions exists with 3"):
            await started(url, channels=[Stream("log", partitions=other)])


async def test_a_queue_with_other_settings_is_refused(url):
    async with opened(url, channels=[Queue("orders")]):
        pass
    with pytest.raises(ConfigurationError, match=r"E207 queue 'orders' with priority.*x-queue-type quorum"):
        await started(url, channels=[Queue("orders", priority=True)])


async def test_another_retention_is_accepted_and_left_to_a_policy(url, caplog):
    async with opened(url, channels=[Stream("log", partitions=1, retention_s=100)]):
        pass
    async with opened(url, channels=[Stream("log", partitions=1, retention_s=200)]):
        assert "a policy can change it" in caplog.text


async def test_processes_that_start_at_once_both_succeed(url):
    stream, topic = Stream("log", partitions=8), Topic("news")
    subscriptions = [Subscription("a", stream), Subscription("a", topic), Subscription("b", stream)]
    transports = await asyncio.gather(*(started(url, *subscriptions, channels=[Queue("q")]) for _ in range(3)))
    for transport in transports:
        await transport.stop()


async def test_names_with_dots_do_not_meet(url):
    queue, topic, stream = Queue("orders.audit"), Topic("orders"), Stream("orders.log", partitions=1)
    audit = Subscription("audit", topic)
    async with opened(url, audit, Subscription("orders.audit", queue), channels=[stream]) as transport:
        await transport.send([staged(queue, 1), staged(topic, 2)])
        assert subjects(await received(transport, audit, 1)) == [2]


async def test_a_name_that_is_too_long_is_refused(server):
    transport = load(f"{server}?prefix={'p' * 200}")
    with pytest.raises(ConfigurationError, match=r"E241.*255 bytes"):
        await transport.start([Queue("q" * 100)], [])


# --- publishing ---


async def test_a_topic_without_any_reader_takes_messages(url):
    topic = Topic("news")
    async with opened(url, channels=[topic]) as transport:
        await transport.send([staged(topic, 1)])
        later = Subscription("later", topic)
        async with opened(url, later) as reader:
            await transport.send([staged(topic, 2)])
            assert subjects(await received(reader, later, 1)) == [2]


async def test_a_channel_that_was_not_declared_at_start_is_declared_when_it_is_used(url):
    queue, topic = Queue("late"), Topic("later")
    note(url, [queue, topic], [])
    async with opened(url) as transport:
        await transport.send([staged(queue, 1), staged(topic, 1)])
        await transport.send([staged(queue, 2)])
        reader = Subscription("late", queue)
        async with opened(url, reader) as other:
            assert subjects(await received(other, reader, 2)) == [1, 2]


async def test_a_message_that_no_queue_takes_is_an_error_and_the_others_are_sent(url, server, prefix):
    gone, there = Queue("gone"), Queue("there")
    async with opened(url, channels=[gone, there]) as transport:
        async with raw(server) as other:
            channel = await other.channel()
            await channel.call(commands.Queue.Delete(queue=f"{prefix}.gone"), commands.Queue.DeleteOk)
        batch = [staged(there, 1), staged(gone, 2), staged(there, 3)]
        with pytest.raises(UnroutableError, match=r"E313.*queue 'gone': NO_ROUTE") as caught:
            await transport.send(batch)
        assert caught.value.unsent == [batch[1]]
        reader = Subscription("there", there)
        async with opened(url, reader) as other:
            assert subjects(await received(other, reader, 2)) == [1, 3]


async def test_a_topic_whose_exchange_was_deleted_fails_alone(url, server, prefix):
    topic, queue = Topic("news"), Queue("orders")
    async with opened(url, channels=[topic, queue]) as transport:
        async with raw(server) as other:
            channel = await other.channel()
            await channel.call(commands.Exchange.Delete(exchange=f"{prefix}.news"), commands.Exchange.DeleteOk)
        results = await asyncio.gather(
            transport.send([staged(queue, 1)]),
            transport.send([staged(topic, 2)]),
            transport.send([staged(queue, 3)]),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [type(None), UnroutableError, type(None)]


async def test_a_message_larger_than_the_broker_takes_is_refused_alone(prefix):
    small = brokers.broker_url("rabbitmq@small", "max_message_size=20000")
    queue = Queue("orders")
    transport = load(f"{small}?prefix={prefix}&timeout_s=10")
    await transport.start([queue], [])
    large = staged(queue, 2, data=b'"%s"' % (b"x" * 30_000))
    results = await asyncio.gather(
        transport.send([staged(queue, 1)]), transport.send([large]), transport.send([staged(queue, 3)]),
        return_exceptions=True,
    )  # fmt: skip
    assert [type(result) for result in results] == [type(None), PublishError, type(None)]
    assert "at most 20000 bytes" in str(results[1])
    assert results[1].unsent == [large]
    await transport.send([staged(queue, 4)])
    await transport.stop()


async def test_a_message_larger_than_a_reader_takes_is_refused_alone(url):
    queue = Queue("orders")
    reader = Subscription("orders", queue)
    async with opened(url, reader) as transport:
        large = staged(queue, 2, data=b'"%s"' % (b"x" * MAX_WIRE_BYTES))
        results = await asyncio.gather(
            transport.send([staged(queue, 1)]), transport.send([staged(queue, 3), large]), return_exceptions=True
        )
        assert results[0] is None
        assert str(results[1]).startswith("E313")
        assert results[1].unsent == [large]
        assert subjects(await received(transport, reader, 2)) == [1, 3]


@contextlib.asynccontextmanager
async def full(server, exchange):
    """Bind a queue that takes one message, which it has, to the exchange of a Topic."""
    async with raw(server) as connection:
        channel = await connection.channel()
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        declared = commands.Queue.Declare(queue=f"{exchange}.full", exclusive=True, arguments=arguments)
        await channel.call(declared, commands.Queue.DeclareOk)
        bound = commands.Queue.Bind(queue=f"{exchange}.full", exchange=exchange, routing_key="")
        await channel.call(bound, commands.Queue.BindOk)
        await write(connection, "", f"{exchange}.full", b"")
        yield


async def test_a_full_queue_is_named_and_what_has_room_is_sent(url, server, prefix):
    there, heard = Subscription("there", Queue("there")), Subscription("shop", Topic("news"))
    async with opened(url, there, heard) as transport, full(server, f"{prefix}.news"):
        batch = [staged(one.channel, number) for number, one in enumerate((there, heard, there, heard))]
        with pytest.raises(
            StoreFullError, match=r"E502 .*refused a message for topic 'news': its queue is full"
        ) as told:
            await transport.send(batch)
        assert told.value.unsent == batch[1::2]
        assert subjects(await received(transport, there, 2)) == [0, 2]
        assert subjects(await received(transport, heard, 2)) == [1, 3]


async def test_that_a_queue_is_full_is_told_before_that_something_is_too_large(url, server, prefix):
    queue, topic = Queue("orders"), Topic("news")
    async with opened(url, channels=[queue, topic]) as transport, full(server, f"{prefix}.news"):
        batch = [staged(queue, 1, data=b'"%s"' % (b"x" * MAX_WIRE_BYTES)), staged(topic, 2)]
        with pytest.raises(StoreFullError) as caught:
            await transport.send(batch)
        assert caught.value.unsent == batch


async def test_a_stop_says_whether_anything_was_sent(url):
    queue = Queue("orders")
    (host, port), *_ = parse_address(url).hosts
    async with Proxy(host, port) as proxy, opened(proxy.url(url), channels=[queue]) as transport:
        proxy.toxics.mute = True
        sent, kept = [staged(queue, 1), staged(queue, 2)], [staged(queue, 3), staged(queue, 4)]
        first = asyncio.ensure_future(transport.send(sent))
        await until(lambda: transport._publisher._under_way)
        proxy.toxics.down = True
        proxy.reset()
        await until(lambda: transport._publisher._channel is None)
        second = asyncio.ensure_future(transport.send(kept))
        await transport.stop()
        results = await asyncio.gather(first, second, return_exceptions=True)
    assert [(result.code, result.unsent) for result in results] == [("E521", sent), ("E520", kept)]


async def test_a_message_of_many_frames_arrives_whole(url):
    queue = Queue("orders")
    reader = Subscription("orders", queue)
    data = b'"%s"' % (b"0123456789" * 100_000)
    async with opened(url, reader) as transport:
        await transport.send([staged(queue, 1, data=data), staged(queue, 2)])
        found = await received(transport, reader, 2)
        assert found[0].message.data == data
        assert subjects(found) == [1, 2]


async def test_a_broker_short_of_memory_is_named_when_the_time_is_over(prefix):
    blocked = brokers.broker_url("rabbitmq@blocked", "vm_memory_high_watermark.absolute=1MB")
    queue = Queue("orders")
    transport = load(f"{blocked}?prefix={prefix}&timeout_s=5")
    await transport.start([queue], [])
    first = staged(queue)
    with pytest.raises(TransportError, match=r"E521.*taken no messages.*memory") as caught:
        await transport.send([first])
    assert caught.value.unsent == [first]
    await transport.stop()
    brokers.stop("rabbitmq@blocked")


async def test_a_connection_that_breaks_while_it_is_made_is_made_again(url, monkeypatch):
    queue, cut = Queue("orders"), []

    async def save(declarer, _clock):
        if not cut:
            cut.append(declarer)
            declarer._connection.drop(AmqpError(0, "cut"))
            await asyncio.shield(declarer._connection._ended)

    monkeypatch.setattr(Declarer, "save", save)
    async with opened(url, channels=[queue]) as transport:
        async with asyncio.timeout(20):
            await transport.send([staged(queue)])
    assert cut


async def test_no_connection_stays_open_when_the_farewell_is_interrupted(url):
    (host, port), *_ = parse_address(url).hosts
    async with Proxy(host, port) as proxy, opened(proxy.url(url), channels=[Queue("orders")]) as transport:
        both = transport._sending, transport._receiving
        proxy.swallow()
        parting = asyncio.create_task(transport._disconnect())
        await until(lambda: both[0].error)
        parting.cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*(connection._ended for connection in both))


async def test_what_waits_for_a_connection_is_sent_when_its_queue_is_there_again(url, server, prefix):
    queue = Queue("orders")
    async with opened(url, channels=[queue]) as transport:
        async with raw(server) as other:
            channel = await other.channel()
            await channel.call(commands.Queue.Delete(queue=f"{prefix}.orders"), commands.Queue.DeleteOk)
        transport._sending.drop(AmqpError(0, "cut"))
        await transport.send([staged(queue, 1)])
        reader = Subscription("orders", queue)
        async with opened(url, reader) as other:
            assert subjects(await received(other, reader, 1)) == [1]


async def test_priority_overtakes(url):
    queue = Queue("orders", priority=True)
    reader = Subscription("orders", queue)
    urgent = staged(queue, 9)
    urgent = Staged(queue, Message("u", "test.happened", "test", b"1", 0.0, subject="9", priority=99))
    async with opened(url, channels=[queue]) as transport:
        await transport.send([staged(queue, 1), staged(queue, 2), urgent])
        async with opened(url, reader) as other:
            assert subjects(await received(other, reader, 3)) == [9, 1, 2]


# --- what other programs write ---


async def write(connection, exchange, key, body, **properties):
    """Publish as another program would, confirmed."""
    channel = await connection.channel()
    await channel.call(commands.Confirm.Select(), commands.Confirm.SelectOk)
    done = asyncio.get_running_loop().create_future()
    channel.confirmed = lambda *_: done.set_result(None)
    content = header.ContentHeader(body_size=len(body), properties=commands.Basic.Properties(**properties))
    publish = commands.Basic.Publish(exchange=exchange, routing_key=key)
    parts = [publish, content, *([bodies.ContentBody(body)] if body else [])]
    connection.write(b"".join(frame.marshal(part, channel.number) for part in parts))
    await done


async def test_binary_and_plain_messages_of_other_programs_are_read(url, server, prefix):
    queue = Queue("orders", plain="shop.order")
    reader = Subscription("orders", queue)
    async with opened(url, reader) as transport, raw(server) as other:
        headers = {"cloudEvents:specversion": "1.0", "cloudEvents_id": "7", "ce-type": "shop.paid", "ce-source": "till"}
        await write(other, "", f"{prefix}.orders", b'{"a":1}', headers=headers, content_type="application/json")
        await write(other, f"{prefix}.orders", f"{prefix}.orders", b'{"b":2}', message_id="m-1")
        await write(other, "", f"{prefix}.orders", b"")
        binary, plain, empty = await received(transport, reader, 3)
    assert (binary.message.type, binary.message.id, binary.message.data) == ("shop.paid", "7", b'{"a":1}')
    assert binary.message.datacontenttype == "application/json"
    assert (plain.message.type, plain.message.id, plain.message.data) == ("shop.order", "m-1", b'{"b":2}')
    assert (empty.message.type, empty.message.data) == ("shop.order", b"")


async def test_plain_messages_on_a_stream_keep_their_id(url, server, prefix):
    stream = Stream("log", partitions=1, plain="shop.line")
    reader = Subscription("one", stream)
    async with opened(url, reader) as transport, raw(server) as other:
        await write(other, "", f"{prefix}.log:0", b"a", headers={"other": "header", "number": 1})
        await write(other, f"{prefix}.log", "0", b"b")
        found = await received(transport, reader, 2)
    # What is in it too: in a log made anew the places begin again.
    assert [(delivery.message.id, delivery.position) for delivery in found] == [
        (f"{prefix}.log:0/0/{crc32(b'a'):08x}", 0),
        (f"{prefix}.log:0/1/{crc32(b'b'):08x}", 1),
    ]


async def test_what_is_no_message_comes_with_its_bytes(url, server, prefix):
    queue = Queue("orders")
    reader = Subscription("orders", queue)
    async with opened(url, reader) as transport, raw(server) as other:
        await write(other, "", f"{prefix}.orders", b"\xff\x00 no event")
        (delivery,) = await received(transport, reader, 1)
    assert delivery.message is None
    assert delivery.raw == b"\xff\x00 no event"


async def test_properties_that_cannot_be_read_end_nothing(url, server, prefix):
    queue, stream = Queue("orders", plain="shop.order"), Stream("log", partitions=1)
    orders, log = Subscription("orders", queue), Subscription("one", stream)
    async with opened(url, orders, log) as transport, raw(server) as other:
        nested = {"a": {"b": [1, {"c": bytearray(b"\xff")}]}, "x-stream-offsetl": "no", "t": system_clock.utc()}
        for key in ("orders", "log:0"):
            await write(other, "", f"{prefix}.{key}", b"{}", headers=nested, content_type="\N{SNOWMAN}")
        (plain,) = await received(transport, orders, 1)
        (unread,) = await received(transport, log, 1)
    assert plain.message.data == b"{}"
    assert (unread.message, unread.raw, unread.position) == (None, b"{}", 0)


def test_the_position_is_found_whatever_the_other_headers_are():
    offset = b"\x0fx-stream-offsetl" + (7).to_bytes(8, "big")
    broken = b"\xff\xff\xff\xff\xffnonsense" + offset
    assert offset_of(Arrived(b"s", 1, False, 1 << 13, broken, b"")) == 7
    message, (code, why) = read_message(Arrived(b"s", 1, False, 1 << 13, broken, b"x"), None, "log", "", 0.0)
    assert message is None
    assert code == "E400"
    assert "properties" in why


# --- receiving ---


async def test_a_message_of_a_process_that_died_is_suspect(url):
    queue = Queue("orders")
    reader = Subscription("orders", queue)
    dying = await started(url, reader)
    await dying.send([staged(queue, 1)])
    (first,) = await received(dying, reader, 1, settle=False)
    assert not first.suspect
    dying._drop(AmqpError(0, "killed"))
    await dying.stop()
    async with opened(url, reader) as transport:
        (again,) = await received(transport, reader, 1)
        assert again.suspect
        assert subjects([again]) == [1]


async def test_what_is_settled_behind_a_slow_message_is_acknowledged(url):
    queue = Queue("orders")
    reader = Subscription("orders", queue)
    async with opened(url, reader) as transport:
        await transport.send([staged(queue, number) for number in range(5000)])
        slow, *others = await received(transport, reader, 1, settle=False)
        await transport.settle(others)
        rest = await received(transport, reader, 4999 - len(others))
        assert len(rest) + len(others) == 4999
        async with asyncio.timeout(10):
            while (await transport.backlog(reader)).waiting > 1:
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.2)  # a straggler of the last moment
        await transport.settle([slow])
    async with opened(url, reader) as transport:
        assert (await transport.backlog(reader)).waiting == 0


async def test_a_drained_process_gives_back_what_it_had_not_begun(url):
    queue = Queue("orders")
    reader = Subscription("orders", queue)
    async with opened(url, reader) as leaving:
        await leaving.send([staged(queue, number) for number in range(100)])
        mine = await leaving.receive(reader, 10)
        await leaving.drain()
        async with opened(url, reader) as other:
            theirs = await received(other, reader, 100 - len(mine))
            await leaving.settle(mine)
            assert sorted(subjects(mine) + subjects(theirs)) == list(range(100))
            assert (await other.backlog(reader)).waiting == 0


async def test_backlog_counts_what_waits_and_what_is_under_way(url):
    queue, stream = Queue("orders"), Stream("log", partitions=2)
    orders, log = Subscription("orders", queue), Subscription("one", stream)
    async with opened(url, orders, log) as transport:
        await transport.send([staged(queue, number) for number in range(2500)])
        await transport.send([staged(stream, number) for number in range(3000)])
        await received(transport, orders, 1, settle=False)
        async with asyncio.timeout(20):
            while (await transport.backlog(orders)).waiting != 2500:
                await asyncio.sleep(0.1)
            while (await transport.backlog(log)).waiting != 3000:
                await asyncio.sleep(0.1)
        await received(transport, log, 3000)
        backlog = await transport.backlog(log)
        assert (backlog.waiting, backlog.in_flight) == (0, 0)


class Deaf:
    """A connection to a broker that answers nothing."""

    def __init__(self):
        self.written, self.dropped = [], []
        self.write, self.drop, self.forget = self.written.append, self.dropped.append, lambda _number: None


async def test_nothing_is_written_to_a_channel_that_is_being_closed(monkeypatch):
    monkeypatch.setattr("trunkline.transports.rabbitmq.client.CHANNEL_CLOSE_S", 0.05)
    connection = Deaf()
    channel = Channel(connection, 7)
    consuming = asyncio.create_task(channel.consume("log", "s", 1))
    await asyncio.sleep(0)
    closing = asyncio.create_task(channel.close())
    await asyncio.sleep(0)
    asked = len(connection.written)
    channel.ack(1)
    channel.give_back(2)
    await channel.close()
    with pytest.raises(AmqpError, match="being closed"):
        await channel.cancel("s")
    await closing
    with pytest.raises(AmqpError, match="the channel is closed"):
        await consuming
    assert (asked, len(connection.written)) == (2, 2), "what comes after the close ends the whole connection"
    assert "was not closed" in connection.dropped[0].text


# --- streams ---


async def test_a_subscription_goes_on_where_it_was(url):
    stream = Stream("log", partitions=3)
    one = Subscription("one", stream)
    async with opened(url, one) as transport:
        await transport.send([staged(stream, number, key=f"k{number % 7}") for number in range(100)])
        assert sorted(subjects(await received(transport, one, 100))) == list(range(100))
    async with opened(url, one, Subscription("two", stream)) as transport:
        await transport.send([staged(stream, 100)])
        assert subjects(await received(transport, one, 1)) == [100]
        assert sorted(subjects(await received(transport, Subscription("two", stream), 101))) == list(range(101))


async def test_latest_begins_at_the_end_of_its_first_start_only(url):
    stream = Stream("log", partitions=2)
    late = Subscription("late", stream, "latest")
    async with opened(url, channels=[stream]) as publisher:
        await publisher.send([staged(stream, number) for number in range(500)])
        async with opened(url, late):
            pass  # nothing was read: nothing is committed
        await publisher.send([staged(stream, number) for number in range(500, 600)])
        async with opened(url, late) as transport:
            assert sorted(subjects(await received(transport, late, 100))) == list(range(500, 600))


async def noted(transport, subscription, offset):
    """Wait until the token of the only partition says that it is handled up to there."""
    held = transport._readers[subscription.label].tokens._held[0]
    await until(lambda: held.token.offset == offset)


@pytest.mark.parametrize("running", [True, False])
async def test_a_log_that_was_made_anew_is_read_from_its_first_message(url, server, prefix, caplog, running):
    stream = Stream("log", partitions=1)
    one = Subscription("one", stream)
    async with opened(url, one) as transport:
        await transport.send([staged(stream, number) for number in range(50)])
        assert len(await received(transport, one, 50)) == 50
        if running:
            await noted(transport, one, 50)
            await delete(server, f"{prefix}.log:0")
            await until(lambda: not transport._readers[one.label].parts)
            await transport.send([staged(stream, number) for number in range(50, 70)])
            assert subjects(await received(transport, one, 20)) == list(range(50, 70))
    if not running:
        await delete(server, f"{prefix}.log:0")
        async with opened(url, channels=[stream]) as publisher:
            await publisher.send([staged(stream, number) for number in range(50, 70)])
        async with opened(url, one) as transport:
            assert subjects(await received(transport, one, 20)) == list(range(50, 70))
    assert "its log was deleted and made anew" in caplog.text
    caplog.clear()
    async with opened(url, one) as transport:
        await transport.send([staged(stream, 70)])
        assert subjects(await received(transport, one, 1)) == [70]
    assert "made anew" not in caplog.text


async def test_what_is_late_of_a_deleted_log_settles_nothing_of_the_new_one(url, server, prefix):
    stream = Stream("log", partitions=1)
    one = Subscription("one", stream)
    async with opened(url, one) as transport:
        await transport.send([staged(stream, number) for number in range(10)])
        await received(transport, one, 10)
        await noted(transport, one, 10)
        await transport.send([staged(stream, number) for number in range(10, 13)])
        late = await received(transport, one, 3, settle=False)
        await delete(server, f"{prefix}.log:0")
        await until(lambda: not transport._readers[one.label].parts)
        await transport.send([staged(stream, number) for number in range(20, 40)])
        found = await received(transport, one, 20, settle=False)
        await transport.settle(late)
        await asyncio.sleep(1.0)
    async with opened(url, one) as transport:
        assert subjects(await received(transport, one, 20)) == subjects(found) == list(range(20, 40))


async def test_a_token_whose_queue_was_deleted_is_placed_where_its_holder_was(url, server, prefix):
    stream = Stream("log", partitions=1)
    late = Subscription("late", stream, "latest")
    async with opened(url, late) as transport:
        await transport.send([staged(stream, number) for number in range(10)])
        await received(transport, late, 10)
        await noted(transport, late, 10)
        await transport.send([staged(stream, number) for number in range(10, 13)])
        await received(transport, late, 3, settle=False)
        await delete(server, f"{prefix}.log:late:0")
        await until(lambda: not transport._readers[late.label].parts)
        assert subjects(await received(transport, late, 3)) == [10, 11, 12]
    async with opened(url, late) as transport:
        await transport.send([staged(stream, 13)])
        assert subjects(await received(transport, late, 1)) == [13]


async def test_the_last_log_of_a_stream_that_was_deleted_is_made_again(url, server, prefix):
    stream = Stream("log", partitions=2)
    one = Subscription("one", stream)
    async with opened(url, one) as transport:
        await transport.send([staged(stream, number, str(number)) for number in range(20)])
        await received(transport, one, 20)
        await delete(server, f"{prefix}.log:1")
        await until(lambda: not transport._readers[one.label].parts)
        await transport.send([staged(stream, number, str(number)) for number in range(20, 40)])
        seen = set()  # what was settled just before and is not noted comes again
        while not seen >= set(range(20, 40)):
            seen.update(subjects(await received(transport, one, 1)))


async def test_a_log_whose_beginning_was_trimmed_is_gone_on_with(url, caplog, monkeypatch):
    monkeypatch.setattr("trunkline.transports.rabbitmq.names._SEGMENT_BYTES", 4000)
    stream = Stream("log", partitions=1, retention_s=1)
    one = Subscription("one", stream)
    async with opened(url, one) as transport:
        await transport.send([staged(stream, 0)])
        await received(transport, one, 1)
        await noted(transport, one, 1)
    async with opened(url, channels=[stream]) as publisher:
        for number in range(1, 15):
            await publisher.send([staged(stream, number, data=b'"%s"' % (b"x" * 3000))])
            await asyncio.sleep(0.2)
    async with opened(url, one) as transport:
        await transport.send([staged(stream, 15)])
        found = []
        while 15 not in found:
            found += subjects(await received(transport, one, 1))
    assert found == list(range(found[0], 16))
    assert found[0] > 1  # the first ones are gone
    async with opened(url, one) as transport:
        await transport.send([staged(stream, 16)])
        assert subjects(await received(transport, one, 1)) == [16]
    assert "anew" not in caplog.text


async def delete(server, queue):
    async with raw(server) as connection:
        channel = await connection.channel()
        await channel.call(commands.Queue.Delete(queue=queue), commands.Queue.DeleteOk)


async def test_two_processes_share_partitions_and_keep_the_order_of_each_key(url):
    stream = Stream("log", partitions=6)
    one = Subscription("one", stream)
    async with opened(url, one) as first:
        await until(lambda: len(owned(first, one)) == 6)
        seen = []
        tasks = [asyncio.create_task(handle(first, one, seen))]
        await first.send([staged(stream, number, key=f"k{number % 20}") for number in range(1000)])
        async with opened(url, one) as second:
            tasks.append(asyncio.create_task(handle(second, one, seen)))
            await until(lambda: len(owned(first, one)) == 3 and len(owned(second, one)) == 3)
            assert not owned(first, one) & owned(second, one)
            await first.send([staged(stream, number, key=f"k{number % 20}") for number in range(1000, 2000)])
            await until(lambda: len(set(seen)) == 2000)
            tasks.pop().cancel()
        await until(lambda: len(owned(first, one)) == 6)
        await first.send([staged(stream, number, key=f"k{number % 20}") for number in range(2000, 3000)])
        await until(lambda: len(set(seen)) == 3000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for key in range(20):
        once = list(dict.fromkeys(number for number in seen if number % 20 == key))
        assert once == sorted(once)
    assert len(seen) == 3000


def owned(transport, subscription):
    return {number for number in range(16) if transport.owns(subscription, number)}


async def handle(transport, subscription, seen):
    while True:
        batch = await transport.receive(subscription, 50)
        await asyncio.sleep(0.001)
        seen += subjects(batch)
        await transport.settle(batch)


async def test_a_partition_moves_when_what_is_under_way_in_it_is_settled(url):
    stream = Stream("log", partitions=2)
    one = Subscription("one", stream)
    async with opened(url, one) as first:
        await until(lambda: len(owned(first, one)) == 2)
        await first.send([staged(stream, number) for number in range(20)])
        held = await received(first, one, 20, settle=False)
        async with opened(url, one) as second:
            await asyncio.sleep(2.5)
            assert len(owned(first, one)) == 2
            await first.settle(held)
            await until(lambda: len(owned(first, one)) == len(owned(second, one)) == 1)
            await first.send([staged(stream, number) for number in range(20, 40)])
            found = []
            tasks = [asyncio.create_task(collect(transport, one, found)) for transport in (first, second)]
            await until(lambda: len(found) >= 20)
            await asyncio.sleep(1.0)  # what comes twice
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert sorted(subjects(found)) == list(range(20, 40))
            assert not any(delivery.suspect for delivery in found)


async def test_a_partition_is_left_once_its_last_commit_has_come_by(url, monkeypatch):
    one, leaving, awaited = Subscription("one", Stream("log", partitions=2)), [], []
    arrived, release, cancel = Tokens._arrived, Tokens._release, Channel.cancel

    async def note_and_release(self, channel, partition):
        leaving.append((self, partition))
        await release(self, channel, partition)

    async def note_and_cancel(self, tag):
        found = [tokens._held.get(number) for tokens, number in leaving if str(number) == tag]
        awaited.extend(one.awaited for one in found if one)
        await cancel(self, tag)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(Tokens, "_arrived", lambda self, batch: loop.call_later(0.3, arrived, self, batch))
    async with opened(url, one) as first:
        await until(lambda: len(owned(first, one)) == 2)
        await first.send([staged(one.channel, number) for number in range(20)])
        held = await received(first, one, 20, settle=False)
        monkeypatch.setattr(Tokens, "_release", note_and_release)
        monkeypatch.setattr(Channel, "cancel", note_and_cancel)
        async with opened(url, one) as second:
            await first.settle(held)
            await until(lambda: len(owned(first, one)) == len(owned(second, one)) == 1)
            assert awaited == [None]


async def collect(transport, subscription, found):
    while True:
        batch = await transport.receive(subscription, 100)
        found += batch
        await transport.settle(batch)


async def test_the_partitions_of_a_dead_process_go_to_another_with_what_it_had_under_way_suspect(url):
    stream = Stream("log", partitions=2)
    one = Subscription("one", stream)
    dying = await started(url, one)
    await until(lambda: len(owned(dying, one)) == 2)
    await dying.send([staged(stream, number) for number in range(30)])
    await received(dying, one, 30, settle=False)
    async with opened(url, one) as other:
        dying._drop(AmqpError(0, "killed"))
        assert not owned(dying, one)
        await dying.stop()
        again = await received(other, one, 30)
        assert sorted(subjects(again)) == list(range(30))
        assert all(delivery.suspect for delivery in again)


def test_tokens_of_which_the_right_one_counts():
    first, other = Token(100, first=True), Token(200, first=True)
    assert first.beats(other)
    assert not other.beats(first)
    assert Token(5).beats(first)
    assert not other.beats(Token(5))
    assert Token(7).beats(Token(6))
    assert Token(3, log=1).beats(Token(6))
    assert not Token(6).beats(Token(3, log=1))
    assert not Token(6).beats(Token(7))


def test_stragglers_are_acknowledged_once():
    unacked = Unacked()
    unacked.take(range(1, 11))
    assert unacked.done([1, 2, 5]) == 2
    assert unacked.stragglers(2) == []
    assert unacked.done([4, 9]) == 0
    assert unacked.stragglers(2) == [4, 5, 9]
    assert unacked.stragglers(0) == []
    assert len(unacked) == 5
    assert unacked.done([3, 6, 7, 8, 10]) == 10
    assert len(unacked) == 0


# --- faults ---

events = Stream("rabbitmq-events", key="key", partitions=4)
orders = Queue("rabbitmq-orders")


@orders.command
class Order(Struct):
    number: int


@events.event
class Happened(Struct):
    key: str
    number: int


def service(seen):
    made = Service("shop")

    @made.handle
    async def order(order: Order) -> None:
        seen.append(("order", order.number))

    @made.handle(after_dead_letter="continue")
    async def happened(event: Happened) -> None:
        seen.append(("event", event.number))

    return made


async def test_what_was_confirmed_survives_restarts_of_the_broker_in_the_middle(tmp_path, prefix):
    server = brokers.broker_url(FAULTY)
    seen = []
    confirmed = []
    going = True

    async def publish(app):
        number = 0
        while going:
            batch = [Order(number), Happened(f"k{number % 5}", number)]
            with contextlib.suppress(TransportError):
                await app.publish_all(batch)
                confirmed.append(number)
            number += 1
            await asyncio.sleep(0.002)

    async def more():
        before = len(confirmed)
        await until(lambda: len(confirmed) > before + 20, 40)

    async with App(service(seen), f"{server}?prefix={prefix}&timeout_s=30", store=f"sqlite:///{tmp_path}/s.db") as app:
        publishing = asyncio.create_task(publish(app))
        for act in (lambda: brokers.restart(FAULTY), lambda: (brokers.kill(FAULTY), brokers.resume(FAULTY))):
            await more()
            await asyncio.to_thread(act)
            await more()
        going = False
        await publishing
        wanted = {(kind, number) for number in confirmed for kind in ("order", "event")}
        await until(lambda: wanted <= set(seen), 40)
    assert len(seen) == len(set(seen))


async def test_without_a_broker_a_publish_waits_and_then_says_so(prefix):
    server = brokers.broker_url(FAULTY)
    queue = Queue("orders")
    transport = load(f"{server}?prefix={prefix}&timeout_s=4")
    await transport.start([queue], [])
    await transport.send([staged(queue)])
    await asyncio.to_thread(brokers.kill, FAULTY)
    late = staged(queue, 1)
    with pytest.raises(TransportError, match=r"E52[01]") as caught:
        await transport.send([late])
    assert caught.value.unsent == [late]
    with pytest.raises(TransportError, match=r"E520 .* was not reached within 4 s"):
        await transport.send([staged(queue, 2)])
    await asyncio.to_thread(brokers.resume, FAULTY)
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(TransportError):
                await transport.send([staged(queue, 3)])
                break
    await transport.stop()


@pytest.fixture
def young():
    """A broker that has never had a queue: what keeps its Streams is as new as they are."""
    yield brokers.broker_url(YOUNG)
    brokers.stop(YOUNG, wipe=True)


async def test_what_was_confirmed_just_after_it_was_declared_survives_kill_9_of_the_broker(prefix, young):
    url = f"{young}?prefix={prefix}&timeout_s=20"
    queue, topic, later = Queue("young"), Topic("news"), Queue("younger")
    wanted = [Subscription("shop", queue), Subscription("shop", topic), Subscription("shop", events)]
    transport = load(url)
    await transport.start([queue, topic, events], wanted)
    await transport.send([staged(channel, number) for channel in (queue, topic) for number in range(20)])
    await transport.send([staged(later, 1)])  # declared by its first message
    await asyncio.to_thread(brokers.kill, YOUNG)
    await transport.stop()
    await asyncio.to_thread(brokers.resume, YOUNG)
    last = Subscription("shop", later)
    again = load(url)
    await again.start([], [*wanted, last])
    for subscription, count in ((wanted[0], 20), (wanted[1], 20), (last, 1)):
        assert len(set(subjects(await received(again, subscription, count)))) == count
    await until(lambda: all(again.owns(wanted[2], number) for number in range(events.partitions)))
    await again.drain()
    await again.stop()


@pytest.mark.parametrize("subscription", [Subscription("shop", orders), Subscription("shop", events)], ids=str)
async def test_a_queue_that_the_broker_lost_is_named_with_what_to_do(prefix, caplog, subscription):
    server = brokers.broker_url(FAULTY)
    part = 2 if subscription.channel is events else None
    queue = Names(prefix).subscription(subscription, part) if part else Names(prefix).channel(orders.name)
    pid = brokers.record(FAULTY)["pid"]
    async with raw(server) as connection:
        channel = await connection.channel()
        arguments = {"x-queue-type": "quorum", **({"x-single-active-consumer": True} if part else {})}
        request = commands.Queue.Declare(queue=queue, durable=True, arguments=arguments)
        await channel.call(request, commands.Queue.DeclareOk)
        # It writes the name down within a second, which the command that kills it may take.
        os.kill(pid, signal.SIGSTOP)
        await asyncio.to_thread(brokers.kill, FAULTY)
    await asyncio.to_thread(brokers.resume, FAULTY)
    transport = load(f"{server}?prefix={prefix}&timeout_s=16")
    said = f"queue {queue!r} does not answer"
    async with raw(server) as connection:
        channel = await connection.channel()
        starting = asyncio.create_task(transport.start([], [subscription]))
        await until(lambda: said in caplog.text or starting.done())
        if starting.done():
            await transport.stop()
        assert said in caplog.text, starting
        assert f"rabbitmqctl delete_queue {queue!r}" in caplog.text
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await channel.call(commands.Queue.Delete(queue=queue), commands.Queue.DeleteOk)
    await transport.start([], [subscription])
    await transport.stop()


async def test_another_process_goes_on_after_kill_9_and_nothing_is_lost(url, tmp_path):
    note(
        url, [orders, events, Queue("shop.dead-letters")], [Subscription("shop", events), Subscription("shop", orders)]
    )
    store = f"sqlite:///{tmp_path}/s.db"
    seen = []
    async with opened(url, channels=[orders, events]) as publisher:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.transports.rabbitmq_worker", url, store, stdout=asyncio.subprocess.PIPE
        )
        assert worker.stdout is not None
        await worker.stdout.readline()
        sending = asyncio.create_task(publish_numbers(publisher, 2000))
        await asyncio.sleep(1.0)
        worker.kill()
        lines = (await worker.stdout.read()).decode().splitlines()
        await worker.wait()
        handled = {tuple(line.split()) for line in lines}
        await sending
        async with App(service(seen), url, store=store):
            wanted = {(kind, str(number)) for number in range(2000) for kind in ("order", "event")}
            await until(lambda: wanted <= handled | {(kind, str(number)) for kind, number in seen}, 30)


async def publish_numbers(transport, count):
    for number in range(count):
        made = [Order(number), Happened(f"k{number % 5}", number)]
        await transport.send([make_message(payload, system_clock, "test", None, None, None, {}) for payload in made])
