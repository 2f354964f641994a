"""Stopping and being taken over: nothing is lost, nothing is dead, nothing is done twice."""

import asyncio
import signal

from tests.faults import file
from tests.faults.processes import Process, until
from tests.faults.slow import SlowJob, worker
from trunkline import App, Service
from trunkline.transports.sqlite.tables import FREE


async def publish(url: str, *jobs: SlowJob) -> None:
    async with App(Service("slow-publisher"), url) as app:
        for job in jobs:
            await app.send(job)


def done(path) -> list[int]:
    return sorted(row[0] for row in file.rows(path, "SELECT number FROM effect"))


async def test_sigterm_finishes_what_has_begun_and_leaves_the_rest(tmp_path):
    path = tmp_path / "slow.db"
    url = f"sqlite:///{path}"
    await publish(url, *(SlowJob(number, 1.0) for number in range(500)))
    with Process("tests.faults.slow", [url], tmp_path / "log") as process:
        await asyncio.to_thread(process.wait_line, "begun 0")
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == 0
    finished = done(path)
    assert 0 in finished, "what had begun is finished"
    assert len(finished) < 500, "what had not begun is left for later"
    assert file.backlog(path) == 500 - len(finished)
    assert file.number(path, "SELECT count(*) FROM trunkline_dead_letter") == 0
    assert file.number(path, f"SELECT count(*) FROM trunkline_queue WHERE holder != {FREE} OR suspect") == 0


async def test_a_second_signal_stops_at_once_and_the_message_comes_again(tmp_path):
    path = tmp_path / "slow.db"
    url = f"sqlite:///{path}"
    await publish(url, SlowJob(1, 25.0))
    with Process("tests.faults.slow", [url], tmp_path / "log") as process:
        await asyncio.to_thread(process.wait_line, "begun 1")
        process.signal(signal.SIGTERM)
        await asyncio.to_thread(
            until, lambda: "a second one" in process.log.read_text() or not process.alive(), "it stops"
        )
        process.signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait) == -signal.SIGTERM
    assert done(path) == []
    with Process("tests.faults.slow", [url], tmp_path / "log2") as process:
        await asyncio.to_thread(process.wait_line, "begun 1")


async def test_a_process_that_was_taken_over_commits_nothing_more(tmp_path):
    path = tmp_path / "slow.db"
    url = f"sqlite:///{path}?lease_s=3"
    await publish(url, SlowJob(1, 3.0))
    with Process("tests.faults.slow", [url], tmp_path / "log") as process:
        await asyncio.to_thread(process.wait_line, "begun 1")
        process.signal(signal.SIGSTOP)
        async with App(worker, url):
            await asyncio.to_thread(until, lambda: done(path) == [1], "another process takes over", 30)
            process.signal(signal.SIGCONT)
            assert await asyncio.to_thread(process.wait) != 0, "it must not go on as if nothing had happened"
        assert "E505" in process.log.read_text()
    assert done(path) == [1], "the late commit was refused"
    assert file.number(path, "SELECT count(*) FROM trunkline_dead_letter") == 0
