"""Lanes: one key in order, other keys beside it, no task for what never waits."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.rig import until
from trunkline import Stream
from trunkline.lanes import NOTHING, Ended, Lanes, Resume, new_driver
from trunkline.transport import Delivery, Subscription

SUBSCRIPTION = Subscription("lanes", Stream("lanes-test"))


def delivery(key, position):
    return Delivery(SUBSCRIPTION, None, b"", key, position, 0)


class Recorder:
    def __init__(self, suspensions):
        self.suspensions = suspensions
        self.running: dict[str, int] = {}
        self.most = 0
        self.finished: list[tuple[str, int]] = []

    def deliver(self, one):
        waits = self.suspensions[one.position]
        assert one.key not in self.running, "two of one key at once"
        if waits == 0:
            self.finished.append((one.key, one.position))
            return None
        self.running[one.key] = one.position
        self.most = max(self.most, len(self.running))
        return self._wait(one, waits)

    async def _wait(self, one, waits):
        for _ in range(waits - 1):
            await asyncio.sleep(0)
        del self.running[one.key]
        self.finished.append((one.key, one.position))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 4)), max_size=40), st.integers(1, 5), st.integers(1, 7)
)
def test_deliveries_of_one_key_run_in_order_and_never_together(steps, concurrency, chunk):
    recorder = Recorder([waits for _, waits in steps])

    async def run():
        lanes = Lanes(recorder.deliver, concurrency)
        for begin in range(0, len(steps), chunk):
            lanes.add([delivery(key, begin + at) for at, (key, _) in enumerate(steps[begin : begin + chunk])])
            await asyncio.sleep(0)
        await lanes.idle()
        await lanes.stop()

    asyncio.run(run())
    for key in "abcd":
        assert [position for k, position in recorder.finished if k == key] == [
            position for position, (k, _) in enumerate(steps) if k == key
        ]
    assert recorder.most <= concurrency


async def test_what_never_waits_costs_no_task():
    lanes = Lanes(Recorder([0] * 100).deliver, 8)
    before = len(asyncio.all_tasks())
    lanes.add([delivery("a", position) for position in range(100)])
    await lanes.idle()
    assert len(asyncio.all_tasks()) - before == 1, "one worker for all of them"
    await lanes.stop()


async def test_a_pause_starts_nothing_more_and_resume_goes_on_with_what_was_put_first():
    recorder = Recorder([0] * 10)
    lanes = Lanes(recorder.deliver, 2)
    lanes.pause()
    lanes.add([delivery("a", 1), delivery("b", 2)])
    await asyncio.sleep(0)
    assert recorder.finished == []
    lanes.add_first([delivery("a", 0)])
    lanes.resume()
    await lanes.idle()
    assert recorder.finished == [("a", 0), ("a", 1), ("b", 2)]
    await lanes.stop()


@pytest.mark.parametrize("again_at_once", [True, False], ids=["before it noticed", "after it noticed"])
async def test_a_cancel_that_comes_after_the_handler_ended_ends_no_worker(again_at_once):
    recorder = Recorder([1, 1])
    lanes = Lanes(recorder.deliver, 1)
    lanes.add([delivery("a", 0)])
    await lanes.idle()
    lanes._workers[0].cancel()
    if not again_at_once:
        await asyncio.sleep(0)
    lanes.add([delivery("a", 1)])
    async with asyncio.timeout(10):
        await lanes.idle()
    assert recorder.finished == [("a", 0), ("a", 1)]
    await lanes.stop()


async def test_a_stop_that_waits_for_a_handler_which_goes_on_says_so(monkeypatch, caplog):
    monkeypatch.setattr("trunkline.tasks.STUBBORN_S", 0.001)
    free = asyncio.Event()

    async def go_on():
        while not free.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await free.wait()

    lanes = Lanes(lambda _one: go_on(), 2, "payment@orders")
    lanes.add([delivery("a", 1)])
    await asyncio.sleep(0)
    stopping = asyncio.create_task(lanes.stop())
    await until(lambda: "payment@orders: the stop waits for 1 handlers" in caplog.text)
    assert not stopping.done()
    free.set()
    await stopping


async def test_what_waits_can_be_forgotten_and_is_counted():
    lanes = Lanes(Recorder([0] * 10).deliver, 2)
    lanes.pause()
    lanes.add([delivery("a", 1), delivery("b", 2), delivery("b", 3)])
    assert (lanes.waiting, lanes.forget_waiting(), lanes.waiting) == (3, 3, 0)
    await lanes.stop()


async def give(value, *, after=()):
    for future in after:
        await future
    return value


async def test_a_driver_runs_one_coroutine_after_the_other_and_tells_what_each_returned():
    driver = new_driver()
    assert driver.send(give(None)) is NOTHING
    ended = driver.send(give([1]))
    assert isinstance(ended, Ended)
    assert ended.value == [1]
    with pytest.raises(ConnectionError):
        driver.send(fail())


async def fail() -> None:
    raise ConnectionError


@pytest.mark.parametrize("value", [None, "done"])
async def test_what_a_driver_has_begun_goes_on_where_it_is_awaited(value):
    futures = [asyncio.get_running_loop().create_future() for _ in range(2)]
    driver = new_driver()
    task = asyncio.create_task(wait_for(Resume(driver, driver.send(give(value, after=futures)))))
    for future in futures:
        await asyncio.sleep(0)
        future.set_result(None)
    assert await task == value


async def wait_for(begun):
    return await begun


async def test_what_a_driver_has_begun_can_be_cancelled_and_closed():
    cleaned = []

    async def hang() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cleaned.append("up")

    driver = new_driver()
    task = asyncio.create_task(wait_for(Resume(driver, driver.send(hang()))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    driver = new_driver()
    coroutine = wait_for(Resume(driver, driver.send(hang())))
    coroutine.send(None)
    coroutine.close()
    assert cleaned == ["up", "up"]
