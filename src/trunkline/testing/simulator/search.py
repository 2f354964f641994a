"""Look for a run that breaks a promise: every single crash first, then every single fault, then random ones.

Invariant: a run is what its tape says, so what is found here is found again. Read next: shrink.py.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping

import msgspec

from trunkline.clock import Draws
from trunkline.errors import SimulationError
from trunkline.testing.simulator.faults import CRASH, KINDS
from trunkline.testing.simulator.interception import interception
from trunkline.testing.simulator.simulation import Simulation
from trunkline.testing.simulator.tape import Tape
from trunkline.testing.simulator.world import Result, World

COLLECT = 100
"""Runs between two garbage collections of what earlier ones have left; what a run leaves is collected after it. None
happens during a run, so that its order does not depend on them."""
_ended = itertools.count(1)  # of the process: one of several is given its runs in chunks
POINTS = tuple(kind for kind in KINDS if kind != CRASH)
"""Faults that are tried at each single occasion."""


class Attempt(msgspec.Struct, frozen=True):
    """One run of a search.

    Attributes:
        tape: what is repeated, or whose seed is drawn from. random: whether it is.
        aim: what is tried: `plain`, `crash payment before step 17`, `disk_full at occasion 3`, `seed 42`.
        fires: the fault that must happen in it, if any.
    """

    tape: Tape
    aim: str
    random: bool = False
    fires: str = ""


def run(simulation: Simulation, attempt: Attempt, *, story: bool = False) -> Result:
    """Make one run."""
    return World(simulation, attempt.tape, random=attempt.random, on=simulation.faults, story=story).run()


def crash_sweep(plain: Result) -> Iterator[Attempt]:
    """Crash each process before each of the steps that it takes in a plain run."""
    for node, number, steps in _spread(plain.steps):
        step = number + 1
        yield Attempt(Tape({f"{CRASH} {node}": {0: step}}), f"crash {node} before step {step} of {steps}", fires=CRASH)


def point_sweep(plain: Result, kinds: Iterable[str] = POINTS) -> Iterator[Attempt]:
    """Have each fault happen at each single occasion of a plain run."""
    for kind, number, count in _spread({kind: plain.counts.get(kind, 0) for kind in kinds}):
        yield Attempt(Tape({kind: {number: 1}}), f"{kind} at occasion {number + 1} of {count}", fires=kind)


def _spread(counts: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Return every (name, number below its count, its count), so that the first of them are spread over all.

    Order: the numbers' binary digits read backwards (van der Corput 1935), one of each name in turn.
    """
    digits = max(counts.values(), default=0).bit_length()
    for number in range(1 << digits):
        turned = int(f"{number:0{digits}b}"[::-1], 2)
        for name, count in counts.items():
            if turned < count:
                yield name, turned, count


def pairs(singles: list[Attempt], limit: int, seed: int) -> Iterator[Attempt]:
    """Have two single faults happen in one run: `limit` pairs, drawn from all of them."""
    draws = Draws(seed)
    for _ in range(limit if len(singles) > 1 else 0):
        first, second = draws.sample(singles, 2)
        choices = {kind: dict(made) for kind, made in first.tape.choices.items()}
        for kind, made in second.tape.choices.items():
            choices.setdefault(kind, {}).update(made)
        yield Attempt(Tape(choices), f"{first.aim}; {second.aim}")


def random_runs(seeds: Iterable[int]) -> Iterator[Attempt]:
    """Draw everything from a seed."""
    for seed in seeds:
        yield Attempt(Tape(seed=seed), f"seed {seed}", random=True)


def runs(simulation: Simulation, attempts: Iterable[Attempt]) -> Generator[tuple[Attempt, Result], None, None]:
    """Yield each attempt with its result; close it to stop before the end.

    Raises: SimulationError E702 and E704 as a run does, with the attempt in its text.
    """
    collected = gc.isenabled()
    if collected:
        interception.prepare()
        gc.collect()
        gc.freeze()
        gc.disable()
    try:
        for attempt in attempts:
            try:
                result = run(simulation, attempt)
            except SimulationError as error:
                raise SimulationError(error.code, f"{error.message} (in {attempt.aim})", error.hint) from error
            yield attempt, result
            gc.collect(0 if next(_ended) % COLLECT else 2)
    finally:
        if collected:
            gc.unfreeze()
            gc.enable()
