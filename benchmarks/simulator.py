"""The suite of the simulator: schedules per second, and how long the crash sweep of the shop takes.

Read next: contestants/simulated.py.
"""

from __future__ import annotations

from benchmarks.cases import Case, Contestant, Goal, Row

ONE = Contestant("one process", "simulated:random_schedules", options={"processes": 1})
TWO = Contestant("two processes", "simulated:random_schedules", options={"processes": 2})
CHAIN = "three services, random schedules"

CASES = (
    Case(
        CHAIN,
        (ONE, TWO),
        (
            Row(CHAIN, "per_s", "/s", ONE.name, goal=Goal(400)),
            Row(f"{CHAIN}, two processes", "per_s", "/s", TWO.name, ONE.name),
            Row(f"{CHAIN}: steps of each", "steps", "steps", ONE.name),
        ),
        messages=2000,
        quick=300,
    ),
    Case(
        "the shop, crash sweep",
        (
            Contestant("one process", "simulated:shop_sweep", options={"processes": 1}),
            Contestant("two processes", "simulated:shop_sweep", options={"processes": 2}),
        ),
        (
            Row("the shop, crash sweep", "s", "s", "one process", goal=Goal(60, "at most"), lower=True),
            Row("the shop, crash sweep, two processes", "s", "s", "two processes", "one process", lower=True),
            Row("the shop, crash sweep: runs of it", "runs", "runs", "one process"),
        ),
        messages=1,
        quick=1,
    ),
)
