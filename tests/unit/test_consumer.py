"""One subscription at work: stopping in the middle."""

import asyncio
import contextlib

import msgspec

from tests.unit.rig import until
from trunkline import App, Batch, Queue, Retry, Service, Stream, Struct
from trunkline.delivery import MAX_CRASHES
from trunkline.errors import StoreFullError

steps = Stream("consumer-steps", key="lane")


@steps.event
class Step(Struct):
    lane: str
    number: int


jobs = Queue("consumer-jobs")


@jobs.command
class Job(Struct):
    number: int


async def test_a_suspect_that_is_handled_while_it_waits_does_not_begin_again(tmp_path):
    service, begun, free = Service("worker"), [], asyncio.Event()

    @service.handle
    async def handle(job: Job) -> None:
        begun.append(job.number)
        await free.wait()

    async with App(service, f"sqlite:///{tmp_path}/again.db") as app:
        (consumer,) = app._consumers
        handed = []
        run = consumer._run
        consumer._run = lambda deliveries: (handed.extend(deliveries), run(deliveries))
        await app.publish(Job(1))
        await until(lambda: begun)
        # The broker took its partition away and gave it back: the same message once more, counted already.
        again = msgspec.structs.replace(handed[0], suspect=True, fresh=False, position=handed[0].position + 1)
        await app.store.begin_attempts([again])
        consumer._under_way += 1
        admitting = asyncio.create_task(consumer._admit([again]))
        await until(consumer._alone.locked)
        free.set()
        await admitting
        await until(lambda: not consumer._under_way)
        assert begun == [1]


async def test_what_was_behind_a_message_left_for_another_process_does_not_run_though_the_partition_is_back(tmp_path):
    url, service, handled, free = f"sqlite:///{tmp_path}/left.db", Service("stepper"), [], asyncio.Event()

    @service.handle(concurrency=1)
    async def handle(step: Step) -> None:
        handled.append(step.number)
        await free.wait()

    async with App(service, url) as app:
        (consumer,) = app._consumers
        await app.publish_all([Step("a", 0), Step("a", 1), Step("a", 2)])
        await until(lambda: consumer.lanes.waiting == 2)
        # Away when the second message is about to begin, back when the third is.
        answers = iter([False])
        app.transport.owns = lambda _subscription, _partition: next(answers, True)
        consumer._assignment -= 1
        free.set()
        await until(lambda: not consumer._under_way)
        assert handled == [0]
        await app.publish(Step("a", 3))
        await until(lambda: handled == [0, 3])
    async with App(service, url):
        await until(lambda: handled == [0, 3, 1, 2])


async def test_a_try_that_the_process_outlived_counts_as_no_crash(tmp_path):
    service, handed, handled = Service("stepper"), [], []

    @service.handle
    async def handle(step: Step) -> None:
        handled.append(step.number)

    async with App(service, f"sqlite:///{tmp_path}/outlived.db") as app:
        (consumer,) = app._consumers
        run = consumer._run
        consumer._run = handed.extend
        await app.publish(Step("a", 0))
        await until(lambda: handed)
        consumer._run = run
        suspect = msgspec.structs.replace(handed[0], suspect=True, fresh=False)
        owned = True
        app.transport.owns = lambda _subscription, _partition: owned
        begin = app.store.begin_attempts

        async def begin_and_lose(deliveries):
            nonlocal owned
            counts = await begin(deliveries)
            owned = False
            consumer._assignment -= 1
            return counts

        app.store.begin_attempts = begin_and_lose
        for _ in range(MAX_CRASHES + 2):
            owned, consumer._under_way = True, 1
            consumer._left.clear()
            await consumer._admit_suspects([suspect])
        assert handled == []
        app.store.begin_attempts, owned, consumer._under_way = begin, True, 1
        consumer._left.clear()
        await consumer._admit_suspects([suspect])
        assert (handled, await app.store.dead_letters()) == ([0], [])


async def test_a_second_copy_whose_settlement_fails_does_not_run_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("trunkline.consumer.AGAIN_S", 0.01)
    service, handled, received, refused = Service("stepper"), [], [], []

    @service.handle(concurrency=1)
    async def handle(step: Step) -> None:
        handled.append(step.number)
        await until(lambda: refused)

    async with App(service, f"sqlite:///{tmp_path}/copy.db") as app:
        (consumer,) = app._consumers
        admit, submit = consumer._admit, app.store.submit

        async def keep(batch):
            received.extend(msgspec.structs.replace(delivery, fresh=False) for delivery in batch)

        def refuse_once(unit):
            if unit.duplicate and not refused:
                refused.append(unit)
                asyncio.get_running_loop().call_soon(unit.done, unit, StoreFullError("E502", "no room"))
            else:
                submit(unit)

        consumer._admit, app.store.submit = keep, refuse_once
        await app.publish_all([Step("a", 0), Step("a", 1), Step("a", 2)])
        await until(lambda: len(received) == 3)
        copy = msgspec.structs.replace(received[2], position=received[2].position + 1)
        consumer._under_way += 1
        await admit([*received, copy])
        await until(lambda: not consumer._under_way)
    assert handled == [0, 1, 2]


async def test_what_is_admitted_while_it_drains_is_left_with_what_waited_before_it(tmp_path):
    url, service, handled, free = f"sqlite:///{tmp_path}/drain.db", Service("stepper"), [], asyncio.Event()

    @service.handle
    async def handle(step: Step) -> None:
        if step.number == 0:
            await free.wait()
        handled.append(step.number)

    app = App(service, url)
    await app.start()
    (consumer,) = app._consumers
    await app.publish_all([Step("a", 0), Step("a", 1)])
    await until(lambda: consumer.lanes.waiting == 1)
    # Received before the stop, and looked up in the store while it begins.
    batch = []
    admit = consumer._admit

    async def admit_late(received):
        batch.extend(received)

    consumer._admit = admit_late
    await app.publish(Step("a", 2))
    await until(lambda: batch)
    stopping = asyncio.create_task(app.stop())
    await until(lambda: consumer._draining)
    await admit(batch)
    free.set()
    await stopping
    assert handled == [0]
    async with App(service, url):
        await until(lambda: len(handled) == 3)
    assert handled == [0, 1, 2]


async def test_a_parked_message_that_is_due_runs_before_what_waits(tmp_path):
    service, handled, failed = Service("stepper"), [], []

    @service.handle(retry=Retry(immediate=0, delays_s=(0.01,), jitter=0), concurrency=1)
    async def handle(step: Step) -> None:
        if step.lane == "failing" and not failed:
            failed.append(step)
            raise RuntimeError("once")
        await asyncio.sleep(0.01)
        handled.append(step.lane)

    url = f"sqlite:///{tmp_path}/first.db"
    async with App(Service("publisher"), url) as publisher:
        await publisher.publish_all([Step("failing", 0), *(Step(f"other-{number}", 0) for number in range(60))])
    async with App(service, url):
        await until(lambda: len(handled) == 61)
    assert handled.index("failing") < 50


async def test_a_batch_whose_handler_swallows_its_cancellation_ends_with_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trunkline.tasks.STUBBORN_S", 0.001)
    service, begun, free = Service("batcher"), [], asyncio.Event()

    @service.handle(batch=Batch(size=3, wait_s=0))
    async def handle(found: list[Job]) -> None:
        begun.append(len(found))
        while not free.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await free.wait()

    async with App(service, f"sqlite:///{tmp_path}/stubborn.db", grace_s=0.01) as app:
        await app.publish(Job(1))
        await until(lambda: begun)
        stopping = asyncio.create_task(app.stop())
        await until(lambda: "batcher@consumer-jobs: the stop waits for 1 handlers" in caplog.text)
        free.set()
        await asyncio.wait_for(stopping, 10)


async def test_a_batch_that_is_full_waits_no_longer(tmp_path):
    service, sizes = Service("batcher"), []

    @service.handle(batch=Batch(size=3, wait_s=3600))
    async def handle(found: list[Job]) -> None:
        sizes.append(len(found))

    async with App(service, f"sqlite:///{tmp_path}/full.db") as app:
        await app.publish(Job(1))
        await app.publish(Job(2))
        await app.publish(Job(3))
        await until(lambda: sizes)
    assert sizes == [3]
