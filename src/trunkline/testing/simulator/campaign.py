"""A whole search, phase by phase: what is run, what was found, what was covered, and what never happened.

Invariant: attempts are judged in the order in which they are listed, however many processes run them, so the first
failure is always the same one. Read next: search.py, shrink.py.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import msgspec

from trunkline.clock import Clock
from trunkline.errors import SimulationError
from trunkline.testing.simulator import workers
from trunkline.testing.simulator.account import Violation
from trunkline.testing.simulator.faults import CRASH, KINDS
from trunkline.testing.simulator.search import (
    POINTS,
    Attempt,
    crash_sweep,
    pairs,
    point_sweep,
    random_runs,
    run,
)
from trunkline.testing.simulator.shrink import shrink
from trunkline.testing.simulator.simulation import Simulation
from trunkline.testing.simulator.tape import Tape
from trunkline.testing.simulator.world import Result

SHRINKING = 2000
"""Most runs that it may take to make one tape shorter."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is searched, in this order.

    Attributes:
        crash_sweep: crash each process before each of its steps.
        points: have each fault happen at each of its occasions.
        pairs: so many pairs of these, drawn.
        seeds: so many runs in which everything is drawn, from `first_seed` on.
        keep_going: search on after a violation; each broken promise is told once.
        processes: that run them.
    """

    crash_sweep: bool = True
    points: bool = True
    pairs: int = 0
    seeds: int = 0
    first_seed: int = 1
    keep_going: bool = False
    processes: int = 1


class Failure(msgspec.Struct, frozen=True):
    """A run that broke a promise, and the shortest one that was found to do the same.

    Attributes:
        found: the attempt that broke it first.
        result: of the short run, with events for the story. plain: of the run without faults, with events.
        violation: of the short run.
        removed: how many decisions shrinking took away.
        broker: that was simulated.
    """

    found: Attempt
    violation: Violation
    result: Result
    plain: Result
    removed: int
    broker: str


class Report(msgspec.Struct, kw_only=True):
    """What a search has done so far.

    Attributes:
        broker: that was simulated.
        phase: under way. done, total: runs of the phase; total 0 if it is not known.
        runs, steps: in all. seconds: since the search began.
        occasions: fault → how often it could have happened. fired: fault → how often it did.
        places: (fault, node, step of its process) at which one happened.
        plain: steps of each node in a run without faults.
        named: faults that were asked for by name. tried: those that may happen.
        failures: one for each broken promise.
        outlived: variables of modules that changed in runs, and that no crash cleared; see Variables.
    """

    broker: str
    named: frozenset[str] = frozenset()
    phase: str = ""
    done: int = 0
    total: int = 0
    runs: int = 0
    steps: int = 0
    seconds: float = 0.0
    occasions: Counter[str] = msgspec.field(default_factory=Counter)
    fired: Counter[str] = msgspec.field(default_factory=Counter)
    places: set[tuple[str, str, int]] = msgspec.field(default_factory=set)
    plain: dict[str, int] = {}
    tried: set[str] = msgspec.field(default_factory=set)
    failures: list[Failure] = []
    outlived: set[str] = msgspec.field(default_factory=set)

    def never_fired(self) -> list[str]:
        """Return the faults that were to happen and never did: asked for by name, or with an occasion at least."""
        return [
            kind
            for kind in KINDS
            if kind in self.tried and not self.fired[kind] and (kind in self.named or self.occasions[kind])
        ]

    def doubts(self) -> list[str]:
        """Return sentences that say where the runs are not what really happens."""
        names = ", ".join(sorted(self.outlived))
        text = (
            f"changed in runs and not cleared by a crash, as a process really would: {names};"
            " services that share a module share its variables here"
        )
        return [text] if names else []

    def add(self, result: Result) -> None:
        """Count one run."""
        self.done += 1
        self.runs += 1
        self.steps += result.total
        self.fired.update(result.fired)
        self.places.update(result.places)
        self.outlived.update(result.outlived)
        for kind in self.tried:
            if kind == CRASH:
                self.occasions[CRASH] += sum(result.steps.values())
            else:
                self.occasions[kind] += result.counts.get(kind, 0)


Told = Callable[[Report], None]


def carry_out(simulation: Simulation, plan: Plan, told: Told = lambda _report: None) -> Report:
    """Search as planned; stop at the first violation unless the plan says otherwise.

    Args:
        told: called after each run, and while a tape is made shorter.
    Raises: SimulationError E702 and E704 as a run does, with the attempt in its text.
    """
    with quiet():
        return _Search(simulation, plan, told).carry_out()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the services' log silent: a run with faults logs what would be an alarm anywhere else."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _Search:
    """One search under way."""

    def __init__(self, simulation: Simulation, plan: Plan, told: Told) -> None:
        self._simulation = simulation
        self._plan = plan
        self._told = told
        named = frozenset(simulation.faults or ())
        self._on = named if simulation.faults is not None else frozenset(KINDS)
        tried = {CRASH} if plan.crash_sweep else set()
        tried |= set(POINTS) if plan.points else set()
        tried |= {CRASH, *POINTS} if plan.pairs else set()
        tried |= set(KINDS) if plan.seeds else set()
        self._report = Report(broker=simulation.broker, named=named, tried=tried & self._on)
        self._start = Clock.monotonic()

    def carry_out(self) -> Report:
        report, plan = self._report, self._plan
        first = Attempt(Tape(), "a run without faults")
        report.phase, report.total = "without faults", 1
        plain = _judged(self._simulation, first)
        report.plain = plain.steps
        if not self._seen(first, plain):
            return report
        for phase, attempts, total in self._phases(plain):
            report.phase, report.done, report.total = phase, 0, total
            if not self._run(attempts, processes=plan.processes):
                break
        return report

    def _phases(self, plain: Result) -> Iterator[tuple[str, Iterable[Attempt], int]]:
        plan, on = self._plan, self._on
        crashes = list(crash_sweep(plain)) if CRASH in on else []
        points = list(point_sweep(plain, [kind for kind in POINTS if kind in on]))
        if plan.crash_sweep:
            yield "crash sweep", crashes, len(crashes)
        if plan.points:
            yield "points", points, len(points)
        if plan.pairs:
            yield "pairs", pairs(crashes + points, plan.pairs, plan.first_seed), plan.pairs
        if plan.seeds:
            seeds = range(plan.first_seed, plan.first_seed + plan.seeds)
            yield "random seeds", random_runs(seeds), plan.seeds

    def _run(self, attempts: Iterable[Attempt], *, processes: int) -> bool:
        results = workers.run_all(self._simulation, attempts, processes)
        try:
            return all(self._seen(attempt, result) for attempt, result in results)
        finally:
            results.close()

    def _seen(self, attempt: Attempt, result: Result) -> bool:
        """Count one run, and look into it if it broke a promise; return whether to go on."""
        report = self._report
        report.add(result)
        report.seconds = Clock.monotonic() - self._start
        known = {failure.violation.promise for failure in report.failures}
        new = [violation for violation in result.violations if violation.promise not in known]
        if new:
            report.failures = [*report.failures, self._explained(attempt, result, new[0])]
        self._told(report)
        return not report.failures or self._plan.keep_going

    def _explained(self, attempt: Attempt, result: Result, violation: Violation) -> Failure:
        """Make the tape short, and run it once more for the story.

        Raises: SimulationError E712 if the same tape does not break the same promise.
        """
        simulation, report, promise = self._simulation, self._report, violation.promise
        tape, left = result.tape, SHRINKING

        def breaks(tried: Tape) -> bool:
            nonlocal left
            left -= 1
            gc.collect(0)  # what the run before has left
            return left >= 0 and _broken(run(simulation, Attempt(tried, attempt.aim)), promise) is not None

        if not breaks(tape):
            raise SimulationError(
                "E712", f"{attempt.aim} broke {promise!r}, and the same tape does not",
                "something in the services is not repeatable: a time, an id or a random number of their own",
            )  # fmt: skip
        phase, report.phase = report.phase, "shrinking"
        short = shrink(tape, breaks, lambda _size: self._told(report))
        report.phase = phase
        told = run(simulation, Attempt(short, attempt.aim), story=True)
        plain = run(simulation, Attempt(Tape(seed=tape.seed), "plain"), story=True)
        return Failure(
            attempt, _broken(told, promise) or violation, told, plain, tape.size() - short.size(), simulation.broker
        )


def check_fired(report: Report) -> None:
    """Refuse a search in which a fault that was to happen never did.

    Raises: SimulationError E714.
    """
    if never := report.never_fired():
        left = ",".join(kind for kind in KINDS if kind in report.tried and report.fired[kind])
        raise SimulationError(
            "E714",
            f"on {report.broker} {', '.join(never)} never happened in {report.runs:,} runs: nothing is known of it",
            f"search more (points, more seeds), or leave it out by naming the others: {left}",
        )


def repeat(simulation: Simulation, tape: Tape, promise: str) -> Failure | Result:
    """Run a tape once; return the failure if it breaks a promise, the same one first, else how it ended."""
    attempt = Attempt(tape, "the tape")
    with quiet():
        result = run(simulation, attempt, story=True)
        if not result.violations:
            return result
        plain = run(simulation, Attempt(Tape(seed=tape.seed), "plain"), story=True)
    return Failure(attempt, _broken(result, promise) or result.violations[0], result, plain, 0, simulation.broker)


def _broken(result: Result, promise: str) -> Violation | None:
    return next((violation for violation in result.violations if violation.promise == promise), None)


def _judged(simulation: Simulation, attempt: Attempt) -> Result:
    return next(workers.run_all(simulation, [attempt], 1))[1]
