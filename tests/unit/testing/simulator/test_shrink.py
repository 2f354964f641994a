"""Shrinking leaves the decisions that matter, whatever stands around them."""

from __future__ import annotations

from trunkline.testing.simulator.shrink import shrink
from trunkline.testing.simulator.tape import Tape

NOISE = {"order": dict.fromkeys(range(0, 300, 3), 1), "latency desk": dict.fromkeys(range(200), 2)}


def needs(**wanted: dict[int, int]):
    def breaks(tape: Tape) -> bool:
        return all(tape.choices.get(kind, {}).get(number) for kind, made in wanted.items() for number in made)

    return breaks


def test_of_a_long_tape_the_decisions_that_matter_are_left():
    tape = Tape({**NOISE, "disk_full": {3: 1, 8: 1}, "delay": {1: 1, 40: 1}})
    replays = []

    def breaks(tried: Tape) -> bool:
        replays.append(tried)
        return needs(disk_full={8: 1}, delay={40: 1})(tried)

    assert shrink(tape, breaks).choices == {"disk_full": {8: 1}, "delay": {40: 1}}
    assert len(replays) < 40


def test_a_tape_on_which_nothing_matters_becomes_empty():
    assert shrink(Tape(NOISE), lambda _tape: True).size() == 0


def test_values_become_smaller_and_crashes_earlier():
    def breaks(tape: Tape) -> bool:
        return tape.choices.get("crash desk", {}).get(0, 0) >= 25

    assert shrink(Tape({"crash desk": {0: 200}}), breaks).choices == {"crash desk": {0: 25}}


def test_what_many_decisions_move_into_place_is_found_with_few():
    """Whatever comes first moves the occasion: ten fillers in front of a fault, or the fault somewhat later."""
    fillers = dict.fromkeys(range(10), 1)

    def breaks(tape: Tape) -> bool:
        places = tape.choices.get("disk_full", {})
        moved = sum(tape.choices.get("latency desk", {}).values()) // 2
        return any(number + moved == 12 for number in places)

    assert shrink(Tape({"latency desk": fillers, "disk_full": {7: 1}}), breaks).size() == 1


def test_how_far_it_has_come_is_told():
    told: list[int] = []
    shrink(Tape({**NOISE, "delay": {1: 1}}), needs(delay={1: 1}), told.append)
    assert told == sorted(told, reverse=True)
    assert told[-1] == 1
