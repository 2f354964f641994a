"""Core cases: publishing, settling, failing, envelopes, subscriptions.

Read next: order.py.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec

from trunkline.channel import Struct
from trunkline.errors import DiscardError, PublishError, RejectError, RetryLaterError, UnroutableError
from trunkline.handler import Context
from trunkline.message import Message
from trunkline.policies.retry import Retry
from trunkline.service import Service
from trunkline.testing.conformance.bench import Bench, Reader, equal, must
from trunkline.testing.conformance.registry import Group
from trunkline.transport import Staged

core = Group("core")
ONCE = Retry(immediate=0, delays_s=())
ENDED_S = 10.0
"""Longest that a publish goes on after its App has stopped."""


@core.case()
async def pub_confirm_then_visible(bench: Bench) -> None:
    """What `publish` has confirmed is handled, once, as it was published."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    ids = [await app.publish(jobs.message(number, text=f"text {number}")) for number in range(1, 11)]
    await bench.until(lambda: len(reader.seen) >= 10, lambda: f"{reader.numbers()} of 10 were handled")
    await bench.quiet()
    equal(sorted(reader.seen, key=lambda one: one.seq), [jobs.message(n, text=f"text {n}") for n in range(1, 11)],
          "what was handled")  # fmt: skip
    equal(sorted(message.id for message in reader.messages), sorted(ids), "ids")


@core.case()
async def pub_batch_whole(bench: Bench) -> None:
    """A batch is confirmed as a whole, and every message of it is handled once."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(500))
    await bench.until(lambda: len(reader.seen) >= 500, lambda: f"{len(reader.seen)} of 500 were handled")
    await bench.quiet()
    equal(sorted(reader.numbers()), list(range(1, 501)), "numbers")


@core.case()
async def pub_unroutable_errors(bench: Bench) -> None:
    """A type that no channel carries is refused before anything is sent."""

    class Nowhere(Struct):
        number: int

    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    try:
        await app.publish(Nowhere(1))
    except UnroutableError:
        pass
    else:
        must(False, "an undeclared type was published")  # noqa: FBT003
    await app.publish(jobs.message(1))
    await bench.until(lambda: reader.seen, "the next publish was not handled")


@core.case()
async def pub_without_reader_accepted(bench: Bench) -> None:
    """An event on a Topic that nobody reads yet is confirmed."""
    news, jobs = bench.line("topic"), bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await app.publish(news.message(1))
    await app.publish(jobs.message(1))
    await bench.until(lambda: reader.seen, "the next publish was not handled")


@core.case()
async def pub_many_channels(bench: Bench) -> None:
    """Channels of all kinds work beside each other in one App."""
    lines = [bench.line(kind) for kind in ("queue", "topic", "stream") for _ in range(2)]
    reader = bench.reader(*lines)
    app = await bench.start(reader)
    await asyncio.gather(*(app.publish_all(line.messages(50, producer=line.name)) for line in lines))
    wanted = sorted((line.name, number) for line in lines for number in range(1, 51))
    await bench.until(lambda: len(reader.seen) >= 300, lambda: f"{len(reader.seen)} of 300 were handled")
    await bench.quiet()
    equal(sorted((one.producer, one.seq) for one in reader.seen), wanted, "messages")


@core.case()
async def concurrent_publishers_none_missing(bench: Bench) -> None:
    """Many tasks that publish at once lose nothing and repeat nothing."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)

    async def publish(producer: str) -> None:
        for number in range(1, 26):
            await app.publish(jobs.message(number, producer=producer))

    await asyncio.gather(*(publish(f"p{number}") for number in range(20)))
    await bench.until(lambda: len(reader.seen) >= 500, lambda: f"{len(reader.seen)} of 500 were handled")
    await bench.quiet()
    wanted = sorted((f"p{producer}", number) for producer in range(20) for number in range(1, 26))
    equal(sorted((one.producer, one.seq) for one in reader.seen), wanted, "messages")


@core.case()
async def ack_removes(bench: Bench) -> None:
    """What was handled is no longer waiting, and does not come again to the next process."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(20))
    await bench.until(lambda: len(reader.seen) >= 20, "not all were handled")
    await bench.idle(app)
    if bench.capabilities.durable:
        await bench.stop(app)
        await bench.start(reader)
    await bench.quiet(0.5)
    equal(len(reader.begun), 20, "handlers begun")


@core.case()
async def nack_requeues(bench: Bench) -> None:
    """What failed is handled again, and in the end once."""
    jobs = bench.line()
    failed: set[int] = set()

    async def act(job: Any, _ctx: Context) -> None:
        if job.seq % 2 and job.seq not in failed:
            failed.add(job.seq)
            raise RuntimeError("the first try fails")

    reader = bench.reader(jobs, act=act, retry=Retry(immediate=0, delays_s=(0.05,), jitter=0))
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(20))
    await bench.until(lambda: len(reader.seen) >= 20, lambda: f"{sorted(reader.numbers())} of 20 were handled")
    await bench.idle(app)
    equal(sorted(reader.numbers()), list(range(1, 21)), "what was handled")
    equal(len(reader.begun), 30, "handlers begun")


@core.case()
async def nack_delay(bench: Bench) -> None:
    """A message that asks to be tried later comes no earlier, and lets the others pass."""
    jobs = bench.line()
    times: list[float] = []

    async def act(job: Any, _ctx: Context) -> None:
        if job.seq == 1:
            times.append(bench.clock.monotonic())
            if len(reader.seen) < 4 or len(times) == 1:
                raise RetryLaterError(0.6, "not yet")

    reader = bench.reader(jobs, act=act)
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(5))
    await bench.until(lambda: len(reader.seen) >= 5, lambda: f"{reader.numbers()} were handled")
    must(times[1] - times[0] >= 0.59, f"it came again after {times[1] - times[0]:.2f} s, not 0.6")


@core.case()
async def reject_to_dlq(bench: Bench) -> None:
    """What a handler rejects is set aside with the reason, without another try."""
    jobs = bench.line()

    async def act(job: Any, _ctx: Context) -> None:
        if job.seq == 2:
            raise RejectError("no such order")

    reader = bench.reader(jobs, act=act)
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(3))
    await bench.until(lambda: len(reader.seen) >= 2, "the others were not handled")
    (letter,) = await bench.until(lambda: bench.dead_letters(app), "there is no dead letter")
    equal((letter.code, letter.reason), ("rejected", "no such order"), "dead letter")
    await bench.idle(app)
    equal(sorted(number for number, _ in reader.attempts), [1, 2, 3], "tries")


@core.case()
async def discard_drops(bench: Bench) -> None:
    """What a handler discards is gone, and is no dead letter."""
    jobs = bench.line()

    async def act(job: Any, _ctx: Context) -> None:
        if job.seq == 2:
            raise DiscardError("not needed")

    reader = bench.reader(jobs, act=act)
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(3))
    await bench.until(lambda: len(reader.begun) >= 3, "not all were handled")
    await bench.idle(app)
    equal(await bench.dead_letters(app), [], "dead letters")
    equal(len(reader.begun), 3, "handlers begun")


@core.case()
async def redeliver_count_increments(bench: Bench) -> None:
    """A handler sees how often its message failed, over immediate and delayed tries."""
    jobs = bench.line()

    async def act(_job: Any, ctx: Context) -> None:
        if ctx.attempt < 3:
            raise RuntimeError("again")

    reader = bench.reader(jobs, act=act, retry=Retry(immediate=1, delays_s=(0.05, 0.05), jitter=0))
    app = await bench.start(reader)
    await app.publish(jobs.message(1))
    await bench.until(lambda: reader.seen, lambda: f"tries: {reader.attempts}")
    equal(reader.attempts, [(1, 0), (1, 1), (1, 2), (1, 3)], "tries")


@core.case("durable", "processes", within_s=60)
async def lease_extend_long_handler(bench: Bench) -> None:
    """A handler that runs longer than any lease keeps its message: nobody else gets it."""
    jobs = bench.line()
    for _ in range(2):
        await bench.process(jobs, work_s=2.5 * bench.lease_s)
    app = await bench.start()
    await app.publish_all(jobs.messages(2))

    async def done() -> bool:
        return len(await bench.effects()) >= 2

    await bench.until(done, "no effect")
    await bench.quiet(0.5)
    equal(sorted(seq for _, _, seq in bench.deliveries()), [1, 2], "handlers begun")


@core.case()
async def headers_bytes_unicode_roundtrip(bench: Bench) -> None:
    """Every attribute and byte of an envelope arrives as it was given."""
    jobs = bench.line()
    got: list[Message] = []
    service = Service("reader")

    async def take(message: Message) -> None:
        got.append(message)

    service.handle(from_=jobs.channel)(take)
    app = await bench.start(service)
    plain = Message(
        bench.clock.new_id(), "any.type", "urn:schönes/æther",
        'text "quoted"\n\x00 \\ 漢字 🚃'.encode(), 1_700_000_000.125,
        "key: ключ\t", "correlation", "causation", 7, "text/plain; charset=utf-8", "https://example.org/schema?x=1&y=2",
        "subject ☃ %20 + ", None, "reply/to", float(int(bench.clock.now()) + 3600), 5, "tenant-1",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", {"shopregion": "Île-de-France"},
    )  # fmt: skip
    binary = msgspec.structs.replace(
        plain, id="not a uuid", data=bytes(range(256)) * 3, datacontenttype="application/octet-stream", extensions=None
    )
    empty = Message("an empty one", "any.type", "urn:x", b"", 0.0)
    json = Message(bench.clock.new_id(), "any.type", "urn:x", b'{"a": [1, 2.50, "\\u00e4"]}', 1_700_000_000.0)
    sent = [plain, binary, empty, json]
    await bench.send_staged(app, [Staged(jobs.channel, message) for message in sent])
    await bench.until(lambda: len(got) >= 4, lambda: f"{len(got)} of 4 arrived")
    found = {message.id: msgspec.structs.replace(message, sequence=None) for message in got}
    for message in sent:
        for name in Message.__struct_fields__:
            equal(getattr(found[message.id], name), getattr(message, name), f"{name} of {message.id}")


@core.case()
async def max_size_rejected(bench: Bench) -> None:
    """A payload over the limit is refused, a large one below it arrives whole, and the next one too."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    large = jobs.message(1, text="x" * (512 * 1024))
    try:
        await app.publish(jobs.message(2, text="x" * (2 * 1024 * 1024)))
    except PublishError:
        pass
    else:
        must(False, "2 MiB were accepted")  # noqa: FBT003
    await app.publish(large)
    await app.publish(jobs.message(3))
    await bench.until(lambda: len(reader.seen) >= 2, lambda: f"{reader.numbers()} were handled")
    equal(sorted(reader.numbers()), [1, 3], "what was handled")
    must(large in reader.seen, "the large payload did not arrive as it was")


@core.case()
async def ttl_expires(bench: Bench) -> None:
    """What is too old when its turn comes is not handled; what is not, is."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await bench.send(app, [jobs.message(1)], expirytime=timedelta(seconds=-1))
    await bench.send(app, [jobs.message(2)], expirytime=timedelta(hours=1))
    await bench.until(lambda: reader.seen, "what is not too old was not handled")
    await bench.idle(app)
    equal([number for number, _ in reader.attempts], [2], "what was handled")


@core.case("priority")
async def priority_order(bench: Bench) -> None:
    """On a Queue with priority the urgent messages come first, and equally urgent ones in turn."""
    jobs = bench.line(priority=True)
    order: list[int] = []

    async def act(job: Any, _ctx: Context) -> None:
        order.append(job.seq)

    reader = bench.reader(jobs, act=act, concurrency=1)
    app = await bench.start() if bench.capabilities.durable else await bench.start(reader)
    staged: list[Staged] = []
    for number, priority in enumerate([0, 0, 9, 9, 0, 9], 1):
        message = Message(
            bench.clock.new_id(), "numbered", "conformance", msgspec.json.encode(jobs.message(number)),
            bench.clock.now(), priority=priority,
        )  # fmt: skip
        staged.append(Staged(jobs.channel, message))
    await bench.send_staged(app, staged)
    if bench.capabilities.durable:
        await bench.start(reader)
    await bench.until(lambda: len(order) >= 6, lambda: f"{order} were handled")
    equal(order, [3, 4, 6, 1, 2, 5], "order")


@core.case()
async def fanout_each_subscription_once(bench: Bench) -> None:
    """Each subscription of a Topic or Stream gets each message once."""
    lines = [bench.line("topic"), bench.line("stream")]
    readers = [bench.reader(*lines, name=f"reader-{number}") for number in range(3)]
    app = await bench.start(*readers)
    for line in lines:
        await app.publish_all(line.messages(40, producer=line.name))
    wanted = sorted((line.name, number) for line in lines for number in range(1, 41))
    for reader in readers:
        await bench.until(lambda reader=reader: len(reader.seen) >= 80, f"{reader.service.name} got too few")  # type: ignore[misc]
    await bench.quiet()
    for reader in readers:
        found = sorted((one.producer, one.seq) for one in reader.seen)
        equal(found, wanted, f"what {reader.service.name} got")


@core.case("durable", "processes")
async def competing_consumers_partition_work(bench: Bench) -> None:
    """Processes of one service share the messages of a Queue: each is handled by one of them, all take part."""
    jobs = bench.line()
    workers = [await bench.process(jobs, work_s=0.02, concurrency=1) for _ in range(2)]
    publisher = await bench.process(jobs, role="publish", keys=4, pause_s=0.02)
    # Where a group shares partitions, the second process gets its part only after it has joined.
    await bench.until(lambda: all(worker.begun() for worker in workers), "one process handles nothing")
    await publisher.process.stop()
    await bench.drained()
    await bench.quiet()
    begun = bench.deliveries()
    must(len(begun) == len(set(begun)), f"{len(begun) - len(set(begun))} were handled by both")
    shares = [len(worker.begun()) for worker in workers]
    bench.note = f"shares {shares}"


@core.case()
async def topic_isolated(bench: Bench) -> None:
    """Who reads one Topic gets nothing of another."""
    one, other = bench.line("topic"), bench.line("topic")
    readers = [bench.reader(one, name="reader-1"), bench.reader(other, name="reader-2")]
    app = await bench.start(*readers)
    await app.publish_all(one.messages(20, producer="one"))
    await app.publish_all(other.messages(20, producer="other"))
    await bench.until(lambda: all(len(reader.seen) >= 20 for reader in readers), "not all were handled")
    await bench.quiet()
    equal([{message.producer for message in reader.seen} for reader in readers], [{"one"}, {"other"}], "producers")
    equal([len(reader.seen) for reader in readers], [20, 20], "messages")


@core.case("durable")
async def subscription_keeps_messages_while_down(bench: Bench) -> None:
    """A subscription that exists keeps what is published while none of its processes runs."""
    lines = [bench.line("topic"), bench.line("stream"), bench.line("queue")]
    reader = bench.reader(*lines)
    app = await bench.start(reader)
    await app.publish(lines[0].message(1, producer="before"))
    await bench.until(lambda: reader.seen, "the first one was not handled")
    await bench.idle(app)
    await bench.stop(app)
    app = await bench.start()
    for line in lines:
        await app.publish_all(line.messages(10, producer=line.name))
    await bench.stop(app)
    await bench.start(reader)
    wanted = sorted([("before", 1), *((line.name, number) for line in lines for number in range(1, 11))])
    await bench.until(lambda: len(reader.seen) >= 31, lambda: f"{len(reader.seen)} of 31 were handled")
    await bench.quiet()
    equal(sorted((one.producer, one.seq) for one in reader.seen), wanted, "messages")


@core.case("durable")
async def stop_gives_back(bench: Bench) -> None:
    """A stop in the middle of a handler gives its message back; the next process handles it."""
    jobs = bench.line()
    begun = asyncio.Event()

    async def act(_job: Any, _ctx: Context) -> None:
        begun.set()
        await asyncio.Event().wait()

    stuck = bench.reader(jobs, act=act, concurrency=4)
    app = await bench.start(stuck, grace_s=0.1)
    await app.publish_all(jobs.messages(10))
    await bench.until(begun.is_set, "no handler began")
    await bench.stop(app)
    equal(stuck.seen, [], "what came to its end")
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await bench.until(lambda: len(reader.seen) >= 10, lambda: f"{sorted(reader.numbers())} of 10 were handled")
    await bench.idle(app)
    equal(sorted(reader.numbers()), list(range(1, 11)), "what was handled")
    equal(await bench.dead_letters(app), [], "dead letters")


@core.case("durable")
async def stop_and_start_loses_nothing(bench: Bench) -> None:
    """Stopping and starting again and again, in the middle of the work, loses nothing and repeats no effect."""
    jobs = bench.line()
    publisher = await bench.start()
    await publisher.publish_all(jobs.messages(60))
    done: list[int] = []

    def progress(reader: Reader) -> bool:
        return bool(reader.seen) or len(done) >= 60

    for _ in range(4):
        reader = bench.reader(jobs, concurrency=4, act=lambda _job, _ctx: bench.clock.sleep(0.005))
        app = await bench.start(reader)
        await bench.until(partial(progress, reader), "nothing was handled")
        await bench.stop(app)
        done.extend(reader.numbers())
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await bench.until(lambda: len(set(done + reader.numbers())) >= 60, "not all were handled")
    await bench.idle(app)
    equal(sorted(done + reader.numbers()), list(range(1, 61)), "what was handled")


@core.case()
async def stop_twice(bench: Bench) -> None:
    """Stopping what is stopped, or is stopping, does nothing."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    app = await bench.start(reader)
    await app.publish(jobs.message(1))
    await bench.until(lambda: reader.seen, "not handled")
    await bench.stop(app)
    await app.stop()


@core.case("durable")
async def stop_while_publishing(bench: Bench) -> None:
    """What was confirmed while the App stopped is handled later; the rest is refused, not lost in silence."""
    jobs = bench.line()
    app = await bench.start()
    publishes = [asyncio.ensure_future(app.publish(jobs.message(number))) for number in range(1, 201)]
    await bench.clock.sleep(0)  # lets them begin
    await bench.stop(app)
    _, pending = await asyncio.wait(publishes, timeout=ENDED_S)
    must(not pending, f"{len(pending)} of them have neither been confirmed nor refused {ENDED_S:g} s after the stop")
    ends = await asyncio.gather(*publishes, return_exceptions=True)
    confirmed = {number for number, end in enumerate(ends, 1) if isinstance(end, str)}
    reader = bench.reader(jobs)
    await bench.start(reader)
    await bench.until(lambda: confirmed <= set(reader.numbers()), "what was confirmed was not handled")
    bench.note = f"{len(confirmed)} of 200 confirmed"


@core.case()
async def handler_messages_leave_with_its_effects(bench: Bench) -> None:
    """What a handler publishes leaves when it succeeds, once, and not when it fails."""
    jobs, news = bench.line(), bench.line("topic")
    tries: list[int] = []

    async def act(job: Any, ctx: Context) -> None:
        tries.append(job.seq)
        ctx.publish(news.message(job.seq, producer=f"try {tries.count(job.seq)}"))
        if job.seq == 2 and tries.count(2) == 1:
            raise RuntimeError("the first try fails")

    first = bench.reader(jobs, act=act, publishes=(news.type,), retry=Retry(immediate=1))
    second = bench.reader(news, name="second")
    app = await bench.start(first, second)
    await app.publish_all(jobs.messages(3))
    await bench.until(lambda: len(second.seen) >= 3, lambda: f"{second.numbers()} arrived")
    await bench.quiet()
    equal(sorted((one.seq, one.producer) for one in second.seen), [(1, "try 1"), (2, "try 2"), (3, "try 1")], "events")


@core.case("remembers")
async def duplicate_publish_one_effect(bench: Bench) -> None:
    """A message published twice under one id has its effects once per subscription."""
    lines = [bench.line("queue"), bench.line("topic"), bench.line("stream")]
    effects = bench.line("topic")

    async def act(message: Any, ctx: Context) -> None:
        ctx.publish(effects.message(message.seq, producer=message.producer))

    first = bench.reader(*lines, act=act, publishes=(effects.type,))
    second = bench.reader(effects, name="second")
    app = await bench.start(first, second)
    for line in lines:
        message_id = bench.clock.new_id()
        await bench.send(app, [line.message(1, producer=line.name)], id=message_id)
        await bench.send(app, [line.message(1, producer=line.name)], id=message_id)
        await app.publish(line.message(2, producer=line.name))
    await bench.until(lambda: len(second.seen) >= 6, lambda: f"{len(second.seen)} of 6 effects")
    await bench.idle(app)
    await bench.quiet()
    found = sorted((one.producer, one.seq) for one in second.seen)
    equal(found, sorted((line.name, number) for line in lines for number in (1, 2)), "effects")


@core.case("keeps")
async def scheduled_message_waits(bench: Bench) -> None:
    """A scheduled message comes when it is due, not before."""
    jobs = bench.line()
    came: dict[int, float] = {}

    async def act(job: Any, _ctx: Context) -> None:
        came[job.seq] = bench.clock.monotonic()

    reader = bench.reader(jobs, act=act)
    app = await bench.start(reader)
    began = bench.clock.monotonic()
    await app.schedule(jobs.message(1), timedelta(seconds=0.6))
    await app.publish(jobs.message(2))
    await bench.until(lambda: len(reader.seen) >= 2, lambda: f"{reader.numbers()} were handled")
    must(came[1] - began >= 0.59, f"the scheduled message came after {came[1] - began:.2f} s, not 0.6")
    equal(sorted(reader.numbers()), [1, 2], "what was handled")


@core.case("durable")
async def backlog_counts(bench: Bench) -> None:
    """The backlog counts what waits and what is under way, and is 0 when all is done."""
    go = asyncio.Event()

    async def act(_job: Any, _ctx: Context) -> None:
        await go.wait()

    jobs, log = bench.line(), bench.line("stream")
    reader = bench.reader(jobs, log, act=act, concurrency=2)
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(30))
    await app.publish_all(log.messages(30, keys=4))
    await bench.until(lambda: len(reader.begun) >= 4, "no handlers began")

    async def waiting() -> bool:
        return {one.waiting for one in (await app.backlog()).values()} == {30}

    async def counts() -> str:
        return str(await app.backlog())

    last: list[str] = []

    async def counted() -> bool:
        last[:] = [await counts()]
        return await waiting()

    await bench.until(counted, lambda: f"two backlogs of 30 messages are {last}")
    go.set()
    await bench.until(lambda: len(reader.seen) >= 60, "not all were handled")
    await bench.idle(app)
