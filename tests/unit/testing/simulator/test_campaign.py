"""A whole search: what it covers, when it stops, what it finds, and that several processes find the same."""

import asyncio
import os
import signal

import pytest

from tests.unit.testing.simulator.shipping import HastyBank, make
from trunkline import Queue, Service, Struct
from trunkline.errors import SimulationError
from trunkline.testing.simulator import Client, Simulation, Tape, workers
from trunkline.testing.simulator.campaign import Failure, Plan, carry_out, check_fired, repeat
from trunkline.testing.simulator.files import foot, write
from trunkline.testing.simulator.story import tell

CRASHES = Plan(points=False)
CHECK = "eventually charged_once"


@pytest.fixture(scope="module")
def found():
    """The report on a system with a planted bug."""
    return carry_out(make(HastyBank), CRASHES)


def test_a_crash_sweep_crashes_every_node_before_every_one_of_its_steps():
    report = carry_out(make(), CRASHES)
    assert report.failures == []
    assert report.runs == 1 + sum(report.plain.values())
    assert report.places == {
        ("crash", node, step) for node, steps in report.plain.items() for step in range(1, steps + 1)
    }
    assert report.never_fired() == []


def test_who_dies_before_being_told_how_a_task_ended_leaves_no_error_unhandled():
    jobs, service = Queue("counted-jobs"), Service("counter")

    @jobs.command
    class Job(Struct):
        number: int

    told = []

    @service.handle
    async def work(job: Job) -> None:
        async def fail() -> None:
            raise OSError(job.number)

        task = asyncio.create_task(fail())
        task.add_done_callback(lambda ended: told.append(ended.exception()))
        await asyncio.sleep(1)

    async def workload(sim: Client) -> None:
        await sim.publish(Job(1))

    report = carry_out(Simulation(service, workload), CRASHES)
    assert report.failures == []
    assert told


def test_a_point_sweep_has_every_fault_that_has_an_occasion_happen():
    report = carry_out(make(), Plan(crash_sweep=False))
    assert report.failures == []
    assert {"request_lost", "confirm_lost", "disk_full", "answer_lost"} <= {
        kind for kind in report.tried if report.fired[kind]
    }
    assert report.never_fired() == []


def test_a_search_stops_at_the_first_broken_promise_and_says_which_run_broke_it(found):
    (failure,) = found.failures
    assert failure.violation.promise == CHECK
    assert failure.found.aim.startswith("crash till before step ")
    assert found.runs < 1 + sum(found.plain.values())


def test_a_search_that_keeps_going_makes_every_run_and_tells_each_promise_once():
    report = carry_out(make(HastyBank), Plan(points=False, keep_going=True))
    assert [failure.violation.promise for failure in report.failures] == [CHECK]
    assert report.runs == 1 + sum(report.plain.values())


def test_a_failure_from_a_seed_is_shrunk_to_the_faults_that_matter():
    (failure,) = carry_out(make(HastyBank), Plan(crash_sweep=False, points=False, seeds=200)).failures
    assert failure.found.aim.startswith("seed ")
    assert failure.removed > 10
    assert failure.result.tape.size() <= 3


def test_the_tape_of_a_failure_repeats_it_step_by_step(found):
    (failure,) = found.failures
    again = repeat(make(HastyBank), failure.result.tape, CHECK)
    assert isinstance(again, Failure)
    assert (again.violation, again.result.trace) == (failure.violation, failure.result.trace)


def test_a_tape_on_which_nothing_is_broken_any_more_gives_the_run(found):
    (failure,) = found.failures
    assert repeat(make(), failure.result.tape, CHECK).violations == []


def test_two_processes_find_what_one_finds():
    one, two = (carry_out(make(HastyBank), Plan(points=False, processes=processes)) for processes in (1, 2))
    assert [(each.runs, each.fired, each.places, each.failures[0].found) for each in (two,)] == [
        (one.runs, one.fired, one.places, one.failures[0].found)
    ]


def test_an_error_in_a_run_of_another_process_keeps_its_code_and_says_which_run():
    async def fails(sim):
        raise KeyError("no such sale")

    for processes in (1, 2):
        with pytest.raises(SimulationError, match=r"E704 the workload failed: KeyError.*\(in a run without faults\)"):
            carry_out(make(workload=fails), Plan(processes=processes))


def test_a_check_that_is_async_is_a_broken_promise():
    async def check(_view):
        """Say nothing."""

    for when in ("always", "eventually"):
        report = carry_out(make(**{when: [check]}), Plan(crash_sweep=False, points=False))
        assert report.failures[0].violation.text.startswith("it is async")


def test_what_cannot_be_written_is_told_below_the_story(found, tmp_path):
    (failure,) = found.failures
    (tmp_path / "file").touch()
    files = write(failure, tell(failure), "x:y", tmp_path / "file" / "below")
    assert "were not written: " in "\n".join(foot(failure, files, "x:y"))


def test_what_a_check_says_can_be_written_whatever_it_is(tmp_path):
    def check():
        raise AssertionError("half of a pair: \ud83d")

    report = carry_out(make(eventually=[check]), Plan(crash_sweep=False, points=False))
    (failure,) = report.failures
    files = write(failure, tell(failure), "x:y", tmp_path)
    assert not files.problem
    assert "\\ud83d" in files.story.read_text()


def test_a_process_that_is_killed_ends_the_search(monkeypatch):
    monkeypatch.setattr(workers, "_begin", lambda _simulation: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        SimulationError, match=r"E709 a process that ran schedules ended, at crash till before step 1 of \d+ or soon"
    ):
        carry_out(make(), Plan(processes=2))


def test_a_fault_that_was_asked_for_and_never_happens_is_refused():
    report = carry_out(make(broker="sqlite", faults=["crash", "duplicate"]), Plan())
    assert report.never_fired() == ["duplicate"]
    with pytest.raises(SimulationError, match=r"E714 on sqlite duplicate never happened in \d+ runs") as caught:
        check_fired(report)
    assert caught.value.hint.endswith("naming the others: crash")


def test_a_fault_with_occasions_that_never_happens_is_refused_unasked():
    report = carry_out(make(), Plan(crash_sweep=False, points=False, seeds=1))
    assert report.never_fired() != []
    assert all(report.occasions[kind] for kind in report.never_fired())


def test_a_broken_promise_that_the_same_tape_keeps_is_refused():
    calls = []

    def at_first(view):
        calls.append(view)
        assert len(calls) > 1

    with pytest.raises(
        SimulationError, match="E712 a run without faults broke 'eventually at_first', and the same tape"
    ):
        carry_out(make(eventually=[at_first]), CRASHES)


def test_what_a_workload_asserts_is_a_promise():
    async def checks(sim):
        await sim.rest()
        assert sim.rows("till", "SELECT * FROM sale") == [("s-1", 100)], "not what was sold"

    (failure,) = carry_out(make(workload=checks), CRASHES).failures
    assert failure.violation.promise == "checks"
    assert "not what was sold" in failure.violation.text


def test_a_workload_that_rests_sees_the_end():
    seen = []

    async def rests(sim):
        from tests.unit.testing.simulator.shipping import two_sales

        await two_sales(sim)
        await sim.rest()
        seen.append(sim.rows("till", "SELECT id FROM sale ORDER BY id"))

    result = repeat(make(workload=rests), Tape({"crash till": {0: 20}}), CHECK)
    assert result.fired == {"crash": 1}
    assert seen == [[("s-1",), ("s-2",)]]
