"""What to do with a message whose handler failed.

Invariant: pure; the same failures give the same verdict but for the jitter that is passed in.
Read next: delivery.py.
"""

from __future__ import annotations

import traceback

import msgspec

from trunkline.errors import (
    DecodeError,
    DefinitionError,
    DiscardError,
    RejectError,
    RetryLaterError,
    TrunklineError,
    safe_text,
)
from trunkline.outcome import DeadLetter, Discard, Outcome, RetryLater, RetryNow


class Retry(msgspec.Struct, frozen=True):
    """How often and when a failed message is tried again.

    Attributes:
        immediate: tries at once after the first failure.
        delays_s: then one try after each of these waits, in seconds.
        jitter: each wait is lengthened by up to this share of itself, so that failures do not return together.
        never: exceptions that are not worth another try.
    Raises: DefinitionError E120 for negative numbers.
    """

    immediate: int = 5
    delays_s: tuple[float, ...] = (10.0, 20.0, 30.0)
    jitter: float = 0.2
    never: tuple[type[Exception], ...] = ()

    def __post_init__(self) -> None:
        if self.immediate < 0 or self.jitter < 0 or any(delay < 0 for delay in self.delays_s):
            raise DefinitionError("E120", f"{self!r}", "immediate, delays_s and jitter are 0 or more")

    @property
    def longest_s(self) -> float:
        """Return the longest time from the first failure to the last try, in seconds."""
        return sum(self.delays_s) * (1 + self.jitter)

    def tries_again(self, error: BaseException) -> bool:
        """Return whether another try may help; not where an error says itself what becomes of its message.

        >>> Retry(never=(KeyError,)).tries_again(OSError()), Retry(never=(KeyError,)).tries_again(KeyError())
        (True, False)
        """
        if isinstance(error, (RejectError, DiscardError, RetryLaterError, DecodeError, *self.never)):
            return False
        return not isinstance(error, TrunklineError) or error.retryable

    def verdict(  # noqa: PLR0911 - one line per rule
        self, error: BaseException, failures: int, random: float
    ) -> Outcome:
        """Return what becomes of a message.

        Args:
            error: why its handler failed this time.
            failures: how often it failed, this time included; 1 or more.
            random: a number in [0, 1) for the jitter.

        >>> Retry(immediate=1, delays_s=(10,), jitter=0).verdict(OSError("away"), 1, 0.0)
        RetryNow(reason='OSError: away')
        >>> Retry(immediate=1, delays_s=(10,), jitter=0).verdict(OSError("away"), 2, 0.0)
        RetryLater(after_s=10.0, reason='OSError: away')
        >>> Retry(immediate=1, delays_s=(10,), jitter=0).verdict(OSError("away"), 3, 0.0).code
        'handler'
        >>> Retry().verdict(DecodeError("E412", "payload is not a valid order.placed"), 1, 0.0).reason
        'payload is not a valid order.placed'
        """
        reason = describe(error)
        match error:
            case RejectError():
                return DeadLetter("rejected", error.reason)
            case DiscardError():
                return Discard(error.reason)
            case RetryLaterError():
                return RetryLater(error.after_s, reason)
            case DecodeError():
                return DeadLetter(error.code, _first_line(safe_text(error).removeprefix(f"{error.code} ")))
        if not self.tries_again(error):
            return DeadLetter("handler", reason, detail(error))
        if failures <= self.immediate:
            return RetryNow(reason)
        round_number = failures - self.immediate - 1
        if round_number < len(self.delays_s):
            return RetryLater(float(self.delays_s[round_number] * (1 + self.jitter * random)), reason)
        return DeadLetter("handler", reason, detail(error))


def describe(error: BaseException) -> str:
    """Return an error as one line."""
    text = _first_line(safe_text(error))
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:300]


def detail(error: BaseException) -> str:
    """Return the traceback of an error, the last 16 KiB of it."""
    return safe_text("".join(traceback.format_exception(error)))[-16_384:]
