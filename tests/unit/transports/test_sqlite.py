"""What is particular to the file: Apps that share it in one process, and how much it has to look at."""

import asyncio
from datetime import timedelta

import apsw
import pytest

from tests.unit.rig import until
from trunkline import App, Context, Queue, Retry, Service, Stream, Struct
from trunkline.engine import query
from trunkline.engines import LOG_BYTES, _grow_log
from trunkline.errors import ConfigurationError, TransportError
from trunkline.transports.sqlite.tables import FREE, SCHEMA, log_place, position_before

entries = Stream("shared-entries", key="lane")
errands = Queue("shared-errands")


@entries.event
class Entry(Struct):
    lane: str
    number: int


@errands.command
class Errand(Struct):
    number: int


async def test_two_apps_of_a_process_write_in_one_group_and_each_hears_of_the_other(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    first, second, seen, ran = Service("first"), Service("second"), [], []

    @first.handle
    async def note(entry: Entry) -> None:
        seen.append(entry.number)

    @second.handle
    async def run(errand: Errand) -> None:
        ran.append(errand.number)

    async with App(first, url) as one, App(second, url) as two:
        for round_number in range(20):
            # Submitted in one turn of the loop, so they are written in one group.
            await asyncio.gather(
                one.publish(Entry("a", 2 * round_number)),
                two.publish(Entry("a", 2 * round_number + 1)),
                one.send(Errand(2 * round_number)),
                two.send(Errand(2 * round_number + 1)),
            )
        async with asyncio.timeout(10):
            while len(seen) < 40 or len(ran) < 40:
                await asyncio.sleep(0.005)
    assert seen == list(range(40))
    assert sorted(ran) == list(range(40))


@pytest.mark.parametrize("last", [0, 1])
async def test_positions_go_on_from_those_of_another_app_in_the_same_group(tmp_path, last):
    url = f"sqlite:///{tmp_path}/positions.db"
    async with App(Service("first"), url) as one, App(Service("second"), url) as two:
        await (one, two)[last].publish(Entry("a", 0))  # it knows where the file goes on, the other does not
        await asyncio.gather(one.publish(Entry("a", 1)), two.publish(Entry("a", 2)))
        positions = query(one.transport.engine.reader, "SELECT place & 0xffffffffff FROM trunkline_log")
    assert positions == [(1,), (2,), (3,)]


async def test_what_is_due_is_found_without_looking_at_what_waits_behind(tmp_path):
    async with App(Service("anyone"), f"sqlite:///{tmp_path}/plan.db") as app:
        reader = app.store.engine.reader
        plan = query(
            reader,
            "EXPLAIN QUERY PLAN SELECT seq FROM trunkline_parked WHERE reader = 1 AND head ORDER BY due",
        )
    assert "trunkline_parked_head_due" in plan[0][3]
    assert not any("TEMP B-TREE" in row[3] for row in plan)


async def test_positions_of_a_stream_go_on_after_all_of_it_was_trimmed(tmp_path, clock):
    url = f"sqlite:///{tmp_path}/trimmed.db"
    entries.retention_s = 10.0
    try:
        async with App(Service("anyone"), url, clock=clock) as app:
            await app.publish_all([Entry("a", number) for number in range(5)])
            await clock.advance(60.0)
            await app.transport.tidy()
            assert query(app.transport.engine.reader, "SELECT place & 0xffffffffff FROM trunkline_log") == [(5,)]
            await app.publish(Entry("a", 5))
            assert query(app.transport.engine.reader, "SELECT max(place) & 0xffffffffff FROM trunkline_log") == [(6,)]
    finally:
        entries.retention_s = None


async def test_a_replay_from_a_time_that_was_trimmed_begins_with_what_is_left(tmp_path, clock):
    url, begin = f"sqlite:///{tmp_path}/replay.db", clock.utc() + timedelta(seconds=30)
    replay, seen = Service("replay"), []

    @replay.handle(start=begin)
    async def note(entry: Entry) -> None:
        seen.append(entry.number)

    entries.retention_s = 10.0
    try:
        async with App(Service("anyone"), url, clock=clock) as app:
            await app.publish_all([Entry("a", number) for number in range(5)])
            await clock.advance(60.0)
            await app.publish_all([Entry("a", number) for number in range(5, 8)])
            await app.transport.tidy()
        async with App(replay, url, clock=clock):
            await until(lambda: len(seen) >= 3)
    finally:
        entries.retention_s = None
    assert seen == [5, 6, 7]


def test_a_time_is_found_in_a_long_log_by_looking_at_few_rows():
    connection = apsw.Connection(":memory:")
    connection.execute(SCHEMA)
    rows = ((log_place(7, number), 0, number // 10, b"") for number in range(1, 100_001))
    connection.executemany("INSERT INTO trunkline_log VALUES (?, ?, ?, ?)", rows)
    looks = []
    connection.set_exec_trace(lambda _, sql, bindings: looks.append(sql) or True)
    assert position_before(connection, 7, 100_000, 5_000) == 49_999
    assert position_before(connection, 7, 100_000, 0) == 0
    assert position_before(connection, 7, 100_000, 10_001) == 100_000
    assert len(looks) < 60


async def test_the_log_has_its_length_from_the_start_and_the_file_is_sound(tmp_path, caplog):
    path = tmp_path / "grown.db"
    async with App(Service("anyone"), f"sqlite:///{path}") as app:
        log = path.with_name("grown.db-wal")
        assert log.stat().st_size >= LOG_BYTES
        await app.publish_all([Entry("a", number) for number in range(100)])
        assert query(app.transport.engine.reader, "PRAGMA integrity_check") == [("ok",)]
        assert query(app.transport.engine.reader, "SELECT count(*) FROM trunkline_log") == [(100,)]
    assert not caplog.records
    _grow_log(tmp_path / "missing" / "x-wal")
    assert "commits are slower until it has grown" in caplog.text


OWNED = {
    "partitions": "SELECT count(*) FROM trunkline_partition WHERE owner NOTNULL",
    "queued": f"SELECT count(*) FROM trunkline_queue WHERE holder > {FREE}",
    "members": "SELECT count(*) FROM trunkline_member",
    "holds": "SELECT count(*) FROM trunkline_hold",
}


def owned(app: App) -> dict[str, int]:
    return {what: query(app.transport.engine.reader, sql)[0][0] for what, sql in OWNED.items()}


def busy_services(free: asyncio.Event) -> tuple[Service, Service]:
    """One that stays with its errands until `free`, and one that only reads entries."""
    first, second = Service("first"), Service("second")

    @first.handle
    async def run(errand: Errand) -> None:
        await free.wait()

    @first.handle
    async def keep(entry: Entry) -> None: ...

    @second.handle
    async def note(entry: Entry) -> None: ...

    return first, second


async def test_an_app_that_stops_gives_back_nothing_of_another_in_its_process(tmp_path):
    url, free = f"sqlite:///{tmp_path}/two.db", asyncio.Event()
    first, second = busy_services(free)
    async with App(first, url) as one:
        await one.publish_all([Errand(number) for number in range(3)])
        before = owned(one)
        assert before == {"partitions": entries.partitions, "queued": 3, "members": 1, "holds": 1}
        async with App(second, url):
            assert owned(one) == before | {"partitions": 2 * entries.partitions, "members": 2}
        assert owned(one) == before
        free.set()


@pytest.mark.parametrize("other", ["first", "second"])
async def test_an_app_that_is_refused_gives_back_nothing_of_the_one_that_runs(tmp_path, other):
    url, free, rival = f"sqlite:///{tmp_path}/refused.db", asyncio.Event(), Service(other)

    @rival.handle
    async def run_too(errand: Errand) -> None: ...

    async with App(busy_services(free)[0], url) as one:
        await one.publish_all([Errand(number) for number in range(3)])
        before = owned(one)
        with pytest.raises(ConfigurationError, match="E220 queue 'shared-errands' is read already"):
            await App(rival, url).start()
        assert owned(one) == before
        free.set()


async def test_an_app_that_stops_leaves_the_parked_messages_that_another_runs(tmp_path, clock):
    url, free, service, tries = f"sqlite:///{tmp_path}/parked.db", asyncio.Event(), Service("first"), []

    @service.handle(retry=Retry(immediate=0, delays_s=(10.0,), jitter=0))
    async def run(errand: Errand, ctx: Context) -> None:
        tries.append(ctx.attempt)
        if ctx.attempt == 0:
            raise ConnectionError("away")
        await free.wait()

    async with App(Service("anyone"), url, clock=clock) as last:
        taken = "SELECT count(owner), count(*) FROM trunkline_parked"
        async with App(service, url, clock=clock, grace_s=0.0) as one:
            await one.send(Errand(1))
            await until(lambda: query(one.store.engine.reader, taken) == [(0, 1)])
            await clock.advance(20.0)
            await until(lambda: tries == [0, 1])
            async with App(Service("second"), url, clock=clock):
                pass
            assert query(one.store.engine.reader, taken) == [(1, 1)]
        # Unfinished when its own App stopped.
        assert query(last.store.engine.reader, taken) == [(0, 1)]
        free.set()
        async with App(service, url, clock=clock) as one:
            await until(lambda: query(last.store.engine.reader, taken) == [(0, 0)])
            assert not one.store._parked.rows


async def test_of_two_apps_of_a_process_one_relays_a_channel_and_keeps_what_it_took(tmp_path, clock):
    url = f"sqlite:///{tmp_path}/outbox.db"
    async with App(Service("first"), url, clock=clock) as one, App(Service("second"), url, clock=clock) as two:
        for app in (one, two):
            app._relaying.cancel()  # this test relays
        await one.schedule(Errand(1), timedelta(seconds=5))
        await clock.advance(6.0)
        channels = {errands.name}
        rows, _ = await one.store.outbox_due(channels, clock.now(), 10)
        assert len(rows) == 1
        assert (await two.store.outbox_due(channels, clock.now(), 10))[0] == []
        assert (await one.store.outbox_due(channels, clock.now(), 10))[0] == rows  # sending failed: again
        await two.store.engine.run(two.store._give_back)
        assert (await two.store.outbox_due(channels, clock.now(), 10))[0] == []
        await one.store.engine.run(one.store._give_back)
        one.store._outbox.rows.clear()
        assert (await two.store.outbox_due(channels, clock.now(), 10))[0] == rows
        await two.store.outbox_sent([row.number for row in rows])
        assert not two.store._outbox.rows


async def test_a_file_that_somebody_keeps_locked_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("trunkline.engine.OPEN_WAIT_S", 0.05)
    path = tmp_path / "locked.db"
    async with App(Service("first"), f"sqlite:///{path}"):
        pass
    other = apsw.Connection(str(path))
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TransportError, match="E504"):
        await App(Service("second"), f"sqlite:///{path}").start()


async def test_the_look_at_who_holds_the_transaction_may_come_before_the_handler_has_it(tmp_path):
    async with App(Service("one"), f"sqlite:///{tmp_path}/shared.db") as app:
        engine, looked = app.transport.engine, []

        def look() -> None:
            if engine._phase == "held":
                engine._tell_held()
                looked.append(engine._held_by)
            else:
                asyncio.get_running_loop().call_soon(look)

        look()
        await engine.acquire("a handler")
        engine.release(None, None)
        assert looked == [""], "it had not yet been told that it has it"
