"""`python -m trunkline.testing.simulator.determinism MODULE:OBJECT`: whether a simulation does the same twice.

Each run is made again in this process, with the heap in another order, and in a new one under another PYTHONHASHSEED;
what each step ran, what was sent and what the tables hold in the end is compared. Invariant: a difference is reported
at the first step that shows it. Never does: find what only another machine, locale or time zone would change.
Read next: interception.py.
"""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec

from trunkline.clock import Draws
from trunkline.errors import ConfigurationError, SimulationError
from trunkline.testing.simulator.search import Attempt, runs
from trunkline.testing.simulator.simulation import Simulation
from trunkline.testing.simulator.stack import describe
from trunkline.testing.simulator.tape import Tape
from trunkline.testing.simulator.world import View, World

HASH_SEED = "PYTHONHASHSEED"
BEFORE = 5
"""Steps of processes that are shown before the first that differs."""
_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"

ADDRESSES = (
    "state that one run leaves to the next: a counter, cache or list of a module or class",
    "the order of a set of objects that hash by address (a class without __hash__), or id() itself",
    "time, ids or randomness of C code, such as numpy's",
)
HASHES = (
    "the order of a set of str or bytes, or hash() of one: sort it before it decides what is sent",
    "the environment: a variable, the working folder, the process id",
)


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One thing that happened.

    Attributes:
        number: of the step. at: virtual seconds. trace: hash over all so far. text: what it ran, or what was sent.
    """

    number: int
    node: str
    at: float
    trace: int
    text: str


class Divergence(msgspec.Struct, frozen=True):
    """Where two runs of one tape part.

    Attributes:
        aim: of the attempt. other: how the second run was made. first, second: what they did; None: it had ended.
        before: the last steps of processes that both made. causes: what it may come from.
    """

    aim: str
    other: str
    first: Step | None
    second: Step | None
    before: list[Step]
    causes: tuple[str, ...]

    def error(self) -> SimulationError:
        """Return it as an error, to be raised."""
        at = self.first or self.second
        assert at is not None  # noqa: S101 - one of them goes on
        where = f"step {at.number}, {at.node}, at {at.at:.6f} s"
        return SimulationError("E706", f"{self.aim} is not the same {self.other}: {where}")

    def text(self) -> str:
        """Return it for people."""
        lines = [f"{self.error().code} {self.error().message}"]
        lines += [f"  both   {step.node}: {step.text}" for step in self.before]
        for name, step in (("first ", self.first), ("second", self.second)):
            lines.append(f"  {name} {f'{step.node} at {step.at:.6f} s: {step.text}' if step else 'has ended'}")
        return "\n".join([*lines, "  it may come from:", *(f"  - {cause}" for cause in self.causes)])


class Report(msgspec.Struct, frozen=True):
    """What came of a check.

    Attributes:
        runs: how many were compared with an earlier one. divergence: the first difference; None if there is none.
    """

    runs: int
    divergence: Divergence | None = None

    @property
    def same(self) -> bool:
        """Whether every run came out the same."""
        return self.divergence is None

    def text(self) -> str:
        """Return it for people."""
        if self.divergence is None:
            return f"{self.runs} runs made again: each the same, step by step"
        return self.divergence.text()


# --- one run, written down ---


class _Record:
    """The log of one run; see SimulatedLoop.log."""

    def __init__(self, world: World) -> None:
        self.steps: list[Step] = []
        self._loop = world.loop
        self._services = [service.name for service in world.simulation.system.services]
        world.loop.log = self
        world.eventually.append(self._tables)

    def step(self, node: str, callback: Callable[..., Any]) -> None:
        """Note what has run."""
        self._add(node, describe(callback))

    def done(self, text: str, data: bytes) -> None:
        """Note what was sent or stored."""
        self._add(self._loop.running.name, f"{text} {data.decode(errors='backslashreplace')}".rstrip())

    def _add(self, node: str, text: str) -> None:
        self.steps.append(Step(self._loop.steps, node, self._loop.time(), self._loop.trace, text))

    def _tables(self, view: View) -> None:
        """Note what is in the tables."""
        for service in self._services:
            for (name,) in view.rows(service, _TABLES):
                rows = view.rows(service, f'SELECT * FROM "{name}"')  # noqa: S608 - names of the user's own tables
                self._add(service, f"table {name} holds {rows!r}")


def record(simulation: Simulation, attempt: Attempt) -> list[Step]:
    """Make one run and return everything that it did, and the violations last."""
    world = World(simulation, attempt.tape, random=attempt.random, on=simulation.faults)
    log = _Record(world)
    result = world.run()
    violations = "; ".join(f"{each.promise}: {each.text}" for each in result.violations) or "none"
    log.steps.append(Step(result.total, "end", result.seconds, result.trace, f"violations: {violations}"))
    return log.steps


# --- comparing ---


def check_determinism(
    simulation: Simulation, attempts: Iterable[Attempt], *, target: str = "", hash_seed: int = 4711
) -> Report:
    """Make each run again in this process, and in another one if there is a way to load the simulation there.

    Args:
        target: `MODULE:OBJECT` of the simulation, or of a function that returns it; empty: this process only.
        hash_seed: PYTHONHASHSEED of the other process.
    Raises: SimulationError as the runs raise it.
    """
    tried = list(attempts)
    firsts = [record(simulation, attempt) for attempt in tried]
    for number, (attempt, first) in enumerate(zip(tried, firsts, strict=True), 1):
        clutter = _perturbed(number)
        second = record(simulation, attempt)
        del clutter
        found = _compare(attempt.aim, "made again in the same process", first, second, ADDRESSES)
        if found is not None:
            return Report(number, found)
    if not target:
        return Report(len(tried))
    others = _elsewhere(target, tried, hash_seed)
    for number, (attempt, first, second) in enumerate(zip(tried, firsts, others, strict=True), 1):
        found = _compare(attempt.aim, f"under {HASH_SEED}={hash_seed}", first, second, HASHES + ADDRESSES)
        if found is not None:
            return Report(len(tried) + number, found)
    return Report(2 * len(tried))


def _perturbed(seed: int) -> list[Any]:
    """Put what is allocated next into another order in memory, while what is returned is kept."""
    gc.collect()
    draws = Draws(seed)
    makes: list[Callable[[int], Any]] = [bytes, lambda size: [None] * size, lambda size: dict.fromkeys(range(size))]
    kept = [makes[draws.randrange(3)](draws.randrange(64)) for _ in range(20_000)]
    kept += [type("Clutter", (), {})() for _ in range(100)]
    draws.shuffle(kept)
    del kept[::2]
    return kept


def _compare(
    aim: str, other: str, first: Sequence[Step], second: Sequence[Step], causes: tuple[str, ...]
) -> Divergence | None:
    for index, (one, two) in enumerate(zip_longest(first, second)):
        if one != two:
            before = [step for step in first[:index] if step.node != "host"]
            return Divergence(aim, other, one, two, before[-BEFORE:], causes)
    return None


def _elsewhere(target: str, attempts: list[Attempt], hash_seed: int) -> list[list[Step]]:
    answer = _child(hash_seed, [target, "--record"], msgspec.json.encode(attempts))
    return msgspec.json.decode(answer, type=list[list[Step]])


def _child(hash_seed: int, arguments: list[str], given: bytes = b"") -> bytes:
    """Run this module in a new process.

    Raises: ConfigurationError E708 with what it said, if it fails.
    """
    command = [sys.executable, "-m", "trunkline.testing.simulator.determinism", *arguments]
    path = os.pathsep.join(folder for folder in sys.path if folder)  # what is found here is found there
    environment = {**os.environ, HASH_SEED: str(hash_seed), "PYTHONPATH": path}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, check=False)  # noqa: S603 - itself
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise ConfigurationError("E708", f"the simulation did not run in another process: {said[-2000:]}")
    return done.stdout


def check_seeds(target: str, seeds: int, *, processes: int = 2, hash_seeds: int = 2) -> Report:
    """Draw random runs in several processes under several hash seeds; report the first seed that differs."""
    firsts: list[list[Any]] = []
    compared = 0
    for number in range(processes * hash_seeds):
        ends = msgspec.json.decode(_child(number % hash_seeds + 1, [target, "--ends", "--seeds", str(seeds)]))
        firsts = firsts or ends
        for seed, (first, second) in enumerate(zip(firsts, ends, strict=True)):
            compared += 1
            if first != second:
                return _explained(target, seed, number % hash_seeds + 1, compared)
    return Report(compared)


def _explained(target: str, seed: int, hash_seed: int, compared: int) -> Report:
    """Return what differs in a run that ended differently."""
    attempt = _drawn(seed)
    found = check_determinism(load_simulation(target), [attempt], target=target, hash_seed=hash_seed).divergence
    if found is None:  # it takes the runs before it, or this process's own hash seed is the other one
        end = Step(0, "end", 0.0, 0, "ended otherwise than in another process")
        found = Divergence(attempt.aim, f"in another process under {HASH_SEED}={hash_seed}", end, None, [], ADDRESSES)
    return Report(compared, found)


def _drawn(seed: int) -> Attempt:
    return Attempt(Tape(seed=seed), f"seed {seed}", random=True)


def pin_hash_seed() -> None:
    """Begin the program again with PYTHONHASHSEED=0, unless it is set: so that a tape replays in any process.

    Called first thing by a command, before it has done anything; it does not return if it begins again.
    """
    if os.environ.get(HASH_SEED, "random") in ("", "random"):
        os.environ[HASH_SEED] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself


def load_simulation(target: str) -> Simulation:
    """Import what `MODULE:OBJECT` names; the current folder is on the path.

    Raises: ConfigurationError E210 if it is not written so, E214 if it is no Simulation.
    """
    module, colon, path = target.partition(":")
    if not (colon and module and path):
        raise ConfigurationError("E210", f"{target!r} is not MODULE:OBJECT", 'such as "shop.simulation:simulation"')
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found: Any = importlib.import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    if callable(found):
        found = found()
    if not isinstance(found, Simulation):
        raise ConfigurationError(
            "E214", f"{target} is a {type(found).__name__}", "a Simulation, or a function that returns one, is needed"
        )
    return found


# --- the command ---


def main(arguments: Sequence[str]) -> int:
    """Return 0 if every run came out the same, 1 if not."""
    import argparse
    import logging

    parser = argparse.ArgumentParser(prog="python -m trunkline.testing.simulator.determinism")
    parser.add_argument("target", metavar="MODULE:OBJECT", help="a Simulation, or a function that returns one")
    parser.add_argument("--seeds", type=int, default=1000, help="random runs")
    parser.add_argument("--processes", type=int, default=2, help="processes for each hash seed")
    parser.add_argument("--hash-seeds", type=int, default=2, help=f"different values of {HASH_SEED}")
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ends", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not (given.record or given.ends):
        report = check_seeds(given.target, given.seeds, processes=given.processes, hash_seeds=given.hash_seeds)
        sys.stdout.write(f"{report.text()}\n")
        return 0 if report.same else 1
    logging.disable(logging.CRITICAL)  # the answer goes to the other process, which shows what there is to show
    simulation = load_simulation(given.target)
    answer: Any
    if given.record:
        attempts = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Attempt])
        answer = [record(simulation, attempt) for attempt in attempts]
    else:
        answer = list(_ends(simulation, given.seeds))
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    return 0


def _ends(simulation: Simulation, seeds: int) -> Iterable[tuple[int, list[str]]]:
    """Yield how each random run ends: its trace, and what it broke."""
    for _, result in runs(simulation, map(_drawn, range(seeds))):
        yield result.trace, [f"{each.promise}: {each.text}" for each in result.violations]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
