"""Lanes: one key in order, other keys beside it, no task for what never waits."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline import Stream
from trunkline.lanes import Lanes
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


async def test_what_waits_can_be_forgotten_and_is_counted():
    lanes = Lanes(Recorder([0] * 10).deliver, 2)
    lanes.pause()
    lanes.add([delivery("a", 1), delivery("b", 2), delivery("b", 3)])
    assert (lanes.waiting, lanes.forget_waiting(), lanes.waiting) == (3, 3, 0)
    await lanes.stop()
