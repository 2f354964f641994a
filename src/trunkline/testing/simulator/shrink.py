"""Make a tape that breaks a promise as short as can be.

Invariant: what comes out breaks the same promise. A decision's number depends on those before it, so what cannot be
left out where it stands is looked for again nearby, with few others. Source: Zeller and Hildebrandt, "Simplifying and
Isolating Failure-Inducing Input", IEEE TSE 28(2), 2002 (ddmin). Read next: story.py.
"""

from __future__ import annotations

from collections.abc import Callable

from trunkline.clock import Draws
from trunkline.testing.simulator.tape import Tape

Place = tuple[str, int]

FEW = 5
"""A tape of so few decisions is short enough to be read."""
TRIES = 400
"""How many tapes of few decisions are tried in place of one that ddmin leaves longer."""
NEARBY = 6
"""How far from where it stood a decision is looked for then."""


def shrink(tape: Tape, breaks: Callable[[Tape], bool], told: Callable[[int], None] = lambda _size: None) -> Tape:
    """Return a shorter tape for which `breaks` is true, as it is for `tape`.

    Args:
        told: given the number of decisions that are left, whenever it falls.
    """
    best = _minimal(tape, breaks, told)
    if best.size() > FEW:
        found = _with_few(best, breaks)
        if found is not None:
            told(found.size())
            best = _minimal(found, breaks, told)
    return _smaller_values(best, breaks)


def _minimal(tape: Tape, breaks: Callable[[Tape], bool], told: Callable[[int], None]) -> Tape:
    """Return a tape of which no single decision can be left out."""
    # Whole kinds first: the order of steps and the latencies are most of a tape, and seldom matter.
    for kind in sorted(tape.choices, key=lambda kind: -len(tape.choices[kind])):
        tried = tape.without({kind: set(tape.choices[kind])})
        if breaks(tried):
            tape = tried
            told(tape.size())
    places = [(kind, number) for kind, made in sorted(tape.choices.items()) for number in sorted(made)]
    return _only(tape, _ddmin(places, lambda some: breaks(_only(tape, some)), told))


def _only(tape: Tape, places: list[Place]) -> Tape:
    choices: dict[str, dict[int, int]] = {}
    for kind, number in places:
        choices.setdefault(kind, {})[number] = tape.choices[kind][number]
    return Tape(choices, tape.seed)


def _ddmin(places: list[Place], breaks: Callable[[list[Place]], bool], told: Callable[[int], None]) -> list[Place]:
    size = max(len(places) // 2, 1)
    while len(places) > 1:
        start, shorter = 0, False
        while start < len(places):
            rest = places[:start] + places[start + size :]
            if rest and breaks(rest):
                places, shorter = rest, True
                told(len(places))
            else:
                start += size
        if size == 1 and not shorter:
            break
        size = max(size // 2, 1)
    return places


def _with_few(tape: Tape, breaks: Callable[[Tape], bool]) -> Tape | None:
    """Return a tape of at most three decisions like those of `tape`, or near them, that breaks it too; None if none."""
    draws = Draws(tape.seed)
    faults = [
        kind
        for kind in tape.choices
        if kind != "order" and not kind.startswith("latency ") and not kind.endswith(" how")
    ]
    places = [(kind, number) for kind in faults for number in tape.choices[kind]]
    for tried in range(TRIES if places else 0):
        choices: dict[str, dict[int, int]] = {}
        for kind, number in draws.sample(places, min(len(places), 1 + tried % 3)):
            moved = number if kind.startswith("crash ") else max(0, number + draws.randint(-NEARBY, NEARBY))
            choices.setdefault(kind, {})[moved] = tape.choices[kind][number]
            if (how := tape.choices.get(f"{kind} how")) and draws.random() < 0.5:  # noqa: PLR2004 - as it was, or plain
                choices[f"{kind} how"] = dict(how)
        if breaks(found := Tape(choices, tape.seed)):
            return found
    return None


def _smaller_values(tape: Tape, breaks: Callable[[Tape], bool]) -> Tape:
    """Make each decision a smaller one, where that still breaks it: a plainer fault, an earlier crash."""
    for kind, number in [(kind, number) for kind, made in tape.choices.items() for number in made]:
        smaller: Tape | None = tape
        while smaller is not None:
            tape = smaller
            value = tape.choices[kind][number]
            tried = (_with(tape, kind, number, less) for less in (1, value // 2, value * 7 // 8, value - 1))
            smaller = next((one for one in tried if 0 < one.choices[kind][number] < value and breaks(one)), None)
    return tape


def _with(tape: Tape, kind: str, number: int, value: int) -> Tape:
    """Return a tape on which one decision has another value."""
    return Tape({**tape.choices, kind: {**tape.choices[kind], number: value}}, tape.seed)
