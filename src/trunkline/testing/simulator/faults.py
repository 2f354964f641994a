"""What can go wrong in a simulated system, how often it does, and how often it did.

Invariant: nothing goes wrong that is not listed here, and nothing at all after `heal`.
Read next: network.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from trunkline.clock import Draws
from trunkline.testing.simulator.tape import Choices

CRASH = "crash"

KINDS = {
    CRASH: "a process dies between two of its steps, without a `finally`, and is started again",
    "stop": "a process is told to stop, finishes what it has begun, and is started again, as a deploy does",
    "request_lost": "a connection breaks before what was sent arrives",
    "confirm_lost": "a connection breaks after what was sent was done, before the answer arrives",
    "duplicate": "what was published is stored twice",
    "reorder": "a message of a Queue or Topic is handed out after later ones",
    "delay": "one step of the network takes seconds",
    "partition": "a process hears nothing, or is not heard, for a while",
    "broker_restart": "the broker is away for a while, and all connections break",
    "lease_expiry": "the broker takes a living process for dead and gives what it had to others",
    "slow_consumer": "a process does nothing for seconds, then goes on",
    "clock_skew": "the clock of a process is wrong from its start",
    "clock_jump": "the clock of a process jumps",
    "disk_full": "a commit is refused: no room",
    "fsync_error": "the disk fails under a commit; the process ends",
    "outside_error": "an outside service answers with an error before it has done anything",
    "answer_lost": "an outside service has done what was asked, and the answer does not arrive",
}
"""Fault → what happens."""

AT_BROKER = frozenset({"broker_restart", "stop", "slow_consumer", "lease_expiry"})
"""Those that happen when something arrives at the broker."""

RATES = {
    "broker_restart": 0.004,
    "lease_expiry": 0.004,
    "partition": 0.006,
    "clock_skew": 0.5,
    "fsync_error": 0.01,
    "stop": 0.01,
}
RATE = 0.02
"""How many of the occasions for a fault it takes, where it is on."""


class Faults:
    """The faults of one run.

    Args:
        on: those that are drawn; None draws which.
        told: told about each that happens.

    Attributes:
        fired: fault → how often it happened. at_broker: whether one of AT_BROKER can.
    """

    def __init__(self, choices: Choices, on: Collection[str] | None, told: Callable[[str, str], None]) -> None:
        self._choices = choices
        if on is None:
            draws = Draws(f"{choices.tape.seed} faults")
            on = [kind for kind in KINDS if draws.random() < 0.35]  # noqa: PLR2004 - about a third of them
        self.on = frozenset(on)
        self._rates = {kind: RATES.get(kind, RATE) if kind in self.on else 0.0 for kind in KINDS}
        # Where nothing can happen nothing is asked, which is most of what a run asks; a plain run counts occasions.
        asked = KINDS if not choices.random and not choices.tape.choices else {*choices.tape.choices, *self.on}
        self._choosers = {kind: choices.of(kind) for kind in KINDS if kind in asked}
        self.at_broker = not AT_BROKER.isdisjoint(self._choosers)
        self._told = told
        self._healed = False
        self.fired: dict[str, int] = {}

    def happens(self, kind: str, where: str) -> bool:
        """Return whether a fault happens now."""
        chooser = self._choosers.get(kind)
        if chooser is None or not chooser.happens(self._rates[kind]):
            return False
        self.note(kind, where)
        return True

    def note(self, kind: str, where: str) -> None:
        """Note that a fault happened."""
        self.fired[kind] = self.fired.get(kind, 0) + 1
        self._told(kind, where)

    def choose(self, kind: str, options: list[Any]) -> Any:
        """Return one of `options`; the first one is the plain one."""
        return options[self._choices.of(f"{kind} how")(len(options))]

    def fuse(self, node: str, steps: int) -> int:
        """Return before which step a process dies, 0 for never."""
        if self._healed:
            return 0
        chooser = self._choices.of(f"{CRASH} {node}")
        return chooser(1 if self._choices.random and CRASH not in self.on else steps)

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        self._healed = True
        self._choosers.clear()
        self.at_broker = False
