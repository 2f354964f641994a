"""`trunkline simulate`: what it searches, what it says, how it ends."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from trunkline.cli import commands
from trunkline.cli.simulate import _brokers, _faults
from trunkline.cli.simulate_view import progress_line
from trunkline.testing.simulator.campaign import Report

SHIPPING = "tests.unit.testing.simulator.shipping"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def simulate(tmp_path, monkeypatch):
    """Run the command in this process, in the clone's folder; its exit code must be `code`."""
    monkeypatch.chdir(ROOT)

    def run(*arguments, code=0):
        done = CliRunner().invoke(
            commands.app, ["simulate", *arguments, "--output", str(tmp_path)], env={"COLUMNS": "150", "NO_COLOR": "1"}
        )
        assert done.exit_code == code, done.output
        return done

    return run


def test_a_system_that_keeps_its_promises_ends_with_0_and_a_table(simulate, tmp_path):
    out = simulate(f"{SHIPPING}:careful", "--crash-sweep", "--points").stdout
    assert re.search(r"^rabbitmq: [\d,]+ runs, [\d,]+ steps, .* no promises broken$", out, re.MULTILINE)
    assert re.search(r"^crash +[\d,]+ +\d+ +\d+ *$", out, re.MULTILINE)
    assert re.search(r"^till +(\d+) +\1 \(100%\) +\1 \(100%\) +\d+$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_promise_ends_with_1_its_story_and_its_files(simulate, tmp_path):
    out = simulate(f"{SHIPPING}:hasty", code=1).stdout
    assert "broken: eventually charged_once" in out
    assert "CRASHES before its step" in out
    (command,) = re.findall(r"^replay: +trunkline simulate (.*)$", out, re.MULTILINE)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt", ".svg", ".mmd"}
    again = simulate(*command.split(), code=1).stdout
    assert [line for line in again.splitlines() if " CRASHES " in line] == [
        line for line in out.splitlines() if " CRASHES " in line
    ]


def test_a_tape_that_breaks_nothing_any_more_ends_with_0(simulate, tmp_path):
    simulate(f"{SHIPPING}:hasty", code=1)
    (tape,) = tmp_path.glob("*.json")
    tape.write_text(tape.read_text().replace(":hasty", ":careful"))
    out = simulate(f"{SHIPPING}:careful", "--replay", str(tape)).stdout
    assert out.startswith("nothing is broken on this tape; it was made when 'eventually charged_once' was")


def test_a_tape_of_something_else_is_refused(simulate, tmp_path):
    simulate(f"{SHIPPING}:hasty", code=1)
    (tape,) = tmp_path.glob("*.json")
    error = simulate(f"{SHIPPING}:careful", "--replay", str(tape), code=2).stderr
    assert f"is a tape of {SHIPPING}:hasty, not of {SHIPPING}:careful" in error


def test_a_system_as_it_is_written_gets_a_workload_from_its_types(simulate):
    found = json.loads(simulate(f"{SHIPPING}:system", "--crash-sweep", "--json").stdout)
    (report,) = found["brokers"]
    assert report["broker"] == "sqlite"
    assert report["faults"]["crash"]["happened"] == sum(row["steps"] for row in report["coverage"])


def test_a_service_alone_is_simulated(simulate):
    assert "post " in simulate(f"{SHIPPING}:post", "--crash-sweep").stdout


def test_several_brokers_are_simulated_one_after_the_other(simulate):
    out = simulate(f"{SHIPPING}:careful", "--crash-sweep", "-b", "kafka", "-b", "nats", "-b", "kafka").stdout
    assert re.findall(r"^(\w+): ", out, re.MULTILINE) == ["kafka", "nats"]


def test_the_option_all_is_every_broker(simulate):
    found = json.loads(simulate(f"{SHIPPING}:careful", "--seeds", "0", "-b", "all", "--json").stdout)
    assert [report["broker"] for report in found["brokers"]] == [
        "sqlite", "postgres", "rabbitmq", "kafka", "nats", "redis"
    ]  # fmt: skip


def test_json_has_story_and_files_of_a_failure(simulate):
    found = json.loads(simulate(f"{SHIPPING}:hasty", "--crash-sweep", "--json", code=1).stdout)
    (failure,) = found["brokers"][0]["failures"]
    assert failure["promise"] == "eventually charged_once"
    assert "CRASHES" in failure["story"]
    tape = failure["files"]["tape"]
    again = json.loads(simulate(f"{SHIPPING}:hasty", "--replay", tape, "--json", code=1).stdout)
    assert again["broken"]["promise"] == "eventually charged_once"


def test_a_fault_that_never_happens_ends_with_1_and_how_to_leave_it_out(simulate):
    done = simulate(f"{SHIPPING}:careful", "--points", "--broker", "sqlite", "--faults", "disk_full, duplicate", code=1)
    assert "duplicate never happened in" in done.stderr
    assert "naming the others: disk_full" in done.stderr
    assert re.search(r"^duplicate +0 +0 +0 +NEVER HAPPENED", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([f"{SHIPPING}:careful", "--broker", "pigeon"], "E701 no simulated broker 'pigeon'"),
        ([f"{SHIPPING}:careful", "--faults", "crash,flood"], "E701 no fault 'flood'"),
        ([f"{SHIPPING}:Bank"], "E214"),
        ([f"{SHIPPING}:nothing"], "E213"),
        ([f"{SHIPPING}:careful", "--replay", "none.json"], "E711"),
        (
            [f"{SHIPPING}:careful", "--replay", "none.json", "--seeds", "9", "--broker", "kafka"],
            "'--replay': the tape says it all; leave out --seeds, --broker",
        ),
        ([f"{SHIPPING}:careful", "--seeds", "many"], "not a whole number"),
    ],
)
def test_wrong_usage_ends_with_2(simulate, arguments, text):
    assert text in simulate(*arguments, code=2).stderr


def test_brokers_and_faults_are_completed():
    assert _brokers("k") == ["kafka"]
    assert "all" in _brokers("")
    assert _faults("crash,disk") == ["crash,disk_full"]


def test_progress_says_phase_speed_faults_and_coverage():
    report = Report(broker="kafka", phase="crash sweep", done=12, total=99, runs=12, seconds=2.0)
    report.fired.update({"crash": 12})
    report.places.add(("crash", "till", 3))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(progress_line(report))
    said = " ".join(captured.get().split())
    assert said == "kafka crash sweep 12 of 99 6/s 12 faults at 1 places"
