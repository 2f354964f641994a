"""What is particular to the file: Apps that share it in one process, and how much it has to look at."""

import asyncio

import pytest

from trunkline import App, Queue, Service, Stream, Struct
from trunkline.engine import query
from trunkline.engines import LOG_BYTES, _grow_log

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
