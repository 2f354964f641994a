"""A system without a store: the broker alone keeps what is not finished."""

import asyncio
from datetime import timedelta

import pytest

from tests.unit.rig import until
from trunkline import App, Context, Message, Queue, Retry, Service, Stream, Struct, System
from trunkline.errors import ConfigurationError, DefinitionError, PublishError, TransactionError
from trunkline.store import dead_letter_queue
from trunkline.stores.none import UNDECODABLE
from trunkline.transport import Delivery


@pytest.fixture
def jobs():
    queue = Queue("no-store-jobs")

    @queue.command(type="job")
    class Job(Struct):
        number: int

    done = Queue("no-store-done")

    @done.command(type="done")
    class Done(Struct):
        number: int

    return queue, Job, Done


def app(service, clock) -> App:
    return App(service, "memory:", store="none:", clock=clock)


async def test_what_a_handler_returns_is_sent_under_the_same_id_every_time(jobs, clock):
    job_type, done_type = jobs[1:]
    ids: list[str] = []
    service = Service("worker")

    @service.handle
    async def work(job: job_type) -> done_type:
        return done_type(job.number)

    @service.handle
    async def note(done: done_type, context: Context) -> None:
        ids.append(context.message.id)

    async with app(service, clock) as running:
        for _ in range(2):
            await running.publish(job_type(1), id="11111111-1111-7111-8111-111111111111")
        await until(lambda: len(ids) == 2)
    assert ids[0] == ids[1] != "11111111-1111-7111-8111-111111111111"


async def test_a_parked_message_stays_with_the_broker_until_its_last_try(jobs, clock):
    job_type = jobs[1]
    tries: list[int] = []
    service = Service("worker")

    @service.handle(retry=Retry(immediate=0, delays_s=(10,), jitter=0))
    async def work(job: job_type) -> None:
        tries.append(job.number)
        if len(tries) == 1:
            raise ValueError("not yet")

    async with app(service, clock) as running:
        await running.publish(job_type(1))
        await until(lambda: tries == [1])
        (consumer,) = running._consumers
        backlog = await running.transport.backlog(consumer.subscription)
        assert backlog.in_flight == 1
        await clock.advance(10.1)
        await until(lambda: tries == [1, 1])

        async def settled() -> bool:
            return (await running.transport.backlog(consumer.subscription)).in_flight == 0

        await until(settled)


async def test_a_dead_letter_is_a_message_of_its_queue(jobs, clock):
    job_type = jobs[1]
    found: list[Message] = []
    service, operator = Service("worker"), Service("operator")

    @service.handle(retry=Retry(immediate=0, delays_s=()))
    async def work(job: job_type) -> None:
        raise ValueError(f"job {job.number} is bad")

    @operator.handle(from_=dead_letter_queue("worker"))
    async def look(message: Message) -> None:
        found.append(message)

    async with app(System("all", [service, operator]), clock) as running:
        await running.publish(job_type(7))
        await until(lambda: found)
        await until(lambda: running._consumers[0]._under_way == 0)
    (message,) = found
    assert (message.type, message.data) == ("job", b'{"number":7}')
    assert message.extensions is not None
    assert message.extensions["deadlettercode"] == "handler"
    assert "job 7 is bad" in message.extensions["deadletterreason"]
    assert message.extensions["deadletterchannel"] == "no-store-jobs"


async def test_bytes_that_are_no_message_are_kept_as_they_are(jobs, clock):
    queue, job_type, _ = jobs
    found: list[Message] = []
    service, operator = Service("worker"), Service("operator")

    @service.handle
    async def work(job: job_type) -> None:
        pass

    @operator.handle(from_=dead_letter_queue("worker"))
    async def look(message: Message) -> None:
        found.append(message)

    async with app(System("all", [service, operator]), clock) as running:
        reader = running.transport.readers[f"worker@{queue.name}"]
        reader.append(Delivery(reader.subscription, None, b"\xff\x00", None, 1))
        reader.wake()
        await until(lambda: found)
    assert (found[0].type, found[0].data) == (UNDECODABLE, b"\xff\x00")


async def test_an_input_is_acknowledged_only_after_its_output_was_confirmed(jobs, clock):
    job_type, done_type = jobs[1:]
    service = Service("worker")

    @service.handle
    async def work(job: job_type) -> done_type:
        return done_type(job.number)

    async with app(service, clock) as running:
        transport = running.transport
        confirm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        send, settled = transport.send, []
        settle = transport.settle

        def held(batch):
            if batch[0].channel.name == "no-store-done":
                return confirm
            return send(batch)

        async def noted(deliveries):
            settled.extend(deliveries)
            await settle(deliveries)

        transport.send, transport.settle = held, noted
        await running.publish(job_type(1))
        for _ in range(50):
            await asyncio.sleep(0)
        assert settled == []
        confirm.set_result(None)
        await until(lambda: len(settled) == 1)


async def test_what_needs_a_store_is_refused(jobs, clock):
    job_type = jobs[1]
    caught: list[Exception] = []
    service = Service("worker")

    @service.handle
    async def work(job: job_type, context: Context) -> None:
        try:
            await context.transaction()
        except TransactionError as error:
            caught.append(error)
        try:
            context.schedule(job, timedelta(seconds=1))
        except PublishError as error:
            caught.append(error)

    async with app(service, clock) as running:
        await running.publish(job_type(1))
        await until(lambda: len(caught) == 2)
    assert [error.code for error in caught] == ["E513", "E312"]


async def test_a_held_key_needs_a_store(clock):
    stream = Stream("no-store-stream", key="name")

    @stream.event(type="named")
    class Named(Struct):
        name: str

    service = Service("worker")

    @service.handle
    async def work(named: Named) -> None:
        pass

    with pytest.raises(DefinitionError, match="E117"):
        await app(service, clock).start()


async def test_tables_of_a_service_need_a_store(jobs, clock):
    job_type = jobs[1]
    service = Service("worker")
    service.schema("CREATE TABLE t (a)")

    @service.handle
    async def work(job: job_type) -> None:
        pass

    with pytest.raises(ConfigurationError, match="E243"):
        await app(service, clock).start()


def test_a_broker_without_a_store_is_told_so():
    with pytest.raises(ConfigurationError, match=r"E243 .*name a store too"):
        App(Service("worker"), "kafka://127.0.0.1:1")
