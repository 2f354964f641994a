"""The cases of the suite: their names, what they need, and how one is run.

Invariant: a case that does not apply says why, and only by what a transport declares or a bench cannot do.
Read next: bench.py.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

import msgspec

from trunkline.clock import system_clock
from trunkline.errors import TrunklineError

if TYPE_CHECKING:
    from trunkline.testing.conformance.bench import Bench

Run = Callable[["Bench"], Awaitable[None]]

NEEDS = {
    # what a transport declares: Capabilities
    "durable": "the transport keeps nothing beyond the process",
    "processes": "the transport is for one process",
    "priority": "the transport keeps no priority",
    "ordered_streams": "the transport keeps no order on Streams",
    "foreign": "other programs cannot publish to the transport",
    # what the store does
    "keeps": "the store keeps nothing",
    "remembers": "the store has no inbox",
    # what the bench can do
    "publish_foreign": "the bench was not told how another program publishes (Controls.publish_foreign)",
    "restart": "the bench was not told how the broker is restarted (Controls.restart)",
    "kill": "the bench was not told how the broker is killed and resumed (Controls.kill, Controls.resume)",
    "rotate": "the bench was not told how the password of the URL's user is changed (Controls.rotate)",
    "name": "the bench was not told by which name the broker tells clients where it is (Controls.name)",
    "namespaces": "this machine gives a process no hosts file of its own (`unshare --mount`)",
    "proxy": "the transport has no address that a proxy can stand in for",
}
"""What a case may need → what is the matter where it is missing."""


class ConformanceError(AssertionError):
    """A transport did not do what the suite expects."""


class Case(msgspec.Struct, frozen=True):
    """One behaviour that every transport shows.

    Attributes:
        group: `core`, `order`, `failure` or `load`.
        guarantee: what it shows, in a sentence.
        needs: names of NEEDS.
        within_s: it has failed when it takes longer.
    """

    name: str
    group: str
    guarantee: str
    run: Run
    needs: tuple[str, ...] = ()
    within_s: float = 45.0

    def __str__(self) -> str:
        return self.name

    def not_applicable(self, bench: Bench) -> str | None:
        """Return why this case does not apply to `bench`, or None if it does."""
        return next((bench.reason(need) for need in self.needs if not bench.can(need)), None)


class Result(msgspec.Struct, frozen=True):
    """What became of one case.

    Attributes:
        outcome: `n/a` for a case that does not apply.
        seconds: how long it took.
        note: why it failed or does not apply, or what it measured.
    """

    case: str
    outcome: Literal["passed", "failed", "n/a"]
    seconds: float
    note: str = ""


_cases: dict[str, Case] = {}


class Group:
    """Cases that belong together."""

    def __init__(self, name: str) -> None:
        self.name = name

    def case(self, *needs: str, within_s: float = 45.0) -> Callable[[Run], Run]:
        """Register a case under its function's name; the first line of its docstring is the guarantee."""
        unknown = set(needs) - set(NEEDS)
        if unknown:
            raise ValueError(f"a case cannot need {', '.join(sorted(unknown))}; there are: {', '.join(NEEDS)}")

        def register(run: Run) -> Run:
            name: str = run.__name__
            if name in _cases:
                raise ValueError(f"two cases are called {name}")
            guarantee = (run.__doc__ or "").strip().splitlines()[0]
            _cases[name] = Case(name, self.name, guarantee, run, needs, within_s)
            return run

        return register


def all_cases() -> list[Case]:
    """Return the cases that were registered, in that order."""
    return list(_cases.values())


async def run_case(case: Case, bench: Bench) -> None:
    """Run one case.

    Raises: ConformanceError, or whatever went wrong in it.
    """
    try:
        async with asyncio.timeout(case.within_s + bench.patience_s):
            await case.run(bench)
    except TimeoutError as error:
        raise ConformanceError(f"{case.name} did not end within {case.within_s + bench.patience_s:g} s") from error


async def result_of(case: Case, bench: Bench) -> Result:
    """Return what becomes of one case; its failure becomes the note."""
    reason = case.not_applicable(bench)
    if reason is not None:
        return Result(case.name, "n/a", 0.0, reason)
    began = system_clock.monotonic()
    try:
        async with bench:
            await run_case(case, bench)
    except (AssertionError, TrunklineError, OSError, RuntimeError, ExceptionGroup) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        note = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        return Result(case.name, "failed", system_clock.monotonic() - began, note)
    return Result(case.name, "passed", system_clock.monotonic() - began, bench.note)
