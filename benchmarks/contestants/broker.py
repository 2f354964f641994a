"""What the contestants of all brokers share: the broker's address, names of their own, orders, the clock, the load.

Invariant: depends on nothing but the standard library and orders.py. Read next: trunkline_on_brokers.py.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.cases import Run
from benchmarks.contestants.orders import encode, order

ROOT = Path(__file__).parents[2]
OUTSTANDING = 100
"""Publishes under way at once."""
BODIES = [encode(order(number)) for number in range(1000)]


def start(run: Run, name: str) -> dict[str, float]:
    """Start a broker and write down its address, before the contestants of a case run."""
    (run.shared / "url").write_text(_brokers("start", name).strip().partition("\t")[2])
    return {}


@contextmanager
def own_server(run: Run, kind: str) -> Iterator[Run]:
    """Start a broker for this run alone and yield the run with its address; it ends with its data."""
    name = f"{kind}@end-to-end"
    own = replace(run, shared=run.folder)
    start(own, name)
    try:
        yield own
    finally:
        _brokers("stop", "--wipe", name)


def _brokers(*arguments: str) -> str:
    command = [sys.executable, "-m", "scripts.brokers", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def start_kafka(run: Run) -> dict[str, float]:
    """See `start`."""
    return start(run, "kafka:lasting")


def start_rabbitmq(run: Run) -> dict[str, float]:
    """See `start`."""
    return start(run, "rabbitmq")


def start_nats(run: Run) -> dict[str, float]:
    """See `start`."""
    return start(run, "nats")


def start_redis(run: Run) -> dict[str, float]:
    """See `start`."""
    return start(run, "redis")


def start_postgres(run: Run) -> dict[str, float]:
    """See `start`."""
    return start(run, "postgres")


def url_of(run: Run) -> str:
    """Return the address of the broker that was started."""
    return (run.shared / "url").read_text()


def fresh_name() -> str:
    """Return a name that nothing on the broker has."""
    return f"bench-{uuid.uuid4().hex[:12]}"


class Stopwatch:
    """Wall clock and CPU of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, messages: int) -> dict[str, float]:
        """Return the rate and the CPU time of one message in µs."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {"per_s": messages / wall, "cpu_us": cpu / messages * 1e6}


async def outstanding(messages: int, publish: Callable[[int], Awaitable[object]]) -> dict[str, float]:
    """Call `publish(number)` for each message, OUTSTANDING at once, and measure."""
    numbers = iter(range(messages))

    async def publisher() -> None:
        for number in numbers:
            await publish(number)

    watch = Stopwatch()
    await asyncio.gather(*(publisher() for _ in range(OUTSTANDING)))
    return watch.read(messages)


async def publish_and_consume(
    messages: int, publish: Callable[[int], Awaitable[object]], consume: Awaitable[object]
) -> dict[str, float]:
    """Publish as `outstanding` does while `consume` takes all of them; measure until its last acknowledgement."""
    watch = Stopwatch()
    async with asyncio.TaskGroup() as group:
        group.create_task(outstanding(messages, publish))
        await consume
        return watch.read(messages)


class Together:
    """Messages of many tasks: those that come while one batch is under way leave together in the next.

    Args:
        send: sends the messages of these numbers and returns when the broker has confirmed them.
    """

    def __init__(self, send: Callable[[list[int]], Awaitable[object]]) -> None:
        self._send = send
        self._numbers: list[int] = []
        self._next: asyncio.Task[None] | None = None
        self._under_way = asyncio.Lock()

    async def publish(self, number: int) -> None:
        """Return when its batch is confirmed."""
        self._numbers.append(number)
        if self._next is None:
            self._next = asyncio.create_task(self._leave())
        await self._next

    async def _leave(self) -> None:
        async with self._under_way:
            numbers, self._numbers, self._next = self._numbers, [], None
            await self._send(numbers)
