"""Stopping an App more than once."""

import asyncio
from datetime import timedelta

import pytest

from trunkline import App, Queue, Service, Struct
from trunkline.errors import TransportError

late = Queue("late")


@late.command
class Late(Struct):
    number: int


@pytest.mark.parametrize("url", ["memory:", "sqlite:///{}/stop.db"])
async def test_a_second_stop_does_nothing(url, tmp_path):
    async with App(Service("idle"), url.format(tmp_path)) as app:
        await asyncio.gather(app.stop(), app.stop())
        await app.stop()


async def test_stopping_what_never_started_does_nothing():
    await App(Service("idle"), "memory:").stop()


async def test_what_fails_while_it_starts_and_never_ends_starting_is_raised(monkeypatch):
    monkeypatch.setattr("trunkline.app.START_S", 0.01)
    app = App(Service("idle"), "memory:")

    async def start():
        app._fail(RuntimeError("the disk is gone"))
        await asyncio.Event().wait()

    app.start = start
    with pytest.raises(RuntimeError, match="the disk is gone"):
        await app.serve()


both = pytest.mark.parametrize("url", ["memory:", "sqlite:///{}/stop.db"])


@both
async def test_what_is_published_before_the_start_or_after_the_stop_is_refused(url, tmp_path):
    service = Service("late")
    app = App(service, url.format(tmp_path))

    async def unit():
        async with app.running(service).unit_of_work() as unit:
            unit.publish(Late(1))

    for call in (app.publish, app.send):
        with pytest.raises(TransportError, match=r"E520 .*before the start"):
            await call(Late(1))
    async with app:
        await app.publish(Late(1))
        running = app.running(service)
    for refused in (app.publish(Late(1)), app.publish_all([Late(1)]), app.schedule(Late(1), timedelta(1)), unit()):
        with pytest.raises(TransportError, match=r"E520 .*after the stop"):
            await refused
    with pytest.raises(TransportError, match=r"E520 .*after the stop"):
        await running.publish(Late(1))


@both
async def test_those_who_publish_while_it_stops_are_told(url, tmp_path):
    app = App(Service("late"), url.format(tmp_path))
    await app.start()

    async def publish():
        while True:
            await app.publish(Late(1))
            await asyncio.sleep(0)

    publishers = [asyncio.create_task(publish()) for _ in range(5)]
    await asyncio.sleep(0)
    await app.stop()
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*publishers, return_exceptions=True)
    assert {end.code for end in ends} == {"E520"}


async def test_a_unit_of_work_that_ends_after_the_stop_is_refused(tmp_path):
    service = Service("late")
    app = App(service, f"sqlite:///{tmp_path}/stop.db")
    await app.start()

    async def unit():
        async with app.running(service).unit_of_work() as unit:
            unit.publish(Late(1))
            await app.stop()

    with pytest.raises(TransportError, match=r"E520 .*after the stop"):
        await unit()


async def test_a_unit_of_work_that_outlives_its_app_gives_the_transaction_back(tmp_path):
    service = Service("late")
    service.schema("CREATE TABLE note (number INTEGER)")
    async with App(service, f"sqlite:///{tmp_path}/stop.db") as app:

        async def unit():
            async with app.running(service).unit_of_work() as unit:
                await (await unit.transaction()).execute("INSERT INTO note VALUES (1)")
                app._is_up = False  # as while it stops

        with pytest.raises(TransportError, match="E520"):
            await unit()
        app._is_up = True
        async with asyncio.timeout(10):
            await app.publish(Late(1))  # nobody holds the file
