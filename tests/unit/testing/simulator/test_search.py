"""A sweep tries everything once, and its first runs are spread over the whole."""

from __future__ import annotations

import gc
import weakref
from itertools import count
from types import SimpleNamespace

import pytest

from tests.unit.testing.simulator import shipping
from trunkline.testing.simulator import World, search, workers
from trunkline.testing.simulator.campaign import quiet
from trunkline.testing.simulator.search import crash_sweep, point_sweep, random_runs, runs

PLAIN = SimpleNamespace(steps={"desk": 20, "book": 7}, counts={"delay": 9, "duplicate": 3, "disk_full": 0})


def test_a_crash_sweep_has_each_step_of_each_process_once():
    aims = [attempt.aim for attempt in crash_sweep(PLAIN)]
    assert sorted(aims) == sorted(
        f"crash {node} before step {step} of {steps}"
        for node, steps in PLAIN.steps.items()
        for step in range(1, steps + 1)
    )


def test_a_point_sweep_has_each_occasion_once():
    tapes = [attempt.tape.choices for attempt in point_sweep(PLAIN, ["delay", "duplicate", "disk_full"])]
    assert len(tapes) == 12
    assert {(kind, number) for choices in tapes for kind, made in choices.items() for number in made} == {
        *(("delay", number) for number in range(9)),
        *(("duplicate", number) for number in range(3)),
    }


def test_the_first_crashes_are_spread_over_the_run_and_over_the_processes():
    first = [next(iter(attempt.tape.choices.items())) for attempt, _ in zip(crash_sweep(PLAIN), range(6), strict=False)]
    assert {kind for kind, _ in first} == {"crash desk", "crash book"}
    assert sorted(made[0] for kind, made in first if kind == "crash desk") == [1, 5, 9, 17]


async def nothing(_sim):
    """End the run while the processes still start."""


@pytest.fixture
def worlds(monkeypatch):
    """The worlds that were made and are in memory."""
    made = weakref.WeakSet()

    def world(*args, **options):
        one = World(*args, **options)
        made.add(one)
        return one

    monkeypatch.setattr(search, "World", world)
    return made


def test_of_runs_that_are_over_none_is_kept_in_memory(worlds):
    assert len(list(runs(shipping.make(workload=nothing), random_runs(range(20))))) == 20
    gc.collect()
    assert not list(worlds)


async def ask(sim):
    """Have a process in the middle of a unit of work when it crashes: what that leaves needs a whole collection."""

    async def note(running):
        async with running.unit_of_work() as ctx:
            await ctx.transaction()

    await sim.request("till", note)
    await shipping.two_sales(sim)


def test_a_process_that_is_given_chunk_after_chunk_keeps_none_in_memory_either(worlds, monkeypatch):
    monkeypatch.setattr(workers, "_of_this_process", [])
    monkeypatch.setattr(search, "COLLECT", 4 * workers.CHUNK)
    monkeypatch.setattr(search, "_ended", count(1))
    try:
        with quiet():
            workers._begin(shipping.make(workload=ask))
            for first in range(0, search.COLLECT, workers.CHUNK):
                workers._chunk(list(random_runs(range(first, first + workers.CHUNK))))
    finally:
        gc.unfreeze()
        gc.enable()
    assert not list(worlds)
