"""When what the handlers call is away: one message is tried now and then, the others wait, and all go on afterwards."""

import asyncio

import pytest

from tests.unit.rig import until
from trunkline import Batch, Breaker, Queue, RejectError, Retry, Service, Stream, Struct
from trunkline.errors import DefinitionError

ONCE = Retry(immediate=0, delays_s=())


def declare(channel):
    kind = {"queue": "command", "stream": "event"}[channel.kind]

    class Job(Struct):
        key: str
        number: int = 0

    return getattr(channel, kind)(Job)


@pytest.fixture(params=["queue", "stream"])
def job(request):
    return declare(Queue("jobs", key="key") if request.param == "queue" else Stream("log", key="key"))


class Bank:
    """Away until it is back; counts who asks."""

    def __init__(self):
        self.away = True
        self.asked = []
        self.open = asyncio.Event()
        self.open.set()
        self.done = []

    async def ask(self, message):
        self.asked.append(message.number)
        await self.open.wait()
        if self.away:
            raise OSError("the bank is away")
        self.done.append(message.number)


def worker(job, bank, **options):
    service = Service("worker")

    @service.handle(**{"retry": ONCE, "breaker": Breaker(messages=5, pause_s=30)} | options)
    async def work(message: job) -> None:
        await bank.ask(message)

    return service


async def publish(app, job, count):
    await app.publish_all([job(f"key-{number}", number) for number in range(count)])


def kinds(rig):
    return [kind for kind in rig.kinds() if kind in {"paused", "resumed"}]


async def test_an_outage_sets_only_those_aside_that_opened_the_circuit(rig, job, clock, caplog):
    bank = Bank()
    async with rig.run(worker(job, bank, concurrency=1)) as app:
        await publish(app, job, 40)
        await until(lambda: kinds(rig) == ["paused"])
        assert len(bank.asked) == 5
        for probes in range(1, 11):
            await clock.advance(30)
            await until(lambda: len(bank.asked) == 5 + probes)  # noqa: B023 - awaited in this turn
        assert len(await rig.dead()) == 5
        assert len(set(bank.asked)) > 9, "not the same few again and again"
        assert "paused worker@" in caplog.text
        assert "5 messages failed and none was handled between, the last with OSError: the bank is away" in caplog.text
        bank.away = False
        await rig.pass_time(lambda: len(bank.done) == 35, step_s=10)
        assert kinds(rig) == ["paused", "resumed"]
        assert len(set(bank.done)) == 35
        assert len(await rig.dead()) == 5


async def test_tries_under_way_when_it_opens_do_not_count(rig, job, clock):
    bank = Bank()
    bank.open.clear()
    async with rig.run(worker(job, bank, concurrency=20)) as app:
        await publish(app, job, 20)
        await until(lambda: len(bank.asked) == 20)
        bank.open.set()
        await until(lambda: rig.parked() == 15)
        assert len(await rig.dead()) == 5
        bank.away = False
        await rig.pass_time(lambda: len(bank.done) == 15, step_s=10)


async def test_one_message_that_fails_again_and_again_opens_nothing(rig, job):
    bank = Bank()
    async with rig.run(worker(job, bank, retry=Retry(immediate=20, delays_s=()))) as app:
        await publish(app, job, 1)
        await rig.buried()
        assert len(bank.asked) == 21
        assert kinds(rig) == []


async def test_a_message_that_is_handled_between_keeps_it_closed(rig, job):
    service, seen = Service("worker"), []

    @service.handle(retry=ONCE, breaker=Breaker(messages=3, pause_s=30), concurrency=1)
    async def work(message: job) -> None:
        seen.append(message.number)
        if message.number % 3:
            raise OSError("now and then")

    async with rig.run(service) as app:
        await publish(app, job, 30)
        await rig.buried(20)
        assert sorted(seen) == list(range(30))
        assert kinds(rig) == []


@pytest.mark.parametrize("error", [RejectError("no such account"), KeyError("of the message")])
async def test_errors_that_are_about_the_message_do_not_count(rig, job, error):
    service = Service("worker")

    @service.handle(retry=ONCE, breaker=Breaker(messages=3, pause_s=30, on=(OSError,)))
    async def work(message: job) -> None:
        raise error

    async with rig.run(service) as app:
        await publish(app, job, 10)
        await rig.buried(10)
        assert kinds(rig) == []


async def test_order_per_key_holds_through_an_outage(rig, clock):
    job, bank = declare(Stream("log", key="key")), Bank()
    async with rig.run(worker(job, bank, breaker=Breaker(messages=2, pause_s=30), retry=Retry(immediate=0))) as app:
        await app.publish_all([job(f"key-{number % 4}", number) for number in range(24)])
        await until(lambda: kinds(rig) == ["paused"])
        await clock.advance(90)
        bank.away = False
        await rig.pass_time(lambda: len(bank.done) == 24, step_s=5)
        for key in range(4):
            of_key = [number for number in bank.done if number % 4 == key]
            assert of_key == sorted(of_key)
        assert await rig.dead() == []


async def test_what_waits_behind_a_parked_message_takes_no_try(rig, clock):
    job, bank = declare(Stream("log", key="key")), Bank()
    async with rig.run(worker(job, bank, breaker=Breaker(messages=1, pause_s=30), retry=Retry(immediate=0))) as app:
        await app.publish_all([job("a", number) for number in range(50)])
        await app.publish(job("b", 50))
        await until(lambda: kinds(rig) == ["paused"])
        bank.away = False
        await clock.advance(31)
        await until(lambda: bank.done)


async def test_a_batch_waits_as_a_whole(rig, clock):
    job, bank, sizes = declare(Queue("jobs")), Bank(), []
    service = Service("worker")

    @service.handle(batch=Batch(size=10), breaker=Breaker(messages=3, pause_s=30), retry=ONCE)
    async def work(found: list[job]) -> None:
        sizes.append(len(found))
        for message in found:
            await bank.ask(message)

    async with rig.run(service) as app:
        await publish(app, job, 30)
        await until(lambda: kinds(rig) == ["paused"])
        await until(lambda: rig.parked() == 7)
        before = len(bank.asked)
        await clock.advance(30)
        await until(lambda: rig.parked() == 17)
        assert len(bank.asked) == before + 1, "not one by one"
        bank.away = False
        await rig.pass_time(lambda: len(bank.done) == 27, step_s=10)
        assert len(await rig.dead()) == 3


async def test_a_stop_while_it_is_open_loses_nothing(file_rig, job, clock):
    bank = Bank()
    async with file_rig.run(worker(job, bank, concurrency=1)) as app:
        await publish(app, job, 20)
        await until(lambda: kinds(file_rig) == ["paused"])
    bank.away = False
    async with file_rig.run(worker(job, bank, concurrency=1)):
        await file_rig.pass_time(lambda: len(bank.done) == 15, step_s=10)
        assert len(await file_rig.dead()) == 5


@pytest.mark.parametrize(
    "given", [{"messages": 0}, {"pause_s": 0}, {"pause_s": -1.0}, {"on": OSError}, {"on": (1,)}, {"on": (SystemExit,)}]
)
def test_a_breaker_that_makes_no_sense_is_refused(given):
    with pytest.raises(DefinitionError, match="E120"):
        Breaker(**given)
