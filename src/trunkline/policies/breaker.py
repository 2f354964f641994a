"""When most messages fail, it is not the messages: begin nothing more for a while, then try one.

Invariant: a try that fails while the circuit is open does not count against its message, so an outage sets nothing
aside. Never does: stop or start anything by itself; it says when (consumer.py). Read next: delivery.py.
Source: the circuit breaker of M. Nygard, Release It!, 2007.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from trunkline.clock import Clock
from trunkline.errors import DefinitionError
from trunkline.policies.retry import describe


class Breaker(msgspec.Struct, frozen=True):
    """When a subscription pauses because whatever its handlers call is away.

    Attributes:
        messages: so many different messages must have failed in a row, and none been handled between.
        pause_s: nothing begins for so long; then one message is tried, and another one each time as long again, until
            one is handled. In seconds.
        on: exceptions that count, such as OSError; others neither open nor close it.
    Raises: DefinitionError E120 for numbers that are not more than 0, or what is no exception.
    """

    messages: int = 20
    pause_s: float = 30.0
    on: tuple[type[Exception], ...] = (Exception,)

    def __post_init__(self) -> None:
        if not (self.messages > 0 and self.pause_s > 0):
            raise DefinitionError("E120", f"{self!r}", "messages and pause_s are more than 0")
        on: Any = self.on  # whatever was given
        if not (isinstance(on, tuple) and all(isinstance(one, type) and issubclass(one, Exception) for one in on)):
            raise DefinitionError("E120", f"{self!r}", "on is a tuple of exception classes, such as (OSError,)")


class Circuit:
    """A Breaker at work, for one subscription in one process.

    Args:
        hold: begin nothing more. go_on: begin again.
        told: `paused` or `resumed`, and why.

    Attributes:
        is_open: whether too many failed and none was handled since.
    """

    def __init__(
        self,
        breaker: Breaker,
        clock: Clock,
        *,
        hold: Callable[[], None],
        go_on: Callable[[], None],
        told: Callable[[Literal["paused", "resumed"], str], None],
    ) -> None:
        self.is_open = False
        self._breaker = breaker
        self._clock = clock
        self._hold = hold
        self._go_on = go_on
        self._told = told
        self._failed: set[Any] = set()
        self._tried = 0
        self._timer: Any = None

    def begins(self) -> None:
        """Note that a message begins: while the circuit is open it is the only one until the next pause is over."""
        if self.is_open:
            self._hold()

    def failed(self, message: Any, error: BaseException, random: float) -> float | None:
        """Note that a try failed; return how long its message waits, or None if the try counts against it.

        Args:
            message: what tells it from others.
            random: a number in [0, 1), so that those that wait do not return together.
        """
        breaker = self._breaker
        if not isinstance(error, breaker.on):
            return None
        if self.is_open:
            # The longer it lasts, the longer each waits: so another one is tried each time, not the same few again.
            return breaker.pause_s * (1 + min(self._tried, breaker.messages) + random / 4)
        self._failed.add(message)
        if len(self._failed) >= breaker.messages:
            self.is_open, self._tried = True, 0
            self._hold()
            self._timer = self._clock.call_later(breaker.pause_s, self._try_one)
            self._told(
                "paused",
                f"{len(self._failed)} messages failed and none was handled between, the last with {describe(error)};"
                f" one is tried every {breaker.pause_s:g} s",
            )
        return None

    def _try_one(self) -> None:
        self._tried += 1
        self._timer = self._clock.call_later(self._breaker.pause_s, self._try_one)
        self._go_on()

    def handled(self) -> None:
        """Note that a message was handled: there is nothing to wait for."""
        self._failed.clear()
        if self.is_open:
            self.stop()
            self._told("resumed", "a message was handled")
            self._go_on()

    def stop(self) -> None:
        """Try no more."""
        self.is_open = False
        if self._timer is not None:
            self._timer.cancel()
