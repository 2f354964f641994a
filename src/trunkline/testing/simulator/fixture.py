"""`@simulate`: a test that is run again and again in simulated time, each time with other faults.

Invariant: what comes out is a plain function; no plugin is needed, and the test's other parameters stay fixtures.
Read next: campaign.py, story.py.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trunkline.errors import DefinitionError
from trunkline.service import Service, System
from trunkline.testing.simulator.campaign import Failure, Plan, carry_out, check_fired, repeat
from trunkline.testing.simulator.files import FOLDER, REPLAY, foot, write
from trunkline.testing.simulator.recording import load
from trunkline.testing.simulator.simulation import Client, Simulation
from trunkline.testing.simulator.story import tell

Function = Callable[..., Awaitable[None]]


def simulate(
    system: System | Service,
    *,
    crash_sweep: bool = True,
    points: bool = False,
    pairs: int = 0,
    seeds: int = 0,
    first_seed: int = 1,
    broker: str | Sequence[str] = "sqlite",
    output: str | Path = FOLDER,
    **options: Any,
) -> Callable[[Function], Callable[..., None]]:
    """Make a test of `async def test_…(sim)`: it uses the system, and may check what came of it.

    What it asserts must hold in every run; so must what it registers with `sim.eventually` and `sim.always`, and the
    promises of the framework. A run that breaks one fails the test with its story and the command that repeats it.

    Args:
        system: as it is deployed.
        crash_sweep, points, pairs, seeds, first_seed: what is searched; see Plan.
        broker: that is simulated, or several, one after the other.
        output: folder for tape, story and diagram of a failure.
        options: of Simulation, such as `override`, `always` and `faults`.
    Raises: DefinitionError E715 if the function is not async or takes nothing; what Simulation raises.
    """
    plan = Plan(crash_sweep=crash_sweep, points=points, pairs=pairs, seeds=seeds, first_seed=first_seed)
    brokers = [broker] if isinstance(broker, str) else list(broker)

    def make(function: Function) -> Callable[..., None]:
        signature = _without_sim(function)

        @functools.wraps(function)
        def test(*bound: Any, **fixtures: Any) -> None:
            simulation = Simulation(system, workload_of(bound, fixtures), broker=brokers[0], **options)
            _run(_Test(simulation, _target(function), Path(output)), plan, brokers)

        def workload_of(bound: Sequence[Any], fixtures: dict[str, Any]) -> Function:
            @functools.wraps(function)
            async def workload(sim: Client) -> None:
                await function(*bound, sim, **fixtures)

            return workload

        del test.__wrapped__  # pytest would read the parameters of that
        test.__signature__ = signature  # type: ignore[attr-defined]
        return test

    return make


def _without_sim(function: Function) -> inspect.Signature:
    """Return the signature of the test: without what stands for whoever uses the system."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    first = 1 if parameters and parameters[0].name == "self" else 0
    if not inspect.iscoroutinefunction(function) or len(parameters) <= first:
        raise DefinitionError(
            "E715", f"{function.__qualname__} cannot be simulated", f"write async def {function.__name__}(sim): ..."
        )
    return signature.replace(parameters=[*parameters[:first], *parameters[first + 1 :]])


class _Test:
    """One call of a test.

    Attributes:
        target: `tests/test_shop.py::test_orders`, as pytest calls it.
    """

    def __init__(self, simulation: Simulation, target: str, output: Path) -> None:
        self.simulation = simulation
        self.target = target
        self.output = output

    def fail(self, failure: Failure) -> NoReturn:
        """Fail with the story."""
        story = tell(failure)
        files = write(failure, story, self.target, self.output)
        _fail("\n".join([story.text(), *foot(failure, files, self.target)]))


def _run(test: _Test, plan: Plan, brokers: list[str]) -> None:
    if (tape := _tape(test.target)) is not None:
        recording = load(tape)
        ended = repeat(test.simulation.on(recording.broker), recording.tape, recording.promise)
        if isinstance(ended, Failure):
            _fail("\n".join([tell(ended).text(), *recording.remarks(ended.result)]))
        print("\n".join([f"nothing is broken on {tape}", *recording.remarks(ended)]))  # noqa: T201 - pytest shows it
        return
    for broker in brokers:
        report = carry_out(test.simulation.on(broker), plan)
        for doubt in report.doubts():
            warnings.warn(doubt, stacklevel=3)
        for failure in report.failures:
            test.fail(failure)
        check_fired(report)


def _target(function: Function) -> str:
    now = os.environ.get("PYTEST_CURRENT_TEST", "")
    return now.rpartition(" ")[0] or f"{function.__module__}::{function.__qualname__}"


def _tape(target: str) -> Path | None:
    """Return the tape that is to be repeated, if it is this test's."""
    named = os.environ.get(REPLAY)
    return Path(named) if named and load(Path(named)).target == target else None


def _fail(text: str) -> NoReturn:
    if (pytest := sys.modules.get("pytest")) is not None:
        pytest.fail(text, pytrace=False)
    raise AssertionError(text)
