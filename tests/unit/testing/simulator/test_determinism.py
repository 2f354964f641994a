import subprocess
import sys

import pytest

from tests.unit.testing.simulator import determined
from trunkline.errors import ConfigurationError
from trunkline.testing.simulator import Tape, World
from trunkline.testing.simulator.determinism import check_determinism, check_seeds, load_simulation, main, record
from trunkline.testing.simulator.search import Attempt

HERE = "tests.unit.testing.simulator.determined"
PLAIN = Attempt(Tape(), "plain")
SEED = Attempt(Tape(seed=3), "seed 3", random=True)


def test_fifty_seeds_end_the_same_in_two_processes_under_two_hash_seeds_each():
    report = check_seeds(f"{HERE}:repeats", 50)

    assert report.same, report.text()
    assert report.runs == 200
    assert report.text() == "200 runs made again: each the same, step by step"


def test_a_run_is_the_same_step_by_step_in_another_process():
    report = check_determinism(determined.repeats, [PLAIN, SEED], target=f"{HERE}:made")

    assert report.same, report.text()
    assert report.runs == 4


@pytest.mark.parametrize(("name", "cause"), [("by_address", "hash by address"), ("by_run", "leaves to the next")])
def test_what_differs_within_a_process_is_reported_at_its_first_step(name, cause):
    report = check_determinism(getattr(determined, name), [SEED, PLAIN])

    assert not report.same
    text = report.text()
    assert text.startswith("E706 seed 3 is not the same made again in the same process: step ")
    assert "is stored on orders" in text
    assert "determined.py:" in text
    assert "in workload" in text
    assert cause in text


def test_the_order_of_a_set_of_texts_is_found_in_another_process():
    assert check_determinism(determined.by_text, [PLAIN]).same

    report = check_seeds(f"{HERE}:by_text", 2, processes=1, hash_seeds=2)

    assert not report.same
    assert "under PYTHONHASHSEED=" in report.text()
    assert "a set of str" in report.text()


def test_the_trace_of_a_run_shows_what_was_sent():
    one, two = (determined._publishing(lambda name=name: [name]) for name in ("a", "c"))

    traces = {World(each, Tape(), random=False).run().trace for each in (one, two)}

    assert len(traces) == 2


def test_a_record_tells_what_ran_what_was_sent_and_what_the_tables_hold():
    steps = record(determined.repeats, PLAIN)

    texts = [step.text for step in steps]
    assert any("task World._use at " in text and "in workload" in text for text in texts)
    assert any("is stored on ends" in text and '"order":"a"' in text for text in texts)
    assert any(text.startswith("table ordered holds [('a', '2023-11-14") for text in texts)
    assert texts[-1] == "violations: none"
    assert not any("0x" in text for text in texts)


def test_the_command_says_what_differs_and_fails(capfd):
    assert main([f"{HERE}:repeats", "--seeds", "1", "--processes", "1", "--hash-seeds", "1"]) == 0
    assert capfd.readouterr().out == "1 runs made again: each the same, step by step\n"

    assert main([f"{HERE}:by_text", "--seeds", "1", "--processes", "1", "--hash-seeds", "2"]) == 1
    assert capfd.readouterr().out.startswith("E706 seed 0 is not the same")


@pytest.mark.parametrize(
    ("target", "code"), [("nothing", "E210"), (f"{HERE}:_numbers", "E214"), (f"{HERE}:orders", "E214")]
)
def test_a_target_that_is_no_simulation_is_refused(target, code):
    with pytest.raises(ConfigurationError) as caught:
        load_simulation(target)
    assert caught.value.code == code


def test_a_process_that_fails_tells_why():
    with pytest.raises(ConfigurationError) as caught:
        check_seeds("no.such.module:simulation", 1)
    assert caught.value.code == "E708"
    assert "No module named" in caught.value.message


@pytest.mark.parametrize(("given", "expected"), [(None, "0"), ("random", "0"), ("7", "7")])
def test_a_command_pins_the_hash_seed_unless_it_is_set(given, expected, monkeypatch):
    code = (
        "import os, sys; from trunkline.testing.simulator.determinism import pin_hash_seed; pin_hash_seed();"
        "print(os.environ['PYTHONHASHSEED'], sys.argv[1:], sys.flags.hash_randomization)"
    )
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if given:
        monkeypatch.setenv("PYTHONHASHSEED", given)

    done = subprocess.run([sys.executable, "-c", code, "a b"], capture_output=True, text=True, check=True)

    assert done.stdout.split("\n")[0] == f"{expected} ['a b'] {int(expected != '0')}"
