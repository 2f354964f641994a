"""What became of one delivery.

Invariant: every delivery ends in exactly one Outcome; delivery.settle is the only place that acts on it.
Read next: delivery.py.
"""

from __future__ import annotations

import msgspec


class Ack(msgspec.Struct, frozen=True):
    """Handled: its effects are committed and it is not delivered again."""


class RetryNow(msgspec.Struct, frozen=True):
    """Failed: run the handler again at once."""

    reason: str


class RetryLater(msgspec.Struct, frozen=True):
    """Failed: deliver again after a wait; on a Stream its key is parked meanwhile.

    Attributes:
        after_s: seconds to wait, jitter included.
        reason: why, one line.
    """

    after_s: float
    reason: str


class DeadLetter(msgspec.Struct, frozen=True):
    """Set aside with its reason.

    Attributes:
        code: stable code of the reason, such as `E412` or `handler`.
        reason: why, one line.
        detail: traceback or further lines, for `trunkline dead show`.
        holds: whether the later messages of its key wait until it is redriven or discarded (Streams).
    """

    code: str
    reason: str
    detail: str = ""
    holds: bool = True


class Discard(msgspec.Struct, frozen=True):
    """Dropped on purpose: expired, or the handler said so."""

    reason: str


Outcome = Ack | RetryNow | RetryLater | DeadLetter | Discard

ACK = Ack()
"""The one Ack; compare with `is` on hot paths."""

PASSED = Discard("no handler here takes this type")
"""What becomes of types on a Topic or Stream that this subscription does not handle."""
