"""How far a partition was handled, and who reads it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.errors import TransportError
from trunkline.partitions import Ownership, Watermark


@given(st.permutations(range(30)), st.integers(0, 30))
def test_the_mark_never_passes_an_unfinished_position(order, finished):
    mark = Watermark(100)
    mark.take(range(100, 130))
    for step, number in enumerate(order[:finished], 1):
        mark.done([100 + number])
        done = {100 + n for n in order[:step]}
        assert mark.low == next(p for p in range(100, 131) if p not in done)


def test_gaps_in_the_positions_are_passed_over():
    mark = Watermark(0)
    mark.take([3, 7, 20])
    assert mark.done([3])
    assert mark.low == 4
    assert not mark.done([20])
    assert mark.done([7])
    assert mark.low == 21


def test_a_finished_position_that_was_not_handed_out_is_forgotten():
    mark = Watermark(5)
    assert not mark.done([4, 99])
    mark.take([5])
    mark.done([5])
    assert (mark.low, len(mark)) == (6, 0)


async def test_idle_waits_for_the_last_one():
    mark = Watermark(0)
    mark.take([0, 1])
    waiting = asyncio.create_task(mark.idle())
    await asyncio.sleep(0)
    mark.done([1])
    await asyncio.sleep(0)
    assert not waiting.done()
    mark.done([0])
    async with asyncio.timeout(10):
        await waiting
    await mark.idle()


class Table:
    """Leases in memory, for several processes."""

    def __init__(self) -> None:
        self.members: set[object] = set()
        self.holders: dict[int, object] = {}


class TableLeases:
    def __init__(self, table: Table) -> None:
        self.table = table
        self.down = False

    async def keep(self, held):
        if self.down:
            raise TransportError("E520", "down")
        self.table.members.add(self)
        return len(self.table.members), {p for p in held if self.table.holders.get(p) is self}

    async def claim(self, free, most):
        got = [p for p in free if p not in self.table.holders][:most]
        self.table.holders.update(dict.fromkeys(got, self))
        return got

    async def release(self, partitions):
        for partition in partitions:
            del self.table.holders[partition]

    async def leave(self):
        self.table.members.discard(self)


class Member:
    def __init__(self, table, clock, partitions=8) -> None:
        self.leases = TableLeases(table)
        self.log: list[tuple[str, int]] = []
        self.ownership = Ownership(
            "s@c", partitions, self.leases, clock, opened=self.opened, closed=self.closed, lease_s=10.0
        )

    async def opened(self, partition):
        self.log.append(("opened", partition))

    async def closed(self, partition, moves):
        assert partition in self.ownership.held if moves else partition not in self.ownership.held
        self.log.append(("moved" if moves else "lost", partition))


async def test_one_process_has_everything_and_two_share(clock):
    table = Table()
    one, two = Member(table, clock), Member(table, clock)
    await one.ownership.step()
    assert one.ownership.held == set(range(8))
    for _ in range(3):
        await two.ownership.step()
        await one.ownership.step()
    assert len(one.ownership.held) == len(two.ownership.held) == 4
    assert one.ownership.held | two.ownership.held == set(range(8))
    assert [what for what, _ in one.log].count("moved") == 4


async def test_when_one_leaves_the_other_takes_all(clock):
    table = Table()
    one, two = Member(table, clock), Member(table, clock)
    for _ in range(3):
        await one.ownership.step()
        await two.ownership.step()
    await one.ownership.leave()
    assert one.ownership.held == set()
    await two.ownership.step()
    assert two.ownership.held == set(range(8))


async def test_a_partition_taken_by_another_is_lost_at_once(clock):
    table = Table()
    one = Member(table, clock)
    await one.ownership.step()
    table.holders[3] = object()
    await one.ownership.step()
    assert ("lost", 3) in one.log
    assert 3 not in one.ownership.held


async def test_without_an_answer_partitions_are_lost_before_the_lease_ends(clock, caplog):
    one = Member(Table(), clock)
    await one.ownership.step()
    one.leases.down = True
    await clock.advance(6.9)
    with pytest.raises(TransportError):
        await one.ownership.step()
    assert len(one.ownership.held) == 8
    await clock.advance(0.2)
    with pytest.raises(TransportError):
        await one.ownership.step()
    assert one.ownership.held == set()
    assert [what for what, _ in one.log].count("lost") == 8
    (said,) = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert said.endswith("lost partitions 0, 1, 2, 3, 4, 5, 6, 7: another process may read them now")


async def test_what_nobody_began_with_is_taken_back_and_not_waited_for():
    mark = Watermark(10)
    mark.take(range(10, 20))
    waiting = asyncio.ensure_future(mark.idle())
    await asyncio.sleep(0)
    mark.give_back(7)
    mark.done([10, 12])
    assert (mark.low, len(mark)) == (11, 2)
    mark.done([11])
    await waiting
    assert (mark.low, len(mark)) == (13, 0)


async def test_leases_are_renewed_while_a_partition_that_moves_is_waited_for(clock):
    one = Member(Table(), clock)
    await one.ownership.step()
    finished = asyncio.Event()
    renewed: list[set[int]] = []
    keep = one.leases.keep

    async def closed(_partition, _moves):
        await finished.wait()

    async def noted(held):
        renewed.append(set(held))
        return await keep(held)

    one.ownership._closed, one.leases.keep = closed, noted
    leaving = asyncio.create_task(one.ownership.leave())
    for _ in range(5):  # until it waits for its clock
        await asyncio.sleep(0)
    await clock.advance(2.0)
    await clock.advance(2.1)
    assert renewed == [set(range(8))] * 2
    finished.set()
    await leaving
    assert one.leases.table.holders == {}


@pytest.mark.parametrize("step", ["closed", "release"])
async def test_what_could_not_be_given_back_is_given_back_first(clock, step):
    table = Table()
    one, two = Member(table, clock), Member(table, clock)
    await one.ownership.step()
    await two.ownership.step()
    failing, owner = (one.ownership, "_closed") if step == "closed" else (one.leases, "release")
    works = getattr(failing, owner)

    async def fails(*_arguments):
        raise TransportError("E520", "down")

    setattr(failing, owner, fails)
    with pytest.raises(TransportError):
        await one.ownership.step()
    setattr(failing, owner, works)
    await two.ownership.leave()  # so that all are the first one's share again
    await one.ownership.step()
    assert [what for what, _ in one.log].count("moved") >= 4
    assert one.ownership.held == set(table.holders) == set(range(8))
    assert [what for what, _ in one.log].count("opened") == 12


async def test_a_partition_lost_while_it_is_waited_for_is_not_given_back(clock):
    table, under_way = Table(), asyncio.Event()
    one, two = Member(table, clock), Member(table, clock)
    await one.ownership.step()
    await two.leases.keep(())

    async def closed(partition, moves):
        if moves:
            await under_way.wait()

    one.ownership._closed = closed
    giving_back = asyncio.create_task(one.ownership.step())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    table.holders.clear()  # one was taken for dead
    await one.ownership.lose(set(one.ownership.held))
    await two.ownership.step()
    under_way.set()
    await giving_back
    await one.ownership.step()
    assert len(one.ownership.held) == len(two.ownership.held) == 4


async def test_an_error_of_the_leases_while_partitions_are_waited_for_is_not_swallowed(clock):
    table, under_way = Table(), asyncio.Event()
    one, two = Member(table, clock), Member(table, clock)
    await one.ownership.step()
    await two.leases.keep(())

    async def closed(partition, moves):
        await under_way.wait()

    async def broken(held):
        raise ZeroDivisionError

    one.ownership._closed = closed
    giving_back = asyncio.create_task(one.ownership.step())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    one.leases.keep = broken
    await clock.advance(2.1)
    under_way.set()
    with pytest.raises(ZeroDivisionError):
        await giving_back
