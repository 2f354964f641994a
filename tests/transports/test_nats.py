"""NATS JetStream as it is: declared, refused, restarted, shared."""

import asyncio
import json
import time
from contextlib import asynccontextmanager, suppress
from functools import partial

import nats
import pytest
from nats.js.api import DiscardPolicy
from nats.js.errors import NotFoundError

from tests.brokers import broker_url, certificate, kill, resume
from trunkline.channel import Queue, Stream, Topic
from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError, PublishError, StoreFullError, TransportError
from trunkline.message import Message
from trunkline.testing.proxy import Proxy
from trunkline.transport import Staged, Subscription, load_adapter, parse_address
from trunkline.transports.nats import publisher
from trunkline.transports.nats.connection import Connection
from trunkline.transports.nats.leases import Lost, Record
from trunkline.transports.nats.source import SILENT_S

pytestmark = [pytest.mark.xdist_group("nats"), pytest.mark.timeout(120)]


@pytest.fixture
def url():
    return f"{broker_url('nats')}?timeout_s=10&prefix=t{time.time_ns()}"


@pytest.fixture
async def server(url):
    client = await nats.connect(url.partition("?")[0])
    yield client
    await client.close()


def adapter(url):
    return load_adapter("trunkline.transports", url, system_clock)


@asynccontextmanager
async def started(url, *subscriptions, channels=()):
    transport = adapter(url)
    await transport.start([*channels, *(one.channel for one in subscriptions)], subscriptions)
    try:
        yield transport
    finally:
        await transport.drain()
        await transport.stop()


def staged(channel, number, key=None, **attributes):
    attributes = {"id": system_clock.new_id(), "data": json.dumps(number).encode(), **attributes}
    message = Message(type="t", source="s", time=1.0, partitionkey=key, **attributes)
    return Staged(channel, message)


async def take(transport, subscription, count, *, settle=True, within_s=20):
    """Receive `count` messages, settling each batch."""
    taken = []
    async with asyncio.timeout(within_s):
        while len(taken) < count:
            batch = await transport.receive(subscription, count - len(taken))
            if settle:
                await transport.settle(batch)
            taken += batch
    return taken


def numbers(deliveries):
    return [json.loads(one.message.data) for one in deliveries]


async def nothing(transport, subscription, for_s=0.5):
    """Check that nothing comes."""
    receiving = asyncio.create_task(take(transport, subscription, 1, within_s=60))
    await asyncio.sleep(for_s)
    assert not receiving.done()
    receiving.cancel()


async def until(condition, within_s=20):
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.05)


def die(transport):
    """End as kill -9 would: no farewell, nothing given back."""
    for reader in transport._readers.values():
        for task in (reader._task, getattr(reader, "_committing", None)):
            if task is not None:
                task.cancel()
    transport._connection.link._stopped = True
    transport._connection._wire._transport._io_writer.transport.abort()


def one_of_each():
    return Topic("news"), Queue("jobs.v1"), Stream("orders", partitions=4)


# --- what the server refuses ---


JOBS = Queue("jobs")


async def refusal(url, *, channels=(JOBS,), error=ConfigurationError):
    with pytest.raises(error) as caught:
        async with started(url, channels=channels):
            pass
    return caught.value


async def test_a_server_without_jetstream_is_refused():
    error = await refusal(broker_url("nats:nojetstream"))
    assert error.code == "E248"
    assert "JetStream" in error.message


@pytest.mark.parametrize("sign_in", ["trunkline:wrong-one@", "", "a-token@"])
async def test_wrong_credentials_are_refused_without_showing_them(sign_in):
    error = await refusal(broker_url("nats:password").replace("trunkline:secret@", sign_in))
    assert error.code == "E244"
    assert "wrong-one" not in str(error)
    assert "a-token" not in str(error)


async def test_a_certificate_that_nobody_vouches_for_is_refused():
    error = await refusal(broker_url("nats:tls") + "?timeout_s=5")
    assert error.code == "E245"


async def test_tls_works_with_the_ca(caplog):
    queue = Queue("jobs")
    url = f"{broker_url('nats:tls')}?ca={certificate('nats:tls')}&prefix=t{time.time_ns()}"
    async with started(url, channels=[queue]) as transport:
        await transport.send([staged(queue, 1)])
    assert caplog.records == []


async def test_plain_to_a_tls_server_and_tls_to_a_plain_one_are_refused():
    plain = await refusal(broker_url("nats:tls").replace("tls://", "nats://"))
    secure = await refusal(broker_url("nats").replace("nats://", "tls://"))
    assert (plain.code, secure.code) == ("E245", "E245")


async def test_a_server_that_does_not_answer_is_told_in_time():
    error = await refusal("nats://127.0.0.1:1?timeout_s=0.3", error=TransportError)
    assert error.code == "E520"


async def test_a_missing_permission_is_told():
    limited = 'authorization={users: [{user: u, password: p, permissions: {publish: ["_INBOX.>"]}}]}'
    url = broker_url("nats@limited", limited).replace("nats://", "nats://u:p@")
    error = await refusal(url)
    assert error.code == "E246"


async def test_a_subject_that_may_not_be_published_to_is_told(monkeypatch):
    limited = (
        "authorization={users: [{user: u, password: p, permissions: "
        '{publish: {deny: ["denied.q.jobs"]}, subscribe: ">"}}]}'
    )
    url = broker_url("nats@denied", limited).replace("nats://", "nats://u:p@") + "?prefix=denied"
    queue, other = Queue("jobs"), Queue("others")
    monkeypatch.setattr(publisher, "MOST", 1)
    async with started(url, channels=[queue, other]) as transport:
        batch = [staged(queue, 1), staged(other, 1)]
        with pytest.raises(ConfigurationError, match="E246") as caught:
            await transport.send(batch)
        assert caught.value.unsent == batch[:1]


@pytest.mark.parametrize(
    ("options", "code"),
    [("nope=1", "E240"), ("lease_s=x", "E241"), ("prefix=a.b", "E241"), ("ca=x.pem", "E241"), ("replicas=0", "E241"),
     ("prefix=", "E241"), ("lease_s=0.4", "E241")],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options, code):
    with pytest.raises(ConfigurationError, match=code):
        adapter(f"nats://localhost?{options}")


# --- declaring ---


async def test_a_stream_with_other_partitions_is_refused(url):
    async with started(url, channels=[Stream("orders", partitions=4)]):
        error = await refusal(url, channels=[Stream("orders", partitions=8)])
    assert error.code == "E207"
    assert "partitions 4" in error.message
    assert "partitions 8" in error.message


async def test_a_channel_of_another_kind_is_refused(url):
    async with started(url, channels=[Queue("orders")]):
        error = await refusal(url, channels=[Topic("orders")])
    assert error.code == "E207"


async def test_a_subject_of_another_stream_is_refused(url, server):
    prefix = url.rpartition("=")[2]
    await server.jetstream().add_stream(name=f"{prefix}other", subjects=[f"{prefix}.q.jobs"])
    error = await refusal(url)
    assert error.code == "E207"


async def test_two_that_start_at_once_both_succeed(url):
    subscriptions = [Subscription("s", channel) for channel in one_of_each()]
    async with asyncio.TaskGroup() as group:

        async def run():
            async with started(url, *subscriptions):
                await asyncio.sleep(0.2)

        for _ in range(3):
            group.create_task(run())


async def test_retention_is_set_and_can_be_changed(url, server):
    async with started(url, channels=[Stream("orders", partitions=2, retention_s=3600)]):
        pass
    async with started(url, channels=[Stream("orders", partitions=2, retention_s=60)]):
        info = await server.jetstream().stream_info(url.rpartition("=")[2] + "_orders")
    assert info.config.max_age == 60


async def test_names_with_dots_stay_apart(url):
    names = ["a.b", "a-b", "a..b", "a_b"]
    subscriptions = [Subscription("s", Queue(name)) for name in names]
    async with started(url, *subscriptions) as transport:
        await transport.send([staged(one.channel, one.channel.name) for one in subscriptions])
        for one in subscriptions:
            assert numbers(await take(transport, one, 1)) == [one.channel.name]


async def test_a_stream_that_an_operator_made_is_used(url, server):
    prefix = url.rpartition("=")[2]
    await server.jetstream().add_stream(name=f"{prefix}_jobs", subjects=[f"{prefix}.q.jobs"], retention="workqueue")
    subscription = Subscription("s", JOBS)
    async with started(url, subscription) as transport:
        await transport.send([staged(JOBS, 1)])
        assert numbers(await take(transport, subscription, 1)) == [1]


# --- publishing ---


async def test_what_is_too_large_is_refused_with_the_limit(url):
    queue = Queue("jobs")
    async with started(url, channels=[queue]) as transport:
        large = staged(queue, "x" * 1_100_000)
        with pytest.raises(PublishError, match=r"E313 .*takes 1048576") as caught:
            await transport.send([large])
    assert caught.value.unsent == [large]


async def limit(server, url, channel, **limits):
    """Give the stream of a channel limits, as an operator does."""
    stream = f"{parse_address(url).options['prefix']}_{channel.name}"
    config = (await server.jetstream().stream_info(stream)).config
    await server.jetstream().update_stream(config.evolve(discard=DiscardPolicy.NEW, **limits))


@pytest.mark.parametrize("channel", [Stream("full", partitions=1), Queue("full")], ids=repr)
async def test_what_has_no_room_is_told_at_once_and_what_follows_is_not_held_up(url, server, channel):
    other = Queue("jobs")
    async with started(url, channels=[channel, other]) as transport:
        await transport.send([staged(channel, 1)])
        await limit(server, url, channel, max_msgs=1)
        late = staged(channel, 2)
        async with asyncio.timeout(5):
            results = await asyncio.gather(
                transport.send([late]), transport.send([staged(other, 3)]), return_exceptions=True
            )
        assert str(results[0]).startswith("E502")
        assert "maximum messages" in str(results[0])
        assert results[0].unsent == [late]
        assert results[1] is None
        await limit(server, url, channel, max_msgs=10)
        await transport.send([late])


async def test_a_batch_of_which_some_is_refused_ends_when_the_rest_is_stored(url, server):
    full, reader = Queue("full"), Subscription("s", Queue("jobs"))
    async with started(url, reader, channels=[full]) as transport:
        await transport.send([staged(full, 0)])
        await limit(server, url, full, max_msgs=1)
        batch = [staged(full if number % 2 else reader.channel, number) for number in range(1, 201)]
        with pytest.raises(StoreFullError) as caught:
            await transport.send(batch)
        assert caught.value.unsent == batch[::2]
        assert numbers(await take(transport, reader, 100)) == list(range(2, 201, 2))


async def test_that_there_is_no_room_is_told_before_that_something_is_too_large(url, server):
    small, full, other = Queue("small"), Queue("full"), Queue("jobs")
    async with started(url, channels=[small, full, other]) as transport:
        await transport.send([staged(full, 0)])
        await limit(server, url, full, max_msgs=1)
        await limit(server, url, small, max_msg_size=400)
        large = staged(small, "x" * 1000)
        with pytest.raises(PublishError, match=r"E313 .*'small' is too large") as wrong:
            await transport.send([staged(other, 1), large])
        assert wrong.value.unsent == [large]
        batch = [large, staged(full, 1), large, staged(full, 1), staged(other, 1)]
        with pytest.raises(StoreFullError) as caught:
            await transport.send(batch)
        assert caught.value.unsent == batch[:4]


async def test_what_is_refused_makes_room_on_the_way_for_what_follows(url, server, monkeypatch):
    full, other = Queue("full"), Queue("jobs")
    async with started(url, channels=[full, other]) as transport:
        await transport.send([staged(full, 0)])
        await limit(server, url, full, max_msgs=1)
        monkeypatch.setattr(publisher, "MOST", 1)
        results = await asyncio.gather(
            transport.send([staged(full, 1)]), transport.send([staged(other, 1)]), return_exceptions=True
        )
        assert [type(result) for result in results] == [StoreFullError, type(None)]


async def test_a_stream_that_is_gone_is_named_when_the_time_is_over(url, server, monkeypatch):
    monkeypatch.setattr(publisher, "AGAIN_S", 60)
    prefix = parse_address(url).options["prefix"]
    gone, other = Queue("gone"), Queue("jobs")
    async with started(url.replace("timeout_s=10", "timeout_s=3"), channels=[gone, other]) as transport:
        await server.jetstream().delete_stream(f"{prefix}_gone")
        batch = [staged(other, 1), staged(gone, 2)]
        with pytest.raises(TransportError, match=r"E520 .*no message to 'gone'") as caught:
            await transport.send(batch)
        assert caught.value.unsent == batch[1:]


async def test_a_stop_says_whether_anything_was_sent(url):
    (host, port), *_ = parse_address(url).hosts
    async with Proxy(host, port) as proxy, started(proxy.url(url), channels=[JOBS]) as transport:
        proxy.toxics.mute = True
        sent, kept = [staged(JOBS, 1), staged(JOBS, 2)], [staged(JOBS, 3), staged(JOBS, 4)]
        first = asyncio.ensure_future(transport.send(sent))
        async with asyncio.timeout(10):
            while not transport._publisher._flying:
                await asyncio.sleep(0.01)
            proxy.toxics.down = True
            proxy.reset()
            while transport._connection.link.is_up:
                await asyncio.sleep(0.01)
        second = asyncio.ensure_future(transport.send(kept))
        await transport.stop()
        results = await asyncio.gather(first, second, return_exceptions=True)
    assert [(result.code, result.unsent) for result in results] == [("E521", sent), ("E520", kept)]


async def test_the_same_id_is_stored_once_but_for_each_tenant(url):
    subscription = Subscription("s", Queue("jobs"))
    async with started(url, subscription) as transport:
        for tenant in (None, None, "a", "b", "a"):
            await transport.send([staged(subscription.channel, 1, id="same", tenantid=tenant)])
        tenants = [one.message.tenantid for one in await take(transport, subscription, 3)]
        await nothing(transport, subscription)
    assert tenants == [None, "a", "b"]


async def test_publishing_waits_for_the_server_and_is_told_when_the_time_is_over():
    name = "nats@waits"
    url = f"{broker_url(name)}?prefix=t{time.time_ns()}"
    subscription = Subscription("s", Queue("jobs"))
    try:
        async with started(f"{url}&timeout_s=30", subscription) as patient, started(f"{url}&timeout_s=4") as hasty:
            await asyncio.to_thread(kill, name)
            with pytest.raises(TransportError, match=r"E52[01]") as caught:
                await hasty.send([staged(subscription.channel, 1)])
            assert len(caught.value.unsent) == 1
            waiting = asyncio.ensure_future(patient.send([staged(subscription.channel, 2)]))
            await asyncio.to_thread(resume, name)
            await waiting
            assert 2 in numbers(await take(patient, subscription, 1))
    finally:
        await asyncio.to_thread(resume, name)


async def test_nothing_confirmed_is_lost_when_the_server_dies_in_the_middle():
    name = "nats@dies"
    url = f"{broker_url(name)}?timeout_s=20&lease_s=2&prefix=t{time.time_ns()}"
    subscriptions = [Subscription("s", channel) for channel in one_of_each()]
    confirmed, got = set(), {one.label: [] for one in subscriptions}

    async def publish(transport):
        for number in range(600):
            await asyncio.gather(
                *(transport.send([staged(one.channel, number, key=str(number % 5))]) for one in subscriptions)
            )
            confirmed.add(number)

    async def consume(transport, subscription):
        while True:  # an acknowledgement that was lost with the server brings its message again
            batch = await transport.receive(subscription, 50)
            await transport.settle(batch)
            got[subscription.label] += numbers(batch)

    async with started(url, *subscriptions) as transport, asyncio.timeout(50):
        tasks = [asyncio.create_task(consume(transport, one)) for one in subscriptions]
        publisher = asyncio.create_task(publish(transport))
        for _ in range(2):
            count = len(confirmed)
            await until(lambda count=count: _more(confirmed, count + 50))
            await asyncio.to_thread(kill, name)
            await asyncio.to_thread(resume, name)
        await publisher
        for one in subscriptions:
            await _all_of(got, one.label)
            await until(lambda one=one: _settled(transport, one), 20)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    order = [n for n in dict.fromkeys(got["s@orders"]) if n % 5 == 0]
    assert order == sorted(order)


async def _more(confirmed, count):
    return len(confirmed) >= count


async def _all_of(got, label):
    """Wait until all 600 have come, and say which did not."""
    try:
        await until(lambda: _complete(got[label], 600), 20)
    except TimeoutError:
        pytest.fail(f"{label}: {sorted({*range(600)} - {*got[label]})} did not come in 20 s")


async def _settled(transport, subscription):
    return (await transport.backlog(subscription)).waiting == 0


# --- Queues and Topics ---


async def test_backlog_counts_what_waits_and_what_is_under_way(url):
    subscriptions = [Subscription("s", channel) for channel in one_of_each()]
    async with started(url, *subscriptions) as transport:
        for one in subscriptions:
            await transport.send([staged(one.channel, number) for number in range(10)])
            held = await take(transport, one, 4, settle=False)
            # Not at once: the server takes a message from those that wait before it counts it among those under way.
            await until(partial(waiting_are, transport, one, 10))
            await transport.settle(held[:3])
            await until(partial(waiting_are, transport, one, 7))


async def waiting_are(transport, subscription, count):
    return (await transport.backlog(subscription)).waiting == count


async def test_what_a_dead_process_held_comes_again_as_suspect(url):
    subscription = Subscription("s", Queue("jobs"))
    dead = adapter(url + "&lease_s=1")
    await dead.start([subscription.channel], [subscription])
    await dead.send([staged(subscription.channel, 1)])
    (first,) = await take(dead, subscription, 1, settle=False)
    assert not first.suspect
    die(dead)
    async with started(url + "&lease_s=1", subscription) as transport:
        (again,) = await take(transport, subscription, 1)
    assert again.suspect
    await dead.stop()


async def test_a_long_handler_keeps_its_message(url):
    subscription = Subscription("s", Queue("jobs"))
    async with (
        started(url + "&lease_s=5", subscription) as first,
        started(url + "&lease_s=5", subscription) as second,
    ):
        await first.send([staged(subscription.channel, 1)])
        tasks = {asyncio.create_task(one.receive(subscription, 1)) for one in (first, second)}
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(7)
        assert not any(task.done() for task in pending)
        for transport in (first, second):
            await transport.settle(next(iter(done)).result())
        for task in pending:
            task.cancel()


@pytest.mark.parametrize("attempt", range(20))  # the server sent it back to who gave it back in one of ten
async def test_what_was_not_asked_for_goes_to_others_at_once(url, attempt):
    subscription = Subscription("s", Queue(f"jobs{attempt}"))
    async with started(url, subscription) as first:
        await first.send([staged(subscription.channel, number) for number in range(20)])
        await take(first, subscription, 5)
        async with started(url, subscription) as second:
            await first.drain()
            got = await take(second, subscription, 15, within_s=8)  # less than the usual lease
    assert sorted(numbers(got)) == list(range(5, 20))


async def test_a_topic_keeps_for_a_subscription_whose_processes_are_down(url):
    topic = Topic("news")
    a, b = Subscription("a", topic), Subscription("b", topic)
    async with started(url, a, b) as transport:
        await transport.send([staged(topic, 0)])
        await take(transport, a, 1)
    async with started(url, channels=[topic]) as transport:
        await transport.send([staged(topic, 1)])
    async with started(url, a, b) as transport:
        assert numbers(await take(transport, a, 1)) == [1]
        assert sorted(numbers(await take(transport, b, 2))) == [0, 1]


async def test_a_topic_without_readers_takes_messages(url):
    topic = Topic("news")
    async with started(url, channels=[topic]) as transport:
        await transport.send([staged(topic, 1)])


async def test_a_consumer_that_was_removed_is_made_again(url, server):
    subscription = Subscription("s", Queue("jobs"))
    # A request that comes in the moment of the removal may get no answer: then silence tells.
    async with started(f"{url}&lease_s=2", subscription) as transport:
        await server.jetstream().delete_consumer(url.rpartition("=")[2] + "_jobs", "owner")
        await transport.send([staged(subscription.channel, 1)])
        assert numbers(await take(transport, subscription, 1, within_s=SILENT_S + 15)) == [1]


@pytest.mark.parametrize("channel", [Queue("jobs"), Stream("orders", partitions=1)], ids=["Queue", "Stream"])
async def test_a_request_that_nobody_answers_is_made_again(url, channel, monkeypatch, caplog):
    subscription = Subscription("s", channel)
    post, lost = Connection.post, []

    def losing(self, lines):
        if b".CONSUMER.MSG.NEXT." in lines and not lost:
            lost.append(lines)
        else:
            post(self, lines)

    monkeypatch.setattr(Connection, "post", losing)
    async with started(f"{url}&lease_s=2", subscription) as transport:
        await until(lambda: _more(lost, 1))
        await transport.send([staged(channel, 1)])
        assert numbers(await take(transport, subscription, 1, within_s=SILENT_S + 10)) == [1]
    assert "is silent" in caplog.text


# --- Streams ---


async def test_a_new_name_begins_where_it_says_and_an_old_one_goes_on(url):
    stream = Stream("orders", partitions=3)
    first, late = Subscription("first", stream), Subscription("late", stream, "latest")
    async with started(url, first) as transport:
        await transport.send([staged(stream, number, key=str(number)) for number in range(20)])
        await take(transport, first, 20)
    async with started(url, first, late, Subscription("replay", stream)) as transport:
        await transport.send([staged(stream, 20)])
        assert numbers(await take(transport, first, 1)) == [20]
        assert numbers(await take(transport, late, 1)) == [20]
        replay = next(one for one in transport._subscriptions if one.name == "replay")
        assert sorted(numbers(await take(transport, replay, 21))) == list(range(21))


async def test_partitions_are_shared_out_and_move_without_loss_or_disorder(url):
    url += "&lease_s=1"
    stream = Stream("orders", partitions=4)
    subscription = Subscription("s", stream)
    seen = []

    async def consume(transport):
        while True:
            batch = await transport.receive(subscription, 10)
            mine = [one for one in batch if transport.owns(subscription, one.partition)]
            seen.extend((one.key, json.loads(one.message.data)) for one in mine)
            await asyncio.sleep(0.005)
            await transport.settle(batch)

    async def publish(transport):
        for number in range(800):
            await transport.send([staged(stream, number, key=str(number % 8))])

    async with started(url, subscription) as first:
        tasks = [asyncio.create_task(consume(first)), publishing := asyncio.create_task(publish(first))]
        async with started(url, subscription) as second:
            tasks.append(asyncio.create_task(consume(second)))
            await until(lambda: _owned(first, second, subscription, (2, 2)))
            await publishing
            tasks[2].cancel()
            await asyncio.gather(tasks[2], return_exceptions=True)
        await until(lambda: _complete(seen, 800), 20)
        await until(lambda: _owned(first, first, subscription, (4, 4)))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for key in {key for key, _ in seen}:
        once = list(dict.fromkeys(number for one, number in seen if one == key))
        assert once == sorted(once)


async def _owned(first, second, subscription, counts):
    return tuple(sum(one.owns(subscription, n) for n in range(4)) for one in (first, second)) == counts


async def _complete(seen, count):
    return len(set(seen)) == count


async def test_partitions_of_a_dead_process_are_taken_over_with_suspects(url):
    url += "&lease_s=1"
    stream = Stream("orders", partitions=2)
    subscription = Subscription("s", stream)
    dead = adapter(url)
    await dead.start([stream], [subscription])
    await dead.send([staged(stream, number, key=str(number)) for number in range(10)])
    got = await take(dead, subscription, 10, settle=False)
    assert not any(one.suspect for one in got)
    die(dead)
    async with started(url, subscription) as transport:
        again = await take(transport, subscription, 10, within_s=8)  # the usual lease is longer
    assert all(one.suspect for one in again)
    await dead.stop()


async def test_partitions_lost_while_the_server_was_away_are_read_by_somebody_again(url):
    url += "&lease_s=5"
    stream = Stream("orders", partitions=4)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as first:
        await first.send([staged(stream, number, key=str(number)) for number in range(40)])
        reader = first._readers[subscription.label]
        reader._task.cancel()
        await reader._ownership.lose(set(range(4)))  # as when no answer comes for most of a lease
        async with started(url, subscription) as second:
            assert await _owned(first, second, subscription, (0, 0))  # by name all are still the first one's
            reader._task = asyncio.create_task(reader._keep())
            await until(lambda: _owned(first, second, subscription, (2, 2)))
            seen = set()
            for transport in (first, second, first, second):
                while (await transport.backlog(subscription)).waiting and len(seen) < 40:
                    try:
                        seen.update(numbers(await take(transport, subscription, 1, within_s=0.5)))
                    except TimeoutError:
                        break
            assert seen == set(range(40))


async def test_a_claim_whose_answer_was_lost_does_not_keep_a_partition_from_all(url):
    url += "&lease_s=2"
    stream = Stream("orders", partitions=4)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as first, started(url, subscription) as second:
        await until(lambda: _owned(first, second, subscription, (2, 2)))
        leases = second._readers[subscription.label]._leases
        theirs = next(number for number in range(4) if first.owns(subscription, number))
        async with asyncio.timeout(5):
            while True:
                await leases._read()
                record = leases.records[theirs]
                try:
                    await leases._write(theirs, Record(record.cursor, leases._process, record.log, record.revision))
                except Lost:
                    continue
                break
        await until(lambda: _owned(first, second, subscription, (1, 2)))
        await until(lambda: _owned(first, second, subscription, (2, 2)))


async def test_a_gap_seen_while_a_partition_is_opened_anew_does_not_stop_it(url):
    stream = Stream("orders", partitions=1)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as transport:
        reader = transport._readers[subscription.label]
        (partition,) = reader.partitions.values()
        open_reader = reader._layout.open_reader

        async def with_gap(*arguments):
            waiting = await open_reader(*arguments)
            reader._take(partition, partition.source, [b"1", b"9", b"9", b"0"], b"", None)
            return waiting

        reader._layout.open_reader = with_gap
        reader._reopen(partition, partition.source)
        await partition.opening
        await transport.send([staged(stream, 1)])
        assert numbers(await take(transport, subscription, 1)) == [1]


async def test_what_another_consumer_brought_meanwhile_comes_once(url):
    stream = Stream("orders", partitions=1)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as transport:
        reader = transport._readers[subscription.label]
        (partition,) = reader.partitions.values()
        open_reader = reader._layout.open_reader

        async def late(*arguments):
            waiting = await open_reader(*arguments)
            reader._layout.open_reader = open_reader
            await reader._open(partition)  # as on a new connection
            await transport.send([staged(stream, number) for number in range(5)])
            await until(lambda: _read_up_to(partition, 6))
            return waiting

        reader._layout.open_reader = late
        reader._reopen(partition, partition.source)
        await partition.opening
        await transport.send([staged(stream, 5)])
        assert numbers(await take(transport, subscription, 6)) == list(range(6))
        await nothing(transport, subscription)


async def _read_up_to(partition, position):
    return partition.next == position


async def test_the_cursor_waits_for_what_is_unfinished(url):
    stream = Stream("orders", partitions=1)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as transport:
        await transport.send([staged(stream, number) for number in range(5)])
        got = await take(transport, subscription, 5, settle=False)
        await transport.settle([got[0], *got[2:]])
    async with started(url, subscription) as transport:
        assert numbers(await take(transport, subscription, 4)) == [1, 2, 3, 4]


async def test_a_process_that_lost_its_lease_cannot_move_the_cursor(url):
    url += "&lease_s=2"
    stream = Stream("orders", partitions=1)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as slow:
        await slow.send([staged(stream, 1)])
        got = await take(slow, subscription, 1, settle=False)
        slow._readers[subscription.label]._task.cancel()  # shows no sign of life any more
        async with started(url, subscription) as other:
            (again,) = await take(other, subscription, 1, settle=False)
            await slow.settle(got)
            await asyncio.sleep(0.3)
            assert (await other.backlog(subscription)).waiting == 1
            await other.settle([again])
            await until(lambda: _settled(other, subscription))


async def test_a_log_that_was_made_anew_is_read_from_its_beginning(url, server):
    stream = Stream("orders", partitions=1)
    subscription = Subscription("s", stream)
    async with started(url, subscription) as transport:
        await transport.send([staged(stream, number) for number in range(5)])
        await take(transport, subscription, 5)
    await server.jetstream().delete_stream(url.rpartition("=")[2] + "_orders")
    async with started(url, subscription) as transport:
        await transport.send([staged(stream, number) for number in range(5, 8)])
        assert numbers(await take(transport, subscription, 3)) == [5, 6, 7]


async def five_handled(transport, stream, subscription):
    """Send five messages, handle them, and wait until the cursors say so."""
    await transport.send([staged(stream, number, key=str(number)) for number in range(5)])
    await take(transport, subscription, 5)
    await until(lambda: _settled(transport, subscription))
    await until(lambda: _noted(transport, subscription, 6))


async def _noted(transport, subscription, cursor):
    """Say whether the records have how far each partition was handled, the furthest one up to `cursor`."""
    reader = transport._readers[subscription.label]
    records = reader._leases.records
    handled = all(records[number].cursor == one.watermark.low for number, one in reader.partitions.items())
    return handled and max(record.cursor for record in records.values()) == cursor


async def test_cursors_whose_bucket_was_removed_are_written_again_by_who_knows_them(url, server, caplog):
    stream = Stream("orders", partitions=2)
    subscription = Subscription("s", stream)
    async with started(f"{url}&lease_s=2", subscription) as transport:
        await five_handled(transport, stream, subscription)
        await server.jetstream().delete_stream(f"KV_{url.rpartition('=')[2]}_cursors")
        await until(lambda: _said(caplog, "the bucket of cursors was made anew"))
        await transport.send([staged(stream, number, key=str(number)) for number in range(5, 10)])
        seen = set()
        while seen != set(range(5, 10)):
            seen.update(numbers(await take(transport, subscription, 1)))
        await until(lambda: _settled(transport, subscription))
    async with started(url, subscription) as transport:
        await transport.send([staged(stream, 10)])
        assert numbers(await take(transport, subscription, 1)) == [10]


async def test_who_reads_a_partition_reads_on_in_a_bucket_that_was_made_anew(url, server, caplog):
    subscription = Subscription("s", Stream("orders", partitions=1))
    async with started(f"{url}&lease_s=2", subscription) as transport:
        await transport.send([staged(subscription.channel, number) for number in range(5)])
        got = await take(transport, subscription, 5, settle=False)
        await server.jetstream().delete_stream(f"KV_{url.rpartition('=')[2]}_cursors")
        await until(lambda: _said(caplog, "the bucket of cursors was made anew"))
        await transport.settle(got)
        await until(lambda: _noted(transport, subscription, 6))
        await nothing(transport, subscription)
    assert "lost partitions" not in caplog.text


async def test_what_a_bucket_made_anew_refused_is_noted_at_the_next_look(url, server):
    subscription = Subscription("s", Stream("orders", partitions=1))
    async with started(f"{url}&lease_s=10", subscription) as transport:
        await transport.send([staged(subscription.channel, number) for number in range(5)])
        got = await take(transport, subscription, 5, settle=False)
        await server.jetstream().delete_stream(f"KV_{url.rpartition('=')[2]}_cursors")
        await transport._readers[subscription.label]._layout.declare([], [subscription])
        await transport.settle(got)  # under the revision of the old one
        await until(lambda: _noted(transport, subscription, 6))


async def test_processes_share_a_stream_as_before_when_the_bucket_was_made_anew(url, server, caplog):
    subscription = Subscription("s", Stream("orders", partitions=4))
    url += "&lease_s=2"
    async with started(url, subscription) as one, started(url, subscription) as other:
        readers = [transport._readers[subscription.label] for transport in (one, other)]

        async def shared():
            """Say whether both have two partitions, and both know that."""
            holders = {n: reader._leases._process for reader in readers for n in reader.partitions}
            known = [{n: record.holder for n, record in reader._leases.records.items()} for reader in readers]
            return [len(reader.partitions) for reader in readers] == [2, 2] and known == [holders, holders]

        await until(shared)
        before = [set(reader.partitions) for reader in readers]
        caplog.clear()
        await server.jetstream().delete_stream(f"KV_{url.split('prefix=')[1].partition('&')[0]}_cursors")
        await until(lambda: _said_by(caplog, "the bucket of cursors was made anew", 2))
        await one.send([staged(subscription.channel, number, key=str(number)) for number in range(20)])
        found = []
        tasks = [asyncio.create_task(_read(transport, subscription, found)) for transport in (one, other)]
        await until(lambda: _more(found, 20))
        await asyncio.sleep(1.0)  # what comes twice
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(found) == list(range(20))
        assert [set(reader.partitions) for reader in readers] == before


async def _read(transport, subscription, found):
    """Note the numbers of what comes."""
    while True:
        batch = await transport.receive(subscription, 100)
        found += numbers(batch)
        await transport.settle(batch)


async def _said_by(caplog, text, count):
    return caplog.text.count(text) >= count


async def test_processes_read_on_when_the_server_comes_back_empty(url, server):
    stream = Stream("orders", partitions=2)
    subscription = Subscription("s", stream)
    async with started(f"{url}&lease_s=2", subscription) as transport:
        await five_handled(transport, stream, subscription)
        prefix = url.rpartition("=")[2]
        for name in (f"{prefix}_orders", f"KV_{prefix}_cursors"):
            await server.jetstream().delete_stream(name)
        transport._connection._wire._transport._io_writer.transport.abort()
        await until(lambda: _is_up(transport))
        await transport.send([staged(stream, number, key=str(number)) for number in range(5, 10)])
        assert sorted(numbers(await take(transport, subscription, 5, within_s=15))) == [5, 6, 7, 8, 9]
        await until(lambda: _settled(transport, subscription))


async def _said(caplog, text):
    return text in caplog.text


async def _is_up(transport):
    return transport._connection.link.is_up


async def test_a_stop_does_not_wait_for_a_bucket_that_was_removed(url, server):
    subscription = Subscription("s", Stream("orders", partitions=1))
    async with asyncio.timeout(15), started(url, subscription) as transport:
        await transport.send([staged(subscription.channel, 1)])
        await server.jetstream().delete_stream(f"KV_{url.rpartition('=')[2]}_cursors")
        await take(transport, subscription, 1)
        await asyncio.sleep(0.2)


@pytest.mark.parametrize("channel", [Queue("jobs"), Topic("jobs")], ids=["Queue", "Topic"])
async def test_what_is_late_of_a_deleted_stream_settles_nothing_of_the_new_one(url, server, channel):
    subscription = Subscription("owner", channel)
    stream = f"{url.rpartition('=')[2]}_jobs"

    async def is_there():
        with suppress(NotFoundError):
            return await server.jetstream().consumer_info(stream, "owner")

    async with started(f"{url}&lease_s=2", subscription) as transport:
        await transport.send([staged(channel, number) for number in range(3)])
        late = await take(transport, subscription, 3, settle=False)
        await server.jetstream().delete_stream(stream)
        await until(is_there, SILENT_S + 5)
        await transport.send([staged(channel, number) for number in range(3, 6)])
        found = await take(transport, subscription, 3, settle=False)
        assert numbers(found) == [3, 4, 5]
        await transport.settle(late)
        assert (await transport.backlog(subscription)).in_flight == 3
        await transport.settle(found)
        await until(lambda: _settled(transport, subscription))


# --- messages of others ---


async def test_a_message_of_others_is_another_one_in_a_stream_made_anew(url, server):
    plain = Subscription("s", Queue("jobs", plain="job"))
    prefix = url.rpartition("=")[2]
    found = []
    for _ in range(2):
        async with started(url, plain) as transport:
            await server.publish(f"{prefix}.q.jobs", b"{}")
            found += await take(transport, plain, 1)
        stream = server.jetstream()
        await stream.delete_stream(await stream.find_stream_name_by_subject(f"{prefix}.q.jobs"))
    first, second = found
    assert first.position == second.position == 1
    assert first.message.id != second.message.id


async def test_messages_of_others_are_read(url, server):
    plain = Subscription("s", Queue("jobs", plain="job"))
    prefix = url.rpartition("=")[2]
    async with started(url, plain) as transport:
        await server.publish(f"{prefix}.q.jobs", b'{"n": 1}')
        binary = {"ce-specversion": "1.0", "ce-id": "7", "ce-type": "job", "ce-source": "/x", "ce-partitionkey": "k"}
        await server.publish(f"{prefix}.q.jobs", b'{"n": 2}', headers=binary)
        first, second = [one.message for one in await take(transport, plain, 2)]
    assert (first.type, first.data) == ("job", b'{"n": 1}')
    assert (second.id, second.source, second.data, second.partitionkey) == ("7", "/x", b'{"n": 2}', "k")


async def test_what_cannot_be_read_keeps_its_bytes(url, server):
    subscription = Subscription("s", Stream("orders", partitions=2))
    async with started(url, subscription) as transport:
        await server.publish(f"{url.rpartition('=')[2]}.s.orders.1", b"\xff nonsense")
        (one,) = await take(transport, subscription, 1)
    assert (one.message, one.raw, one.partition) == (None, b"\xff nonsense", 1)
