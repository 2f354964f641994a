"""Run the catalogue: each bug planted, each search made until it finds it, what random runs find made short.

Usage: python -m tests.simulator.mutations [WORD ...]    only mutations with one of the words in their name
       python -m tests.simulator.mutations none [SEEDS]  no bug planted: every sweep and so many seeds on every broker
"""

from __future__ import annotations

import logging
import sys
import time
import warnings

import pytest

from tests.simulator.mutations.bed import deploy, desk, desks, killer, post, refusal, retries, retries_of_two
from tests.simulator.mutations.hunt import SEARCHES, Found, Mutation, Shrunk, attempts, hunt, plain_run, shrunk
from tests.simulator.mutations.mistakes import MISTAKES, prices, shop
from tests.simulator.mutations.safeguards import SAFEGUARDS
from trunkline.testing.simulator.broker import PROFILES
from trunkline.testing.simulator.search import random_runs

BEDS = (desk, desks, retries, retries_of_two, killer, refusal, deploy, post, shop, prices)
HEAD = (
    f"{'planted bug':49} {'broker':8} {'plain':>6} {'crash':>7} {'point':>7} {'pairs':>7} {'random':>7}"
    f"  {'tape':>9} broken promise"
)


def main(words: list[str]) -> int:
    """Print the table; return how many bugs were missed."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    missed, sizes, began, runs = [], [], time.perf_counter(), 0
    for title, group in (("Safeguards of the framework", SAFEGUARDS), ("Mistakes of users", MISTAKES)):
        print(f"\n{title}\n{HEAD}", flush=True)
        for mutation in group:
            if words and not any(word in mutation.name for word in words):
                continue
            cells, found, short = _search_all(mutation)
            runs += sum(made if isinstance(made, int) else made.runs for made in cells)
            if short is not None:
                sizes.append(short)
            if (found is None) != (not mutation.by):
                missed.append(mutation.name)
            _print_row(mutation, cells, found, short)
    _print_sum(runs, time.perf_counter() - began, missed, sizes)
    return len(missed)


def none_planted(seeds: int) -> int:
    """Make all searches in every bed, on every broker, without a mutation; return in how many a promise was broken."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    alarms = 0
    for bed in BEDS:
        for broker in PROFILES:
            simulation, runs, began = bed(broker), 0, time.perf_counter()
            plain = plain_run(simulation)
            for by in SEARCHES:
                tried = attempts(simulation, plain, by) if by != "random" else random_runs(range(seeds))
                made = hunt(simulation, tried)
                if isinstance(made, Found):
                    alarms += 1
                    print(f"  {by}: {made.aim}: {made.promise}: {made.text}")
                runs += made.runs if isinstance(made, Found) else made
            print(f"{bed.__name__:10} {broker:9} {runs:6} runs, {runs / (time.perf_counter() - began):.0f} in a second")
    print(f"false alarms: {alarms}")
    return alarms


def _search_all(mutation: Mutation) -> tuple[list[Found | int], Found | None, Shrunk | None]:
    """Return what each search found, the first of them, and what the random runs found, made short."""
    cells: list[Found | int] = []
    short = None
    with pytest.MonkeyPatch.context() as patch:
        mutation.plant(patch)
        simulation = mutation.bed(mutation.broker)
        plain = plain_run(simulation)
        for by in SEARCHES:
            made = hunt(simulation, attempts(simulation, plain, by), lambda runs, by=by: _progress(mutation, by, runs))
            cells.append(made)
            if by == "random" and isinstance(made, Found):
                short = shrunk(simulation, made)
    return cells, next((one for one in cells if isinstance(one, Found)), None), short


def _progress(mutation: Mutation, by: str, runs: int) -> None:
    if sys.stderr.isatty() and runs % 10 == 0:
        print(f"\r  {mutation.name}: {by}, {runs} runs \x1b[K", end="", file=sys.stderr, flush=True)


def _print_row(mutation: Mutation, cells: list[Found | int], found: Found | None, short: Shrunk | None) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    shown = [str(cell.runs) if isinstance(cell, Found) else f"-/{cell}" for cell in cells]
    sizes = ""
    if short is not None and isinstance(cells[-1], Found):
        sizes = f"{cells[-1].tape.size()} → {short.tape.size()}"
    widths = (6, 7, 7, 7, 7)
    columns = " ".join(f"{text:>{width}}" for text, width in zip(shown, widths, strict=True))
    promise = found.promise if found else "none, as it should be" if not mutation.by else "NOT FOUND"
    print(f"{mutation.name:49} {mutation.broker:8} {columns}  {sizes:>9} {promise}", flush=True)


def _print_sum(runs: int, seconds: float, missed: list[str], short: list[Shrunk]) -> None:
    print(f"\n{runs:,} runs in {seconds:.0f} s; -/N: not found in N runs, else the number of the run that found it")
    if short:
        sizes = sorted(one.tape.size() for one in short)
        replays = sorted(one.replays for one in short)
        middle = len(sizes) // 2
        few = sum(size <= 5 for size in sizes)
        print(
            f"random runs made short: {few} of {len(sizes)} to 5 decisions or fewer, median {sizes[middle]},"
            f" longest {sizes[-1]}; median {replays[middle]} replays,"
            f" {sum(one.seconds for one in short) / len(short):.1f} s on average"
        )
    print(f"missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["none"]:
        sys.exit(none_planted(int(*sys.argv[2:]) if sys.argv[2:] else 1000))
    sys.exit(main(sys.argv[1:]))
