"""What is measured: cases, the contestants of each, and the rows that are read from them.

Invariant: a ratio compares contestants of one case only, round by round, and is above 1 where Trunkline is better.
Never does: run anything (runner.py). Read next: embedded.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

Samples = dict[str, list[dict[str, float]]]
"""Contestant → what it measured, one entry per round."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a case; it runs in a process of its own.

    Attributes:
        name: as tables show it.
        target: `module:function` below benchmarks.contestants.
        share: part of the case's messages it gets, for slow ones.
        peer: whether it runs in the environment of peers (peers.py) instead of Trunkline's.
        needs: programs that must be on PATH.
        options: keyword arguments of the function.
    """

    name: str
    target: str
    share: float = 1.0
    peer: bool = False
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """What a figure must reach.

    Attributes:
        of: the figure itself, or its ratio to the other contestant.
    """

    number: float
    direction: Literal["at least", "at most"] = "at least"
    of: Literal["value", "ratio"] = "value"

    def met(self, value: float, ratio: float | None) -> bool | None:
        """Return whether it is reached; None if the ratio is not known."""
        figure = value if self.of == "value" else ratio
        if figure is None:
            return None
        return figure >= self.number if self.direction == "at least" else figure <= self.number

    def text(self, unit: str) -> str:
        """Return it as tables show it."""
        sign = "≥" if self.direction == "at least" else "≤"
        return f"{sign} {self.number:,g} {unit if self.of == 'value' else '× against'}".strip()


@dataclass(frozen=True)
class Row:
    """One line of the results, read from what a case measured.

    Attributes:
        case: its name.
        metric: key in what contestants measured.
        unit: of the value.
        subject: contestant that is Trunkline's.
        against: contestant it is compared with; None compares with nothing.
        against_metric: key of the other, where it differs.
        lower: whether lower values are better.
        difference: the value is how much more the subject needs than the other, not a ratio.
    """

    case: str
    metric: str
    unit: str
    subject: str
    against: str | None = None
    goal: Goal | None = None
    against_metric: str | None = None
    lower: bool = False
    difference: bool = False

    def read(self, samples: Samples) -> dict[str, Any]:
        """Return the result; where the other contestant did not run, it has no ratio."""
        own = [sample[self.metric] for sample in samples[self.subject]]
        others = [sample[self.against_metric or self.metric] for sample in samples.get(self.against or "", ())]
        value = median(own)
        ratio = None
        if self.difference:
            own = [mine - other for mine, other in zip(own, others, strict=True)]
            value = median(own)
        elif others:
            pairs = zip(own, others, strict=True)
            ratio = median(other / mine if self.lower else mine / other for mine, other in pairs)
        spread = (max(own) - min(own)) / value if value else 0.0
        return {
            "case": self.case,
            "value": _rounded(value),
            "unit": self.unit,
            "ratio": None if ratio is None else _rounded(ratio),
            "against": self.against,
            "goal": None if self.goal is None else self.goal.text(self.unit),
            "met": None if self.goal is None else self.goal.met(value, ratio),
            "subject": self.subject,
            "against_value": _rounded(median(others)) if others else None,
            "spread": _rounded(spread),
            "rounds": len(own),
        }


@dataclass(frozen=True)
class Case:
    """Contestants that run in turn, and what is read from them.

    Attributes:
        messages: how many each handles in a full run.
        quick: the same in a quick run.
        rounds: least number of rounds of a full run.
        prepare: `module:function` that makes files for all of them, once; cases that name the same share them.
    """

    name: str
    contestants: Sequence[Contestant]
    rows: Sequence[Row]
    messages: int
    quick: int
    rounds: int = 5
    prepare: str | None = None


@dataclass(frozen=True)
class Run:
    """What one process of a contestant is given.

    Attributes:
        folder: empty; its own.
        shared: what the case prepared.
    """

    messages: int
    folder: Path
    shared: Path


def _rounded(number: float) -> float:
    """Keep four figures: more would pretend to a precision that is not there."""
    return float(f"{number:.4g}")
