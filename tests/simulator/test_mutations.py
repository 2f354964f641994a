"""Each planted bug is found by the search that finds it soonest; where none is planted nothing is found.

The whole catalogue with every search: python -m tests.simulator.mutations
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

import pytest

from tests.simulator.mutations.__main__ import BEDS
from tests.simulator.mutations.bed import retries_of_two
from tests.simulator.mutations.hunt import Found, Mutation, attempts, hunt, plain_run, quickly
from tests.simulator.mutations.mistakes import MISTAKES
from tests.simulator.mutations.safeguards import SAFEGUARDS
from trunkline.testing.simulator import Tape
from trunkline.testing.simulator.broker import PROFILES
from trunkline.testing.simulator.search import Attempt, runs

HANDFUL = 6


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("mutation", [*SAFEGUARDS, *MISTAKES], ids=lambda one: one.name)
def test_a_planted_bug_is_found_and_its_tape_is_short(mutation: Mutation) -> None:
    found, short = quickly(mutation)
    if mutation.by:
        assert isinstance(found, Found), f"kept every promise in {found} runs"
        assert short is not None
        assert short.tape.size() <= HANDFUL, short.tape
    else:
        assert not isinstance(found, Found), found


@pytest.mark.parametrize("broker", PROFILES)
@pytest.mark.parametrize("bed", BEDS, ids=lambda one: one.__name__)
def test_without_a_bug_nothing_is_found(bed, broker: str) -> None:
    simulation = bed(broker)
    plain = plain_run(simulation)
    for by, most in (("plain", 1), ("crash sweep", 4), ("point sweep", 7), ("random", 4)):
        found = hunt(simulation, islice(attempts(simulation, plain, by), most))
        assert not isinstance(found, Found), found


def test_a_key_that_is_parked_while_the_parked_are_read_is_not_forgotten() -> None:
    """Of the simulated store: what was submitted in the meantime must be among what it tells."""
    ((_, result),) = runs(retries_of_two("kafka"), [Attempt(Tape(seed=709), "seed 709", random=True)])
    assert result.violations == []
