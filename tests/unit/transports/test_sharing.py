"""Partitions of a Stream that move between processes: nothing is passed over, nothing stays unread.

Another process is played by its rows: it reads a share of the partitions until its row as a member is removed.
"""

import asyncio

import apsw
import pytest

from tests.unit.rig import until
from trunkline import App, Context, Retry, Service, Stream, Struct
from trunkline.engine import query

shared = Stream("sharing-events", key="lane", partitions=2)
HERE, THERE = "lane-4", "lane-0"  # of the two partitions, the second is the other process's share
OTHER = 1_000_000


@shared.event
class Shared(Struct):
    lane: str
    number: int


class Other:
    """Another process that reads the subscription."""

    def __init__(self, app: App) -> None:
        self.transport = app.transport
        (self.reader,) = app.transport._readers.values()

    async def join(self) -> None:
        row = (self.reader.number, OTHER)
        await self._change(lambda c: c.execute("INSERT INTO trunkline_member VALUES (?, ?)", row))

    async def go(self) -> None:
        await self._change(lambda c: c.execute("DELETE FROM trunkline_member WHERE owner = ?", (OTHER,)))

    async def _change(self, change) -> None:
        await self.transport.engine.run(change)
        self.transport.foreign_change()  # what the engine does when another process has committed


def partition_of(app: App, lane: str) -> int:
    rows = query(app.transport.engine.reader, "SELECT partition, event FROM trunkline_log")
    return next(partition for partition, event in rows if lane.encode() in event)


@pytest.fixture
def handled() -> list[tuple[str, int]]:
    return []


async def test_a_partition_that_stays_after_all_is_read_on_where_it_was_left(tmp_path, handled):
    service, free = Service("sharer"), asyncio.Event()

    @service.handle
    async def handle(event: Shared) -> None:
        if event.number == 0:
            await free.wait()
        handled.append((event.lane, event.number))

    async with App(service, f"sqlite:///{tmp_path}/stay.db") as app:
        other = Other(app)
        await app.publish_all([Shared(HERE, 0), Shared(THERE, 0)])
        assert {partition_of(app, HERE), partition_of(app, THERE)} == {0, 1}
        await other.join()
        await until(lambda: other.reader.leaving == {1})
        # It cannot leave, for a message of it is still in its handler; what comes now is passed over.
        await app.publish_all([Shared(HERE, 1), Shared(THERE, 1)])
        await other.go()
        await until(lambda: not other.reader.leaving)
        await app.publish_all([Shared(HERE, 2), Shared(THERE, 2)])
        free.set()
        await until(lambda: len(handled) == 6)
    for lane in (HERE, THERE):
        assert [number for name, number in handled if name == lane] == [0, 1, 2]


async def test_messages_parked_in_a_partition_that_comes_back_are_run(tmp_path, handled, clock):
    service = Service("sharer")

    @service.handle(retry=Retry(immediate=0, delays_s=(10.0,), jitter=0))
    async def handle(event: Shared, ctx: Context) -> None:
        if ctx.attempt == 0:
            raise ConnectionError("away")
        handled.append((event.lane, event.number))

    async with App(service, f"sqlite:///{tmp_path}/parked.db", clock=clock) as app:
        other = Other(app)
        await app.publish_all([Shared(HERE, 0), Shared(THERE, 0)])
        parked = "SELECT count(*) FROM trunkline_parked"
        await until(lambda: query(app.transport.engine.reader, parked) == [(2,)])
        await other.join()
        await clock.advance(1.0)
        await until(lambda: set(other.reader.partitions) == {0})
        await clock.advance(20.0)
        await until(lambda: len(handled) == 1)
        await other.go()
        await clock.advance(1.0)
        await until(lambda: set(other.reader.partitions) == {0, 1})
        await until(lambda: len(handled) == 2)


async def test_suspects_given_back_unhandled_are_suspects_still(tmp_path, handled):
    service, free = Service("sharer"), asyncio.Event()

    @service.handle
    async def handle(event: Shared) -> None:
        await free.wait()
        handled.append((event.lane, event.number))

    url = f"sqlite:///{tmp_path}/suspects.db"
    async with App(service, url, grace_s=0.0) as app:
        await app.publish(Shared(THERE, 0))
        other = Other(app)
        # As if a process had died over it.
        await other._change(lambda c: c.execute("UPDATE trunkline_partition SET suspect = 1"))
    async with App(service, url, grace_s=0.0) as app:
        attempts = "SELECT count(*) FROM trunkline_attempt"
        await until(lambda: query(app.transport.engine.reader, attempts) == [(1,)])
    free.set()
    async with App(service, url) as app:
        await until(lambda: handled)
        await until(lambda: query(app.transport.engine.reader, attempts) == [(0,)])


def hold_rows(path, table: str) -> None:
    """Let a process that died long ago own what `table` has."""
    connection = apsw.Connection(str(path))
    connection.execute(f"INSERT INTO trunkline_process VALUES ({OTHER}, 1, 0, 0)")
    connection.execute(f"UPDATE {table} SET owner = {OTHER}")
    connection.close()


async def test_a_file_that_was_once_a_store_too_is_taken_over_by_a_process_that_only_has_channels_there(
    tmp_path, handled
):
    service, channels = Service("sharer"), tmp_path / "channels.db"

    @service.handle
    async def handle(event: Shared) -> None:
        handled.append((event.lane, event.number))

    async with App(Service("anyone"), f"sqlite:///{channels}") as app:  # its store is the same file
        await app.publish(Shared(HERE, 0))
    store = f"sqlite:///{tmp_path}/store.db"
    async with App(service, f"sqlite:///{channels}", store=store):
        await until(lambda: handled)
    hold_rows(channels, "trunkline_partition")
    async with App(service, f"sqlite:///{channels}", store=store) as app:
        await app.publish(Shared(HERE, 1))
        await until(lambda: len(handled) == 2)


async def test_what_a_process_cannot_give_back_it_leaves_to_one_that_can(tmp_path):
    channels = tmp_path / "channels.db"
    service = Service("sharer")

    @service.handle(retry=Retry(immediate=0, delays_s=(1000.0,)))
    async def refuse(event: Shared) -> None:
        raise ConnectionError("away")

    parked = "SELECT owner FROM trunkline_parked"
    async with App(service, f"sqlite:///{channels}") as app:
        await app.publish(Shared(HERE, 0))
        await until(lambda: query(app.transport.engine.reader, parked) == [(None,)])
    hold_rows(channels, "trunkline_parked")
    async with App(service, f"sqlite:///{channels}", store=f"sqlite:///{tmp_path}/store.db") as app:
        await app.transport.engine.sweep()
        assert query(app.transport.engine.reader, parked) == [(OTHER,)]
    async with App(service, f"sqlite:///{channels}") as app:
        await app.transport.engine.sweep()
        assert query(app.transport.engine.reader, parked) == [(None,)]
