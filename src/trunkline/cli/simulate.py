"""`trunkline simulate`: look for a run of a system in which a promise is broken; repeat one from its tape.

Read next: simulate_view.py, ../testing/simulator/campaign.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.cli import options
from trunkline.cli.target import load_object
from trunkline.cli.terminal import FAILED, print_json
from trunkline.config import load_settings
from trunkline.errors import ConfigurationError

if TYPE_CHECKING:
    from trunkline.testing.simulator.campaign import Failure, Plan, Report
    from trunkline.testing.simulator.files import Files
    from trunkline.testing.simulator.simulation import Simulation
    from trunkline.testing.simulator.story import Story

PAIRS = SEEDS = 200
"""How many of each are run if nothing is said."""
ALL = "all"


def _brokers(incomplete: str) -> list[str]:
    from trunkline.testing.simulator.broker import PROFILES

    return [name for name in (*PROFILES, ALL) if name.startswith(incomplete)]


def _faults(incomplete: str) -> list[str]:
    from trunkline.testing.simulator.faults import KINDS

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in KINDS if name.startswith(last)]


Target = Annotated[
    str | None,
    typer.Argument(
        metavar="MODULE:OBJECT",
        help="A System, Service, App or Simulation, such as shop:system. Default: `app` in trunkline.toml.",
        show_default=False,
    ),
]
CrashSweep = Annotated[bool, typer.Option("--crash-sweep", help="Crash each service before each of its steps.")]
Points = Annotated[bool, typer.Option("--points", help="Try each other fault at each single occasion.")]
Pairs = Annotated[
    int | None, typer.Option("--pairs", min=0, metavar="N", help="Try so many pairs of these.", show_default=False)
]
Seeds = Annotated[
    int | None, typer.Option("--seeds", min=0, metavar="N", help="Draw so many runs at random.", show_default=False)
]
FirstSeed = Annotated[int, typer.Option("--first-seed", metavar="N", help="The first of these seeds.")]
Broker = Annotated[
    list[str] | None,
    typer.Option(
        "--broker",
        "-b",
        metavar="NAME",
        help="Broker to simulate; may be repeated, or be all. Default: that of the Simulation, or sqlite.",
        show_default=False,
        autocompletion=_brokers,
    ),
]
Faults = Annotated[
    str | None,
    typer.Option(
        "--faults",
        metavar="A,B",
        help="Only these faults, such as crash,disk_full.",
        show_default=False,
        autocompletion=_faults,
    ),
]
Replay = Annotated[
    Path | None, typer.Option("--replay", metavar="TAPE", help="Repeat the run of this file.", show_default=False)
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where tape, story and diagram of a failure go.")
]
Processes = Annotated[int, typer.Option("--processes", "-j", min=1, max=256, help="Search in so many processes.")]
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Search on after a broken promise; each is told once.")]


def simulate(  # noqa: PLR0913 - the options of a command
    target: Target = None,
    *,
    crash_sweep: CrashSweep = False,
    points: Points = False,
    pairs: Pairs = None,
    seeds: Seeds = None,
    first_seed: FirstSeed = 1,
    broker: Broker = None,
    faults: Faults = None,
    replay: Replay = None,
    output: Output = Path("simulation-failures"),
    processes: Processes = 1,
    keep_going: KeepGoing = False,
    as_json: options.AsJson = False,
) -> None:
    """Look for a run that breaks a promise, in simulated time.

    Faults happen in it: crashes, lost connections, full disks and others. Nothing is connected, and nothing written but
    the files of a failure. Without --crash-sweep, --points, --pairs and --seeds
    all of them are searched, with 200 pairs and 200 seeds.

    Exit codes: 0 every promise was kept, 1 one was broken or a fault never happened, 2 wrong usage.
    """
    from trunkline.testing.simulator.campaign import Plan

    name, simulation = _load(target)
    kinds = None if faults is None else [kind.strip() for kind in faults.split(",")]
    if replay is not None:
        given = {
            "--crash-sweep": crash_sweep, "--points": points, "--pairs": pairs, "--seeds": seeds, "--broker": broker,
            "--faults": faults, "--keep-going": keep_going,
        }  # fmt: skip
        if also := [option for option, value in given.items() if value]:
            raise typer.BadParameter(f"the tape says it all; leave out {', '.join(also)}", param_hint="'--replay'")
        raise typer.Exit(_replay(simulation, name, replay, as_json=as_json))
    nothing = not (crash_sweep or points) and pairs is None and seeds is None
    plan = Plan(
        crash_sweep=crash_sweep or nothing, points=points or nothing, pairs=PAIRS if nothing else pairs or 0,
        seeds=SEEDS if nothing else seeds or 0, first_seed=first_seed, keep_going=keep_going, processes=processes,
    )  # fmt: skip
    chosen = [simulation.on(one, kinds) for one in _chosen(broker, simulation)]
    reports = [_search(one, plan) for one in chosen]
    told = [_Told(failure, name, output) for report in reports for failure in report.failures]
    if as_json:
        print_json({"target": name, "brokers": [_as_json(report, told) for report in reports]})
    else:
        _write(reports, told)
    _judge(reports)


def _load(target: str | None) -> tuple[str, Simulation]:
    """Return what is named, and a simulation of it; of a System, one whose workload is made from its types.

    Raises: ConfigurationError E210 to E214, E710 or E713 if no workload can be made; DefinitionError.
    """
    from trunkline.app import App
    from trunkline.service import Service, System
    from trunkline.testing.simulator.payloads import workload_of
    from trunkline.testing.simulator.simulation import Simulation

    name, found = load_object(load_settings(app=target))
    if isinstance(found, App):
        found = found.system
    match found:
        case Simulation():
            return name, found
        case System():
            return name, Simulation(found, workload_of(found))
        case Service():
            return name, Simulation(found, workload_of(System(found.name, [found])))
    raise ConfigurationError(
        "E214", f"{name} is a {type(found).__name__}", "a System, Service, App or Simulation is needed"
    )


def _chosen(brokers: list[str] | None, simulation: Simulation) -> list[str]:
    from trunkline.testing.simulator.broker import PROFILES

    return list(PROFILES) if brokers and ALL in brokers else list(dict.fromkeys(brokers or [simulation.broker]))


def _search(simulation: Simulation, plan: Plan) -> Report:
    from trunkline.cli.simulate_view import Progress
    from trunkline.testing.simulator.campaign import carry_out

    with Progress() as progress:
        return carry_out(simulation, plan, progress.told)


class _Told:
    """A failure with its story and its files."""

    def __init__(self, failure: Failure, target: str, folder: Path) -> None:
        from trunkline.testing.simulator.files import foot, write
        from trunkline.testing.simulator.story import tell

        self.failure = failure
        self.story: Story = tell(failure)
        self.files: Files = write(failure, self.story, target, folder)
        self.foot = foot(failure, self.files, target)


def _write(reports: list[Report], told: list[_Told]) -> None:
    from trunkline.cli.simulate_view import write_report, write_story

    for report in reports:
        write_report(report)
    for one in told:
        write_story(one.story, one.foot)


def _as_json(report: Report, told: list[_Told]) -> dict[str, Any]:
    import msgspec

    from trunkline.cli.simulate_view import as_json

    return as_json(report) | {
        "failures": [
            {
                "promise": one.failure.violation.promise,
                "text": one.failure.violation.text,
                "found": one.failure.found.aim,
                "story": one.story.text(),
                "files": {name: str(path) for name, path in msgspec.structs.asdict(one.files).items()},
            }
            for one in told
            if one.failure.broker == report.broker
        ]
    }


def _judge(reports: list[Report]) -> None:
    """End the command as its result asks for.

    Raises: SimulationError E714 if a fault was to happen and never did, and nothing worse was found.
    """
    from trunkline.testing.simulator.campaign import check_fired

    if any(report.failures for report in reports):
        raise typer.Exit(FAILED)
    for report in reports:
        check_fired(report)


def _replay(simulation: Simulation, name: str, path: Path, *, as_json: bool) -> int:
    """Repeat a tape and tell how it came out; return the exit code."""
    from trunkline.cli.simulate_view import write_replay
    from trunkline.testing.simulator.campaign import Failure, repeat
    from trunkline.testing.simulator.recording import load
    from trunkline.testing.simulator.story import tell

    recording = load(path)
    if recording.target != name:
        raise ConfigurationError(
            "E711", f"{path} is a tape of {recording.target}, not of {name}", "name what it was made of"
        )
    ended = repeat(simulation.on(recording.broker), recording.tape, recording.promise)
    story = tell(ended) if isinstance(ended, Failure) else None
    remarks = recording.remarks(ended.result if isinstance(ended, Failure) else ended)
    if as_json:
        print_json({"broken": story and story.violation, "story": story and story.text(), "remarks": remarks})
    else:
        write_replay(recording, story, remarks)
    return 0 if story is None else FAILED
