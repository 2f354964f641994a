"""Messages that wait in the store's file because it was the transport before."""

import pytest

from tests.unit.rig import until
from trunkline import App, Queue, Service, Stream, Struct, Topic

orders = Stream("left-orders", key="order_id")
jobs = Queue("left-jobs")
news = Topic("left-news")


@orders.event
class Ordered(Struct):
    order_id: str


@jobs.command
class Job(Struct):
    number: int


@news.event
class News(Struct):
    text: str


def desk(handled: list) -> Service:
    service = Service("desk")

    @service.handle
    async def order(event: Ordered) -> None:
        handled.append(event)

    @service.handle
    async def job(command: Job) -> None:
        handled.append(command)

    @service.handle
    async def read(event: News) -> None:
        handled.append(event)

    return service


@pytest.fixture
async def file(tmp_path) -> str:
    """A file that was the transport and in which four messages wait for a service that has run."""
    url = f"sqlite:///{tmp_path}/shop.db"
    async with App(desk([]), url):
        pass
    async with App(Service("outside"), url) as app:
        await app.publish_all([Ordered("1"), Ordered("2"), Job(1), News("a")])
    return url


async def test_a_start_on_another_transport_warns_of_what_waits_in_the_file(file, caplog):
    async with App(desk([]), "memory:", store=file):
        pass
    (said,) = [record.getMessage() for record in caplog.records if "still holds" in record.getMessage()]
    assert "shop.db still holds 4 messages of its own transport: left-jobs 1, desk@left-news 1, desk@left-ord" in said
    assert "--transport until its backlog is 0" in said


async def test_a_start_on_the_file_itself_handles_it_and_then_nobody_warns(file, caplog):
    handled = []
    async with App(desk(handled), file):
        await until(lambda: len(handled) == 4)
    async with App(desk([]), "memory:", store=file):
        pass
    assert "still holds" not in caplog.text


async def test_a_store_that_was_never_a_transport_is_silent(tmp_path, caplog):
    async with App(desk([]), "memory:", store=f"sqlite:///{tmp_path}/new.db"):
        pass
    assert "still holds" not in caplog.text
