"""Deadlines of many tasks with one timer.

Invariant: a task is cancelled at most once per entry, and only between `enter` and `leave`.
Cheaper than a timer per message: entering and leaving are a dictionary write each.
Read next: delivery.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

from trunkline.clock import Clock


class Deadlines:
    """Cancels tasks that stay inside longer than `timeout_s` seconds; None never does."""

    def __init__(self, timeout_s: float | None, clock: Clock) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._due: dict[asyncio.Task[Any], float] = {}
        self._expired: set[asyncio.Task[Any]] = set()
        self._armed = False

    def enter(self, task: asyncio.Task[Any]) -> None:
        """Start the time of `task`."""
        if self.timeout_s is None:
            return
        self._due[task] = self._clock.monotonic() + self.timeout_s
        if not self._armed:
            self._armed = True
            self._clock.call_later(self.timeout_s, self._check)

    def leave(self, task: asyncio.Task[Any]) -> bool:
        """End the time of `task`; return whether it had run out."""
        self._due.pop(task, None)
        if task in self._expired:
            self._expired.discard(task)
            return True
        return False

    def _check(self) -> None:
        now = self._clock.monotonic()
        self._armed = False
        for task, due in list(self._due.items()):  # in order of their deadlines
            if due > now:
                self._armed = True
                self._clock.call_later(due - now, self._check)
                return
            del self._due[task]
            self._expired.add(task)
            task.cancel()
