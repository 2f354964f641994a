"""The only source of time, sleep, ids, randomness and threads.

Invariant: no other module reads a clock, draws a random number, sleeps or starts a thread, so a
virtual clock or a simulator can stand in for all of it. Read next: message.py.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import queue as _queue
import random as _random
import threading as _threading
import time as _time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from itertools import chain, count
from typing import Any, TypeVar

T = TypeVar("T")
_DIGITS = tuple(f"{number:02x}" for number in range(256))

Draws = _random.Random
"""Randomness that the same seed repeats: `Draws(7)`; for tests and faults, never for ids."""


class Clock:
    """Wall clock, monotonic clock, sleep, UUIDv7 ids and randomness of the running machine."""

    def __init__(self) -> None:
        self._rng = _random.Random()  # noqa: S311 - jitter, not secrets
        self._id_ms = -1
        self._id_until = 0.0
        self._ids: Iterator[str] = iter(())
        os.register_at_fork(after_in_child=self._forget_ids)

    now: Callable[[], float] = staticmethod(_time.time)
    """Seconds since the epoch, UTC."""

    monotonic: Callable[[], float] = staticmethod(_time.monotonic)
    """Seconds on a clock that never goes back; only differences mean something."""

    def utc(self) -> datetime:
        """Return the current time as an aware datetime in UTC."""
        return datetime.fromtimestamp(self.now(), UTC)

    async def sleep(self, seconds: float) -> None:
        """Suspend the calling task for `seconds`."""
        await asyncio.sleep(seconds)

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> Any:
        """Run `callback(*args)` on the loop after `seconds`; the result has `.cancel()`."""
        return asyncio.get_running_loop().call_later(seconds, callback, *args)

    def random(self) -> float:
        """Return a number in [0, 1)."""
        return self._rng.random()

    def stamp(self) -> tuple[str, float]:
        """Return a new id and the time it was made, in seconds since the epoch.

        The id is a UUIDv7 and rises within this process.
        Source: RFC 9562 §5.7 and §6.2 method 2: 48 bits of milliseconds, then random bits drawn once per
        millisecond, of which the last 48 count up.
        """
        now = self.now()
        if now >= self._id_until:
            self._renew_ids(now)
        # One step for all threads, and all of it in C.
        return next(self._ids), now

    def _renew_ids(self, now: float) -> None:
        ms = int(now * 1000)
        if ms <= self._id_ms:
            return  # (ms + 1) / 1000 was rounded down
        text = f"{ms:012x}"
        entropy = int.from_bytes(os.urandom(10), "big")
        variant = 0x8000 | ((entropy >> 48) & 0x3FFF)
        head = f"{text[:8]}-{text[8:]}-7{entropy >> 68:03x}-{variant:04x}-"
        # From 2**44, so that it has 12 digits without padding, to 2**48.
        first = (1 << 44) + (entropy & 0x7FFF_FFFF_FFFF)
        page = first >> 8
        # The last two digits of the first few hundred come from a table: to format a number took twice as long.
        self._ids = chain(
            map(f"{head}{page:x}".__add__, _DIGITS[first & 0xFF :]),
            map(f"{head}{page + 1:x}".__add__, _DIGITS),
            map(f"{head}%x".__mod__, count(page + 2 << 8)),
        )
        # After the ids are there: another thread that sees the new time takes them without asking.
        self._id_ms = ms
        self._id_until = (ms + 1) / 1000

    def new_id(self) -> str:
        """Return a UUIDv7; see `stamp`."""
        return self.stamp()[0]

    def _forget_ids(self) -> None:
        self._id_ms = -1
        self._id_until = 0.0


class ManualClock(Clock):
    """A clock that stands still until a test moves it with `advance`."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        super().__init__()
        self._now = start
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0
        self._cancelled: set[int] = set()
        self._rng = _random.Random(0)  # noqa: S311 - repeatable jitter
        self.now = lambda: self._now
        self.monotonic = lambda: self._now

    async def sleep(self, seconds: float) -> None:
        """Suspend until the clock was advanced by `seconds`."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        self.call_later(seconds, _end, woken)
        await woken

    def call_later(self, seconds: float, callback: Callable[..., object], *args: Any) -> Any:
        """Run `callback` when the clock has been advanced by `seconds`."""
        self._number += 1
        heapq.heappush(self._timers, (self._now + seconds, self._number, lambda: callback(*args)))
        return _ManualTimer(self._cancelled, self._number)

    async def advance(self, seconds: float) -> None:
        """Move time forward; run what falls due, in order, letting tasks react in between."""
        target = self._now + seconds
        while self._timers and self._timers[0][0] <= target:
            due, number, callback = heapq.heappop(self._timers)
            self._now = max(self._now, due)
            if number in self._cancelled:
                self._cancelled.discard(number)
                continue
            callback()
            await self._settle()
        self._now = target
        await self._settle()

    @staticmethod
    async def _settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _ManualTimer:
    def __init__(self, cancelled: set[int], number: int) -> None:
        self._cancelled = cancelled
        self._number = number

    def cancel(self) -> None:
        self._cancelled.add(self._number)


system_clock = Clock()
"""The clock of this process."""


MOST_THREADS = 1000
"""Most worker threads of a process; one is made when none is idle. An event loop's own are cores + 4."""


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS, "trunkline")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of its parent's threads


async def offload(function: Callable[..., T], *args: Any) -> T:
    """Run a blocking function in a worker thread; the only way to a thread.

    A thread cannot be interrupted: when the caller is cancelled, `function` goes on unheard.
    Raises: whatever `function` raises; RuntimeError for a StopIteration, which no future can carry.
    """
    return await asyncio.get_running_loop().run_in_executor(_threads(), _call, function, *args)


def _call(function: Callable[..., T], *args: Any) -> T:
    try:
        return function(*args)
    except StopIteration as error:  # as generators and coroutines do
        raise RuntimeError("a function raised StopIteration") from error


block: Callable[[float], None] = _time.sleep
"""Block the calling thread for so many seconds; for threads only, never on the loop."""


class WorkerThread:
    """One thread that runs jobs in order and reports each result to the loop.

    Cheaper than an executor: no future per job, one wake-up of the loop per result.
    """

    def __init__(self, name: str) -> None:
        self._jobs: _queue.SimpleQueue[tuple[Callable[[], object], Callable[..., object]] | None]
        self._jobs = _queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = _threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], object], done: Callable[[BaseException | None], object]) -> None:
        """Run `job()` in the thread, then `done(error or None)` on the loop."""
        self._jobs.put((job, done))

    def stop(self) -> None:
        """End the thread after the jobs already given to it."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            error: BaseException | None = None
            try:
                job()
            except Exception as caught:  # noqa: BLE001 - handed to the loop, which decides
                error = caught
            if self._loop.is_closed():
                return  # whoever waited has gone: a job that took too long was left behind
            self._loop.call_soon_threadsafe(done, error)
