"""Order cases: order per key on Streams, history, partitions among processes.

Read next: failure.py.
"""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any

from trunkline.handler import Context
from trunkline.policies.retry import Retry
from trunkline.testing.conformance.bench import Bench, Worker, equal, must
from trunkline.testing.conformance.registry import ConformanceError, Group
from trunkline.testing.ledger import Kind, Place, Verdict, check_conservation, check_offsets
from trunkline.transport import Delivery

order = Group("order")


def by_key(messages: list[Any]) -> dict[str, list[int]]:
    """Return the numbers of each key, in the order in which they came."""
    found: dict[str, list[int]] = {}
    for message in messages:
        found.setdefault(message.key, []).append(message.seq)
    return found


@order.case("ordered_streams")
async def key_order_one_consumer(bench: Bench) -> None:
    """One process handles each key of a Stream in the order of publication, whatever its handlers wait for."""
    log = bench.line("stream")

    async def act(message: Any, _ctx: Context) -> None:
        if message.seq % 3 == 0:
            await bench.clock.sleep(0.003 * bench.draws.random())

    reader = bench.reader(log, act=act)
    app = await bench.start(reader)
    await app.publish_all(log.messages(400, keys=8))
    await bench.until(lambda: len(reader.seen) >= 400, lambda: f"{len(reader.seen)} of 400 were handled")
    await bench.quiet()
    equal(by_key(reader.seen), {f"key{key}": list(range(1, 51)) for key in range(8)}, "order")


@order.case("ordered_streams")
async def key_order_after_nack(bench: Bench) -> None:
    """The later messages of a key wait while an earlier one is tried again, at once or later; other keys do not."""
    log = bench.line("stream")
    failures: dict[tuple[str, int], int] = {}

    async def act(message: Any, _ctx: Context) -> None:
        identity = message.key, message.seq
        if message.key in {"key0", "key1"} and message.seq % 7 == 3:
            failures[identity] = failures.get(identity, 0) + 1
            if failures[identity] <= 2:
                raise RuntimeError("twice it fails")

    reader = bench.reader(log, act=act, retry=Retry(immediate=1, delays_s=(0.15, 0.15), jitter=0))
    app = await bench.start(reader)
    await app.publish_all(log.messages(120, keys=4))
    await bench.until(lambda: len(reader.seen) >= 120, lambda: f"{len(reader.seen)} of 120 were handled")
    await bench.idle(app)
    equal(by_key(reader.seen), {f"key{key}": list(range(1, 31)) for key in range(4)}, "order")
    last = max(number for number, one in enumerate(reader.seen) if one.key in {"key2", "key3"})
    must(last < 119, "the other keys waited too")


@order.case("ordered_streams", "durable")
async def undeclared_channel_keeps_order(bench: Bench) -> None:
    """What is published to a Stream that nobody declared yet is kept, in the order in which it was given."""
    log = bench.line("stream")
    publisher = await bench.start()
    messages = log.messages(200, keys=4)
    await asyncio.gather(*(publisher.publish(message) for message in messages))
    reader = bench.reader(log)
    await bench.start(reader)
    await bench.until(lambda: len(reader.seen) >= 200, lambda: f"{len(reader.seen)} of 200 were handled")
    equal(by_key(reader.seen), {f"key{key}": list(range(1, 51)) for key in range(4)}, "order")


@order.case("ordered_streams", "durable")
async def stream_offsets_unique(bench: Bench) -> None:
    """Each message of a Stream stands at one place of one partition, and is read in the order of the places."""
    log = bench.line("stream", partitions=4)
    places: list[Place] = []
    messages: list[str] = []
    reader = bench.reader(log)
    for life in ("first", "second"):
        app = await bench.start()
        messages.extend(await bench.send(app, log.messages(100, keys=8, producer=life)))
        await bench.stop(app)
        app = await bench.start(reader, watch=partial(note, places, life))
        await bench.until(lambda: len(reader.seen) >= len(messages), lambda: f"{len(reader.seen)} were handled")
        await bench.idle(app)
        await bench.stop(app)
    verdict = Verdict(drained=True)
    check_offsets(verdict, places)
    check_conservation(verdict, messages, {"the log": [place.message for place in places]})
    must(verdict.passed, verdict.describe())
    must(all(place.partition in range(4) for place in places), "a partition that does not exist")


def note(places: list[Place], life: str, delivery: Delivery) -> None:
    """Write down where a delivery of a Stream comes from."""
    if delivery.partition >= 0 and delivery.message is not None:
        places.append(Place(life, delivery.partition, delivery.position, delivery.message.id))


async def finish(bench: Bench, publisher: Worker) -> None:
    """Stop a publisher once it has sent enough, see its messages have their effects, in order and once."""
    await bench.until(lambda: sum(entry.kind is Kind.OK for entry in publisher.journal()) >= 50, "too little was sent")
    await publisher.process.stop()
    await bench.drained()
    await bench.quiet()
    verdict = await bench.verdict(ordered=True)
    must(verdict.passed, verdict.describe())
    bench.note = f"{verdict.counts['effects']} effects, {len(bench.deliveries())} handlers begun"


@order.case("durable", "processes", "ordered_streams", "remembers")
async def key_order_competing(bench: Bench) -> None:
    """Processes that share a Stream keep the order of each key, and all get partitions."""
    log = bench.line("stream", partitions=4)
    workers = [await bench.process(log, work_s=0.002) for _ in range(2)]
    publisher = await bench.process(log, role="publish", keys=16, pause_s=0.12)
    await bench.until(lambda: all(worker.begun() for worker in workers), "one process got nothing", 30)
    await bench.quiet(0.5)
    await finish(bench, publisher)


@order.case("durable", "processes", "ordered_streams", "remembers", within_s=75)
async def key_order_across_rebalance(bench: Bench) -> None:
    """The order of each key holds while a process joins and another leaves."""
    log = bench.line("stream", partitions=4)
    first = await bench.process(log, work_s=0.002)
    publisher = await bench.process(log, role="publish", keys=16, pause_s=0.12)
    await bench.until(first.begun, "nothing was handled")
    second = await bench.process(log, work_s=0.002)
    await bench.until(second.begun, "the one that joined got nothing", 30)
    await first.process.stop()
    before = len(second.begun())
    await bench.until(lambda: len(second.begun()) > before + 25, "the one that stayed handles nothing", 30)
    await finish(bench, publisher)


@order.case("durable", "processes", "ordered_streams", "remembers", within_s=75)
async def rebalance_no_loss(bench: Bench) -> None:
    """When a process that shares a Stream is killed, another takes its partitions over: nothing lost, order kept."""
    log = bench.line("stream", partitions=4)
    workers = [await bench.process(log, work_s=0.002) for _ in range(2)]
    publisher = await bench.process(log, role="publish", keys=16, pause_s=0.12)
    await bench.until(lambda: all(worker.begun() for worker in workers), "one process got nothing", 30)
    await workers[0].process.kill()
    await bench.quiet(0.3)
    await finish(bench, publisher)
    equal(await keys_of(bench), 16, "keys that had effects")


async def keys_of(bench: Bench) -> int:
    """Return how many keys had effects."""
    return len({entry.key for entry in await bench.effects()})


@order.case("durable", "processes", "ordered_streams", within_s=60)
async def partitions_shared(bench: Bench) -> None:
    """Two processes get about equally many partitions, and each partition one process at a time."""
    log = bench.line("stream", partitions=8)
    workers = [await bench.process(log) for _ in range(2)]
    count, marks = 48, [0, 0]
    publisher = await bench.process(log, role="publish", keys=count, pause_s=0.4)
    keys: list[set[str]] = []

    def apart() -> bool:
        since = [worker.begun()[mark:] for worker, mark in zip(workers, marks, strict=True)]
        keys[:] = [{key for _, key, _ in begun} for begun in since]
        if keys[0] & keys[1]:  # a partition has moved: look anew from here
            marks[:] = [mark + len(begun) for mark, begun in zip(marks, since, strict=True)]
            return False
        return all(keys) and len(keys[0] | keys[1]) == count and sum(map(len, since)) >= 4 * count

    await bench.until(apart, lambda: f"of {count} keys they handle {list(map(len, keys))} since {marks}", 30)
    await publisher.process.stop()
    bench.note = f"{len(keys[0])} and {len(keys[1])} keys"


@order.case("durable")
async def new_stream_subscription_gets_history(bench: Bench) -> None:
    """A new subscription of a Stream gets everything that is kept, in order; so does a later one."""
    log = bench.line("stream")
    app = await bench.start(bench.reader(log, name="first"))
    await app.publish_all(log.messages(60, keys=3))
    await bench.stop(app)
    for number in range(2):
        reader = bench.reader(log, name=f"later-{number}")
        app = await bench.start(reader)
        await bench.until(lambda reader=reader: len(reader.seen) >= 60, "it did not get the history")  # type: ignore[misc]
        await app.publish(log.message(21 + number, "key0"))
        await bench.until(lambda reader=reader, n=number: len(reader.seen) >= 61 + n, "nor the next one")  # type: ignore[misc]
        await bench.idle(app)
        equal(by_key(reader.seen)["key0"], list(range(1, 22 + number)), "order")
        await bench.stop(app)


@order.case("durable")
async def latest_starts_at_end(bench: Bench) -> None:
    """A new subscription with `start="latest"` gets only what is published after it began, and goes on there."""
    log = bench.line("stream")
    app = await bench.start()
    await app.publish_all(log.messages(20))
    await bench.stop(app)
    reader = bench.reader(log, name="latest", start="latest")
    app = await bench.start(reader)
    await bench.quiet(0.5)
    equal(reader.seen, [], "what it got of the history")
    await app.publish(log.message(21))
    await bench.until(lambda: reader.seen, "it does not get what is new")
    await bench.idle(app)
    await bench.stop(app)
    app = await bench.start()
    await app.publish(log.message(22))
    await bench.stop(app)
    again = bench.reader(log, name="latest", start="latest")
    await bench.start(again)
    await bench.until(lambda: again.seen, "what was published while it was down is missing")
    await bench.quiet()
    equal((reader.numbers(), again.numbers()), ([21], [22]), "what it got")


MARGIN_S = 0.1
"""Between a moment and what is stored before and after it: the broker reads another clock of this machine."""


async def moment(bench: Bench) -> datetime:
    """Let a second begin: what was stored before this came before it, what is stored from now on after it."""
    second = math.ceil(bench.clock.now() + MARGIN_S)
    await bench.until(lambda: bench.clock.now() > second + MARGIN_S, "the clock stands still")
    return datetime.fromtimestamp(second, UTC)


@order.case("durable", within_s=60)
async def replay_from_time(bench: Bench) -> None:
    """A new subscription with a time as `start` gets what was stored from then on, in order, and goes on there."""
    log = bench.line("stream", partitions=4)
    keys = "key0", "key1", "key2"

    async def publish(*numbers: int) -> None:
        app = await bench.start()
        await app.publish_all([log.message(number, key) for number in numbers for key in keys])
        await bench.stop(app)

    async def read(name: str, start: datetime, *numbers: int) -> None:
        reader = bench.reader(log, name=name, start=start)
        app = await bench.start(reader)
        wanted = {key: list(numbers) for key in keys if numbers}
        await bench.until(lambda: len(reader.seen) >= len(numbers) * len(keys), lambda: f"{by_key(reader.seen)}")
        await bench.idle(app)
        await bench.quiet()
        equal(by_key(reader.seen), wanted, f"what {name} got")
        await bench.stop(app)

    await publish(1, 2, 3)
    middle = await moment(bench)
    await publish(4, 5, 6)
    await read("replay", middle.astimezone(timezone(timedelta(hours=5, minutes=30))), 4, 5, 6)
    await publish(7)
    await read("replay", middle, 7)
    end = await moment(bench)
    await read("rest", end)
    await publish(8)
    await read("rest", end, 8)
    await read("everything", datetime(2001, 1, 1, tzinfo=UTC), *range(1, 9))


@order.case("ordered_streams", "keeps")
async def dead_letter_holds_its_key(bench: Bench) -> None:
    """Behind a dead letter the later messages of its key wait; after the redrive they follow in order."""
    log = bench.line("stream")
    broken = [True]

    async def act(message: Any, _ctx: Context) -> None:
        if broken[0] and (message.key, message.seq) == ("key0", 3):
            raise ConformanceError("not now")

    reader = bench.reader(log, act=act, retry=Retry(immediate=0, delays_s=()))
    app = await bench.start(reader)
    await app.publish_all(log.messages(20, keys=2))
    (letter,) = await bench.until(lambda: bench.dead_letters(app), "there is no dead letter")
    await bench.until(lambda: len(reader.seen) >= 12, lambda: f"{by_key(reader.seen)}")
    await bench.quiet()
    equal(by_key(reader.seen), {"key0": [1, 2], "key1": list(range(1, 11))}, "before the redrive")
    broken[0] = False
    await app.store.redrive(letter.number)
    await bench.until(lambda: len(reader.seen) >= 20, lambda: f"{by_key(reader.seen)}")
    equal(by_key(reader.seen)["key0"], list(range(1, 11)), "after the redrive")
