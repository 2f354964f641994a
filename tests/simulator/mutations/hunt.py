"""Look for one planted bug by each search in turn, and shrink what is found.

Read next: __main__.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice

import msgspec
import pytest

from trunkline.testing.simulator import Result, Simulation, Tape
from trunkline.testing.simulator.faults import CRASH
from trunkline.testing.simulator.search import (
    POINTS,
    Attempt,
    crash_sweep,
    pairs,
    point_sweep,
    random_runs,
    run,
    runs,
)
from trunkline.testing.simulator.shrink import shrink

SEARCHES = ("plain", "crash sweep", "point sweep", "pairs", "random")
"""Cheapest first."""
PAIRS = 500
SEEDS = 1000
SAMPLE = 100
"""How many attempts the quick search makes where nothing is to be found."""


class Mutation(msgspec.Struct, frozen=True):
    """A planted bug.

    Attributes:
        name: what is wrong, in a few words.
        bed: broker → the simulation in which it shows.
        plant: plants it; undone with its MonkeyPatch.
        by: the cheapest search that finds it; empty where none is to, because what is switched off is no safeguard.
        broker: on which it is looked for.
        seed: from which the quick search draws.
    """

    name: str
    bed: Callable[[str], Simulation]
    plant: Callable[[pytest.MonkeyPatch], None]
    by: str
    broker: str = "kafka"
    seed: int = 0


class Found(msgspec.Struct, frozen=True):
    """The first run that broke a promise.

    Attributes:
        runs: how many were made.
    """

    runs: int
    aim: str
    promise: str
    text: str
    tape: Tape


class Shrunk(msgspec.Struct, frozen=True):
    """How short a tape became, in how many replays and seconds."""

    tape: Tape
    replays: int
    seconds: float


def attempts(simulation: Simulation, plain: Result, by: str, first_seed: int = 0) -> Iterator[Attempt]:
    """Return what one search tries, with the faults that the simulation allows."""
    kinds = [kind for kind in POINTS if simulation.faults is None or kind in simulation.faults]
    crashes = list(crash_sweep(plain)) if simulation.faults is None or CRASH in simulation.faults else []
    points = list(point_sweep(plain, kinds))
    return {
        "plain": lambda: iter((Attempt(Tape(), "plain"),)),
        "crash sweep": lambda: iter(crashes),
        "point sweep": lambda: iter(points),
        "pairs": lambda: pairs([*crashes, *points], PAIRS, 1),
        "random": lambda: random_runs(range(first_seed, first_seed + SEEDS)),
    }[by]()


def hunt(
    simulation: Simulation, tried: Iterator[Attempt], told: Callable[[int], None] = lambda _runs: None
) -> Found | int:
    """Search until a promise is broken; return how many runs kept them all if none was."""
    made = 0
    with closing(runs(simulation, tried)) as ended:
        for made, (attempt, result) in enumerate(ended, 1):
            told(made)
            if result.violations:
                first = result.violations[0]
                return Found(made, attempt.aim, first.promise, first.text, result.tape)
    return made


def plain_run(simulation: Simulation) -> Result:
    """Make the run in which nothing goes wrong."""
    return run(simulation, Attempt(Tape(), "plain"))


def quickly(mutation: Mutation) -> tuple[Found | int, Shrunk | None]:
    """Plant the bug and make the search that finds it soonest; shrink what it finds."""
    with pytest.MonkeyPatch.context() as patch:
        mutation.plant(patch)
        simulation = mutation.bed(mutation.broker)
        tried = attempts(simulation, plain_run(simulation), mutation.by or "crash sweep", mutation.seed)
        found = hunt(simulation, islice(tried, SEEDS if mutation.by else SAMPLE))
        return found, shrunk(simulation, found) if isinstance(found, Found) else None


def shrunk(simulation: Simulation, found: Found) -> Shrunk:
    """Make the tape of what was found as short as can be."""
    replays = 0

    def breaks(tape: Tape) -> bool:
        nonlocal replays
        replays += 1
        result = run(simulation, Attempt(tape, "again"))
        return any(violation.promise == found.promise for violation in result.violations)

    began = time.perf_counter()
    tape = shrink(found.tape, breaks)
    return Shrunk(tape, replays, time.perf_counter() - began)
