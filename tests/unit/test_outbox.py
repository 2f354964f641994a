"""The relay between a store and a transport that are not the same."""

import pytest

from tests.unit.rig import until
from trunkline import App, Queue, Service, Struct
from trunkline.errors import ConfigurationError, PublishError, TransportError
from trunkline.outbox import REFUSED_AGAIN_S


@pytest.fixture
def job():
    queue = Queue("outbox-jobs")

    @queue.command(type="job")
    class Job(Struct):
        number: int

    return Job


class Picky:
    """A transport's `send` that refuses some messages, for good or for now."""

    def __init__(self, transport, refuse) -> None:
        self._send = transport.send
        self.refuse = refuse
        transport.send = self.send

    async def send(self, batch) -> None:
        for staged in batch:
            if (error := self.refuse(staged.message.data)) is not None:
                raise error
        await self._send(batch)


def second(error):
    """Refuse the second message."""
    return lambda data: error if data == b'{"number":2}' else None


async def run(service, job, tmp_path, clock, refuse, check) -> None:
    async with App(service, "memory:", store=f"sqlite:///{tmp_path}/store.db", clock=clock) as app:
        picky = Picky(app.transport, refuse)
        async with app.running(service).unit_of_work() as unit:
            for number in (1, 2, 3):
                unit.publish(job(number))
        await check(picky)


@pytest.mark.parametrize(
    "error", [PublishError("E313", "too large"), ConfigurationError("E207", "its channel exists otherwise")], ids=str
)
async def test_a_message_the_broker_refuses_waits_and_stands_in_nobodys_way(job, tmp_path, clock, caplog, error):
    seen: list[int] = []
    service = Service("worker")

    @service.handle
    async def work(job: job) -> None:
        seen.append(job.number)

    async def check(picky) -> None:
        await until(lambda: seen == [1, 3])
        assert "refuses outbox row 2 for outbox-jobs" in caplog.text
        picky.refuse = lambda _data: None
        await clock.advance(REFUSED_AGAIN_S)
        await until(lambda: seen == [1, 3, 2])

    await run(service, job, tmp_path, clock, second(error), check)


async def test_while_the_broker_does_not_answer_everything_waits_in_order(job, tmp_path, clock):
    seen: list[int] = []
    service = Service("worker")

    @service.handle
    async def work(job: job) -> None:
        seen.append(job.number)

    async def check(picky) -> None:
        picky.refuse = lambda _data: None
        await clock.advance(1.0)
        await until(lambda: seen == [1, 2, 3])

    await run(service, job, tmp_path, clock, lambda _data: TransportError("E520", "down"), check)
