"""A sweep tries everything once, and its first runs are spread over the whole."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

from tests.unit.testing.simulator import shipping
from trunkline.testing.simulator import World, search
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


def test_of_runs_that_are_over_none_is_kept_in_memory(monkeypatch):
    worlds = weakref.WeakSet()

    def world(*args, **options):
        made = World(*args, **options)
        worlds.add(made)
        return made

    monkeypatch.setattr(search, "World", world)
    assert len(list(runs(shipping.make(workload=nothing), random_runs(range(20))))) == 20
    gc.collect()
    assert not list(worlds)
