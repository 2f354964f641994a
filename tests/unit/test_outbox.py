"""The relay between a store and a transport that are not the same."""

import json

import pytest

from tests.unit.rig import until
from trunkline import App, Message, Queue, Service, Struct
from trunkline.errors import ConfigurationError, PublishError, StoreFullError, TransportError
from trunkline.message import pack
from trunkline.outbox import REFUSED_AGAIN_S


@pytest.fixture
def job():
    queue = Queue("outbox-jobs")

    @queue.command(type="job")
    class Job(Struct):
        number: int

    return Job


def listening(*types):
    """Return a service that takes messages of these types, and the list of the numbers that it was handed."""
    service, seen = Service("worker"), []

    for cls in types:

        @service.handle
        async def note(message: cls) -> None:
            seen.append(message.number)

    return service, seen


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
    service, seen = listening(job)

    async def check(picky) -> None:
        await until(lambda: seen == [1, 3])
        assert "refuses outbox row 2 for outbox-jobs" in caplog.text
        picky.refuse = lambda _data: None
        await clock.advance(REFUSED_AGAIN_S)
        await until(lambda: seen == [1, 3, 2])

    await run(service, job, tmp_path, clock, second(error), check)


async def test_while_the_broker_does_not_answer_everything_waits_in_order(job, tmp_path, clock):
    service, seen = listening(job)

    async def check(picky) -> None:
        picky.refuse = lambda _data: None
        await clock.advance(1.0)
        await until(lambda: seen == [1, 2, 3])

    await run(service, job, tmp_path, clock, lambda _data: TransportError("E520", "down"), check)


class Partly:
    """A transport's `send` that takes what it can of a batch, and says what not."""

    def __init__(self, transport, refuse) -> None:
        self._send = transport.send
        self.refuse = refuse
        self.tried: list[int] = []
        transport.send = self.send

    async def send(self, batch) -> None:
        self.tried += [json.loads(staged.message.data)["number"] for staged in batch]
        refused = {id(staged): error for staged in batch if (error := self.refuse(staged)) is not None}
        await self._send([staged for staged in batch if id(staged) not in refused])
        if refused:
            error = next(iter(refused.values()))
            error.fields["unsent"] = [staged for staged in batch if id(staged) in refused]
            raise error


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/store.db"


async def relayed(service, store, clock, refuse, payloads, check) -> None:
    async with App(service, "memory:", store=store, clock=clock) as app:
        app.store._place = None  # a store in memory sends by itself, where the channels are in memory too
        partly = Partly(app.transport, refuse)
        async with app.running(service).unit_of_work() as unit:
            for payload in payloads:
                unit.publish(payload)
        await check(partly)


async def test_what_the_broker_has_confirmed_of_a_batch_that_failed_is_not_sent_again(job, store, clock):
    service, seen = listening(job)

    async def check(partly) -> None:
        await until(lambda: seen == [1, 3])
        partly.refuse = lambda _staged: None
        await clock.advance(1.0)
        await until(lambda: seen == [1, 3, 2])
        assert partly.tried == [1, 2, 3, 2]

    def refuse(staged):
        return TransportError("E521", "not confirmed") if staged.message.data == b'{"number":2}' else None

    await relayed(service, store, clock, refuse, [job(1), job(2), job(3)], check)


@pytest.mark.parametrize(
    ("error", "tries"), [(StoreFullError("E502", "no room"), 3), (TransportError("E521", "not confirmed"), 2)]
)
async def test_a_channel_that_takes_nothing_keeps_its_order_and_holds_back_no_other(
    job, store, clock, monkeypatch, error, tries
):
    monkeypatch.setattr("trunkline.outbox.BATCH", 3)  # the first batches are all for the full one
    small = Queue("outbox-small")

    @small.command(type="small")
    class Small(Struct):
        number: int

    service, seen = listening(job, Small)

    async def check(partly) -> None:
        await until(lambda: seen == [8, 9])
        await clock.advance(1.0)
        await until(lambda: partly.tried.count(1) >= tries)
        partly.refuse = lambda _staged: None
        await clock.advance(1.0)
        await until(lambda: seen == [8, 9, 1, 2, 3, 4, 5])
        assert (partly.tried.count(8), partly.tried.count(9)) == (1, 1)

    def refuse(staged):
        return error if staged.channel is small else None

    payloads = [*map(Small, range(1, 6)), job(8), job(9)]
    await relayed(service, store, clock, refuse, payloads, check)


async def test_a_channel_without_room_and_a_message_too_large_hold_back_no_other(job, store, clock, caplog):
    full = Queue("outbox-full")

    @full.command(type="full")
    class Full(Struct):
        number: int

    service, seen = listening(job, Full)

    async def check(partly) -> None:
        await until(lambda: seen == [7])
        assert "refuses outbox row" in caplog.text
        partly.refuse = lambda _staged: None
        await clock.advance(1.0)
        await until(lambda: seen == [7, 1, 2])
        await clock.advance(REFUSED_AGAIN_S)
        await until(lambda: seen == [7, 1, 2, 6])

    def refuse(staged):
        if staged.channel is full:
            return StoreFullError("E502", "no room")
        return PublishError("E313", "too large") if staged.message.data == b'{"number":6}' else None

    await relayed(service, store, clock, refuse, [Full(1), job(6), Full(2), job(7)], check)


async def test_what_waits_for_other_channels_is_not_looked_at_again_and_again(job, tmp_path, clock):
    url = f"sqlite:///{tmp_path}/store.db"
    async with App(Service("sender"), "memory:", store=url, clock=clock) as app:
        engine, rows, looked = app.store.engine, 5000, []
        event = pack(Message("m-1", "gone", "elsewhere", b"{}", 0.0))
        sql = "INSERT INTO trunkline_outbox (due, channel, event) VALUES (0, ?, ?)"
        await engine.run(lambda c: c.executemany(sql, [*[("taken-away", event)] * rows, ("outbox-jobs", event)]))
        for connection in (engine.reader, engine._writer):
            connection.set_progress_handler(lambda: bool(looked.append(1)), 1)  # each step of SQLite's machine
        (row,), _ = await app.store.outbox_due(["outbox-jobs"], clock.now(), 500)
        for connection in (engine.reader, engine._writer):
            connection.set_progress_handler(None)
        assert row.channel == "outbox-jobs"
        assert len(looked) < rows
