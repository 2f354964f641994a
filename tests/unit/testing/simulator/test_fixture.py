"""`@simulate`: a plain test function that fails with a story, and repeats a tape when it is told to."""

import inspect
import re

import pytest

from tests.unit.testing.simulator.shipping import Bank, CarefulBank, HastyBank, charged_once, system, two_sales
from trunkline.errors import ConfigurationError, DefinitionError, SimulationError
from trunkline.testing.simulator import simulate
from trunkline.testing.simulator.files import REPLAY


@simulate(system, override={Bank: CarefulBank}, broker=["sqlite", "rabbitmq"])
async def test_a_test_that_holds_in_every_run_passes(sim):
    sim.eventually(charged_once)
    await two_sales(sim)
    await sim.rest()
    assert sim.rows("till", "SELECT sum(cents) FROM sale") == [(350,)]
    assert sim.outside(Bank).total == 350


@pytest.mark.parametrize("cents", [1, 2])
@simulate(system, override={Bank: CarefulBank}, crash_sweep=False)
async def test_other_parameters_are_fixtures(sim, cents, tmp_path):
    assert cents in {1, 2}
    assert tmp_path.is_dir()


class TestInAClass:
    @simulate(system, override={Bank: CarefulBank}, crash_sweep=False)
    async def test_a_method_is_a_test_too(self, sim):
        assert isinstance(self, TestInAClass)
        await two_sales(sim)


@simulate(system, override={Bank: CarefulBank}, crash_sweep=False)
async def skipped(sim):
    pytest.skip("the bank is closed")


def test_a_test_may_skip_itself():
    with pytest.raises(pytest.skip.Exception, match="the bank is closed"):
        skipped()


def test_a_test_that_calls_fail_tells_a_story(tmp_path):
    @simulate(system, override={Bank: CarefulBank}, crash_sweep=False, output=tmp_path)
    async def failing(sim):
        pytest.fail("the bank is closed")

    assert failure_of(failing).startswith("broken: failing\n  the bank is closed")


def hasty(folder):
    """Return a test with a planted bug."""

    @simulate(system, override={Bank: HastyBank}, broker="rabbitmq", output=folder)
    async def test_hasty(sim):
        await two_sales(sim)
        await sim.rest()
        assert sim.outside(Bank).total == 350, "charged twice"

    return test_hasty


def failure_of(test):
    with pytest.raises(pytest.fail.Exception) as caught:
        test()
    return str(caught.value)


def test_a_failing_test_tells_the_story_and_how_to_repeat_it(tmp_path, request):
    text = failure_of(hasty(tmp_path))
    assert text.startswith("broken: test_hasty\n  charged twice")
    assert "CRASHES before its step" in text
    tape = re.search(r"replay: +TRUNKLINE_REPLAY=(\S+\.json) pytest (\S+)$", text)
    assert tape[2] == request.node.nodeid
    assert tmp_path.joinpath(tape[1]).exists()


def test_a_named_tape_is_repeated_and_nothing_else(tmp_path, monkeypatch, capsys):
    test = hasty(tmp_path)
    text = failure_of(test)
    monkeypatch.setenv(REPLAY, re.search(r"REPLAY=(\S+)", text)[1])
    again = failure_of(test)
    assert "found by:" not in again
    assert [line for line in again.splitlines() if "CRASHES" in line] == [
        line for line in text.splitlines() if "CRASHES" in line
    ]
    monkeypatch.setattr(HastyBank, "charge", CarefulBank.charge)
    monkeypatch.setattr(HastyBank, "taken", {}, raising=False)
    monkeypatch.setattr(HastyBank, "__init__", lambda bank: setattr(bank, "taken", {}))
    monkeypatch.setattr(HastyBank, "total", CarefulBank.total, raising=False)
    test()
    assert capsys.readouterr().out.startswith("nothing is broken on ")


def test_the_tape_of_another_test_changes_nothing(tmp_path, monkeypatch):
    text = failure_of(hasty(tmp_path))
    monkeypatch.setenv(REPLAY, re.search(r"REPLAY=(\S+)", text)[1])
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/test_other.py::test_other (call)")
    assert "found by:" in failure_of(hasty(tmp_path))


def test_a_named_tape_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(REPLAY, str(tmp_path / "none.json"))
    with pytest.raises(ConfigurationError, match="E711"):
        hasty(tmp_path)()


def test_without_pytest_a_failure_is_an_assertion(tmp_path, monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "pytest")
    with pytest.raises(AssertionError, match="broken: test_hasty"):
        hasty(tmp_path)()


def test_what_is_made_is_a_plain_function_that_pytest_takes_as_it_is():
    made = test_other_parameters_are_fixtures
    assert not inspect.iscoroutinefunction(made)
    assert list(inspect.signature(made).parameters) == ["cents", "tmp_path"]
    assert made.__name__ == "test_other_parameters_are_fixtures"


def test_an_error_of_the_test_itself_is_no_broken_promise():
    @simulate(system, override={Bank: CarefulBank})
    async def test_wrong(sim):
        await sim.publish("no message")

    with pytest.raises(SimulationError, match="E704 the workload failed"):
        test_wrong()


def test_a_fault_that_never_happens_fails_the_test():
    @simulate(system, override={Bank: CarefulBank}, faults=["crash", "duplicate"])
    async def test_quiet(sim):
        await two_sales(sim)

    test_quiet()  # a crash sweep cannot duplicate
    with pytest.raises(SimulationError, match="E714 on sqlite duplicate never happened"):
        simulate(system, override={Bank: CarefulBank}, faults=["crash", "duplicate"], points=True)(two_sales)()


@pytest.mark.parametrize("function", [lambda sim: None, two_sales.__class__], ids=["not async", "not a test"])
def test_what_is_no_async_function_of_a_client_is_refused(function):
    with pytest.raises(DefinitionError, match="E715"):
        simulate(system)(function)
