"""What a broker has brought and its consumer has not asked for."""

import asyncio

import pytest

from trunkline import Queue
from trunkline.inflow import Inflow
from trunkline.transport import Delivery, Subscription

SUBSCRIPTION = Subscription("s", Queue("inflow-test"))


def deliveries(*positions: int, partition: int = 0) -> list[Delivery]:
    return [Delivery(SUBSCRIPTION, None, b"", None, position, partition) for position in positions]


def positions(found: list[Delivery]) -> list[int]:
    return [delivery.position for delivery in found]


async def test_deliveries_come_in_order_and_no_more_than_asked_for():
    inflow = Inflow(SUBSCRIPTION)
    inflow.put(deliveries(1, 2, 3))
    assert positions(await inflow.receive(2)) == [1, 2]
    assert positions(await inflow.receive(2)) == [3]


async def test_receive_waits_for_the_first():
    inflow = Inflow(SUBSCRIPTION)
    waiting = asyncio.create_task(inflow.receive(10))
    await asyncio.sleep(0)
    assert not waiting.done()
    inflow.put(deliveries(1))
    assert positions(await waiting) == [1]


async def test_a_new_assignment_is_told_once_even_while_nothing_comes():
    inflow = Inflow(SUBSCRIPTION)
    waiting = asyncio.create_task(inflow.receive(10))
    await asyncio.sleep(0)
    inflow.reassigned()
    assert await waiting == []
    again = asyncio.create_task(inflow.receive(10))
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()


async def test_whoever_fills_it_waits_for_room():
    inflow = Inflow(SUBSCRIPTION, room=2)
    inflow.put(deliveries(1, 2))
    waiting = asyncio.create_task(inflow.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await inflow.receive(1)
    await waiting


async def test_what_is_forgotten_makes_room():
    inflow = Inflow(SUBSCRIPTION, room=2)
    inflow.put(deliveries(1, partition=0) + deliveries(1, 2, partition=1))
    waiting = asyncio.create_task(inflow.room())
    await asyncio.sleep(0)
    inflow.forget(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    inflow.forget(1)
    async with asyncio.timeout(10):
        await waiting


async def test_a_partition_that_is_lost_is_forgotten_and_others_stay():
    inflow = Inflow(SUBSCRIPTION)
    inflow.put(deliveries(1, 2, partition=0) + deliveries(1, partition=1))
    assert positions(inflow.forget(0)) == [1, 2]
    assert [(d.partition, d.position) for d in await inflow.receive(10)] == [(1, 1)]


async def test_after_drain_nobody_is_asked_for_more():
    inflow = Inflow(SUBSCRIPTION, room=1)
    inflow.put(deliveries(1))
    waiting = asyncio.create_task(inflow.room())
    await asyncio.sleep(0)
    inflow.drain()
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_after_drain_nothing_is_handed_out():
    inflow = Inflow(SUBSCRIPTION)
    inflow.put(deliveries(1))
    assert positions(inflow.drain()) == [1]
    inflow.put(deliveries(2))
    waiting = asyncio.create_task(inflow.receive(10))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


async def test_an_error_that_ends_a_task_of_the_reader_ends_receive():
    inflow = Inflow(SUBSCRIPTION)
    waiting = asyncio.create_task(inflow.receive(10))
    await asyncio.sleep(0)

    async def fails() -> None:
        raise ZeroDivisionError("of the reader")

    inflow.spawn(fails())
    with pytest.raises(ZeroDivisionError):
        await waiting
    with pytest.raises(ZeroDivisionError):
        await inflow.receive(10)


async def test_a_task_of_the_reader_may_be_cancelled():
    inflow = Inflow(SUBSCRIPTION)
    task = inflow.spawn(asyncio.sleep(60))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    inflow.put(deliveries(1))
    assert positions(await inflow.receive(1)) == [1]
