"""Nothing confirmed is lost and no effect happens twice, whoever is killed whenever."""

import random

import pytest

from tests.faults import kill

CYCLES = 50


@pytest.mark.timeout(240)
@pytest.mark.xdist_group("kill")
def test_fifty_kills_lose_nothing_and_repeat_nothing(tmp_path):
    # A new seed each time; the report names it, and `python -m tests.faults.kill --seed` repeats the draws.
    report = kill.run(tmp_path, CYCLES, random.SystemRandom().randrange(1_000_000))
    print(report.describe())
    assert report.passed, report.describe()
    assert sum(report.kills.values()) == CYCLES
    assert report.verdict.counts["effects"] > 10 * CYCLES, "the load was too small to prove anything"
