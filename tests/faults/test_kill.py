"""Nothing confirmed is lost and no effect happens twice, whoever is killed whenever."""

import random

import pytest

from tests.faults import file, kill
from tests.faults.processes import until

CYCLES = 50


@pytest.mark.timeout(240)
@pytest.mark.xdist_group("kill")
def test_fifty_kills_lose_nothing_and_repeat_nothing(tmp_path):
    # A new seed each time; the report names it, and `python -m tests.faults.kill --seed` repeats the draws.
    said = []
    report = kill.run(tmp_path, CYCLES, random.SystemRandom().randrange(1_000_000), say=said.append)
    print(*said, report.describe(), sep="\n")
    assert report.passed, report.describe()
    assert sum(report.kills.values()) == CYCLES
    assert report.verdict.counts["effects"] > 10 * CYCLES, "the load was too small to prove anything"
    assert said[-1].startswith("drained: ")


def test_a_drain_that_settles_something_now_and_then_may_take_any_time():
    patience = kill.Patience(60, now_s=0)
    for step in range(100):
        patience.look(step, 59 * step, "much waits")


def test_a_drain_that_settles_nothing_for_too_long_is_given_up():
    patience = kill.Patience(60, now_s=0)
    patience.look(7, 59, "3 wait")
    patience.look(7, 119, "3 wait")
    with pytest.raises(kill.StalledError, match="nothing was settled for 60 s: 3 wait"):
        patience.look(7, 120, "3 wait")


@pytest.mark.timeout(120)
def test_a_drain_without_consumers_is_reported_with_what_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(kill, "TELL_S", 0.0)
    said = []
    run = kill.Run(tmp_path, 1, 0.02, said.append, stall_s=4.0)
    try:
        for role in run.roles:
            run.start(role)
        for role in run.roles:
            run.running[role].wait_line("ready")
        for role in run.roles[2:]:
            run.running[role].kill()
        until(lambda: file.backlog(run.path), "something waits")
        with pytest.raises(kill.StalledError, match=r"nothing was settled for 4 s: [1-9]\d* wait"):
            run.drain()
        assert len(said) > 1
        assert all(line.startswith("draining: ") for line in said)
    finally:
        run.close()
