"""What a refused commit leaves to be done again belongs to whoever reads its partition by then."""

import asyncio
from types import SimpleNamespace

from trunkline import Stream
from trunkline.consumer import Consumer
from trunkline.handler import Options
from trunkline.transport import Delivery, Subscription

numbers = Subscription("reader", Stream("done-again"))


class Transport:
    """Reads partitions 0 and 1, and loses 1 while the parked keys are read."""

    capabilities = SimpleNamespace(processes=True)

    def __init__(self):
        self.owned, self.moves = {0, 1}, 0

    def owns(self, _subscription, partition):
        return partition in self.owned

    def assignment(self, _subscription):
        return self.moves


class Parking:
    def __init__(self, transport):
        self.keys, self.loads, self._transport = {}, 0, transport

    async def load(self):
        self.loads += 1
        if self.loads == 1:
            self._transport.owned, self._transport.moves = {0}, 1


async def no_wait(_seconds):
    pass


async def test_what_is_done_again_is_forgotten_where_its_partition_was_lost():
    transport = Transport()
    parking = Parking(transport)
    consumer = Consumer(
        numbers, Options(), batch=False, transport=transport, store=None, clock=SimpleNamespace(sleep=no_wait),
        parking=parking, shared=False, alone=asyncio.Lock(), failed=lambda _error: None,
    )  # fmt: skip
    added = []
    consumer.lanes = SimpleNamespace(still=lambda: no_wait(0), add_first=added.extend, resume=lambda: None)
    consumer._under_way = 2
    consumer._redo = [Delivery(numbers, None, b"", str(one), one, partition=one) for one in (1, 0)]

    await consumer._do_again()

    assert [delivery.partition for delivery in added] == [0]
    assert consumer._under_way == 1
    assert parking.loads == 2, "the keys of the partitions that are read now"
