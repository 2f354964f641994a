"""Frozen facts handed to observers: what happened, never a way to change it.

Invariant: an observer that fails is logged and left out of nothing else; hooks cannot alter a delivery.
Read next: delivery.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import msgspec

log = logging.getLogger("trunkline")

FactKind = Literal["retried", "parked", "buried", "discarded", "duplicate", "paused", "resumed", "slow"]


class Fact(msgspec.Struct, frozen=True):
    """Something an operator may want to know about one delivery or subscription.

    Attributes:
        kind: what happened.
        subscription: which reader.
        channel: where the message came from.
        message_id: which message, or empty when it is about the subscription.
        message_type: its type, if known.
        attempt: failures so far.
        reason: why, one line.
    """

    kind: FactKind
    subscription: str
    channel: str
    message_id: str = ""
    message_type: str = ""
    attempt: int = 0
    reason: str = ""


Observer = Callable[[Fact], None]


class Hooks:
    """Observers of one App.

    Attributes:
        raised: called with the message's id and what its handler raised, before the fact that says what becomes of it;
            for the simulator, whose stories say where.
    """

    def __init__(self) -> None:
        self._observers: list[Observer] = [log_fact]
        self.raised: Callable[[str, Exception], None] | None = None

    def add(self, observer: Observer) -> None:
        """Call `observer` with each fact from now on."""
        self._observers.append(observer)

    def emit(self, fact: Fact) -> None:
        """Tell every observer."""
        for observer in self._observers:
            try:
                observer(fact)
            except Exception:
                log.exception("observer %r failed on %r", observer, fact)


WORDS: dict[FactKind, str] = {"buried": "set aside"}
"""What a kind is called in the log, where people know it by another name."""


def log_fact(fact: Fact) -> None:
    """Write a fact to the `trunkline` logger: what needs a human as a warning, the rest as info."""
    level = logging.WARNING if fact.kind in {"buried", "paused", "slow"} else logging.INFO
    if not fact.message_id:
        log.log(level, "%s %s@%s: %s", fact.kind, fact.subscription, fact.channel, fact.reason)
        return
    log.log(
        level,
        "%s %s %s on %s@%s attempt %d: %s",
        WORDS.get(fact.kind, fact.kind), fact.message_type, fact.message_id, fact.subscription, fact.channel,
        fact.attempt, fact.reason,
    )  # fmt: skip
