"""The decisions of one run: drawn from a seed, written down, read back, changed.

Invariant: of every decision 0 is the plain one (first come first served, no fault), and only others are kept, so what
is left out of a tape did not happen. Each kind of decision is counted by itself: to change one kind moves no other.
Read next: loop.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from trunkline.clock import Draws


class Tape(msgspec.Struct, frozen=True):
    """What makes a run come out as it did; a JSON file.

    Attributes:
        choices: kind of decision → its number, from 0 → what was decided, where it was not 0.
        seed: of whatever user code draws.
    """

    choices: dict[str, dict[int, int]] = {}
    seed: int = 0

    def size(self) -> int:
        """Return how many decisions are not the plain one."""
        return sum(map(len, self.choices.values()))

    def without(self, removed: Mapping[str, set[int]]) -> Tape:
        """Return a tape on which some decisions are the plain ones."""
        kept = {
            kind: {number: value for number, value in made.items() if number not in removed.get(kind, ())}
            for kind, made in self.choices.items()
        }
        return Tape({kind: made for kind, made in kept.items() if made}, self.seed)


class Chooser:
    """One kind of decision.

    Attributes:
        made: number of the decision → what was decided, where it was not 0.
    """

    __slots__ = ("_count", "_draw", "_given", "made")

    def __init__(self, given: Mapping[int, int], draw: Callable[[], float] | None) -> None:
        self._given = given
        self._draw = draw
        self._count = 0
        self.made: dict[int, int] = {}

    def __call__(self, options: int) -> int:
        """Return a number from 0 to `options` - 1."""
        number = self._count
        self._count = number + 1
        if self._draw is not None:
            value = int(self._draw() * options)
        else:
            value = self._given.get(number, 0)
            if value >= options:
                value = options - 1
        if value:
            self.made[number] = value
        return value

    def happens(self, rate: float) -> bool:
        """Return whether a fault happens, which `rate` of all do."""
        number = self._count
        self._count = number + 1
        happens = self._draw() < rate if self._draw is not None else bool(self._given.get(number))
        if happens:
            self.made[number] = 1
        return happens

    @property
    def count(self) -> int:
        """How many decisions there were."""
        return self._count


class Choices:
    """All decisions of one run.

    Args:
        tape: is read back where `random` is False.
        random: draw from the tape's seed; an attribute too.
    """

    def __init__(self, tape: Tape, *, random: bool) -> None:
        self.tape = tape
        self.random = random
        self._choosers: dict[str, Chooser] = {}

    def of(self, kind: str) -> Chooser:
        """Return what decides about one kind of thing."""
        chooser = self._choosers.get(kind)
        if chooser is None:
            draw = Draws(f"{self.tape.seed} {kind}").random if self.random else None
            chooser = self._choosers[kind] = Chooser(self.tape.choices.get(kind, {}), draw)
        return chooser

    def made(self) -> Tape:
        """Return the tape of this run."""
        return Tape({kind: dict(one.made) for kind, one in self._choosers.items() if one.made}, self.tape.seed)

    def counts(self) -> dict[str, int]:
        """Return how many decisions of each kind there were."""
        return {kind: one.count for kind, one in self._choosers.items()}
