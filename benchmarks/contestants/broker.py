"""What the contestants of all brokers share: the broker's address, names of their own, orders, the clock.

Invariant: depends on nothing but the standard library and orders.py. Read next: trunkline_on_brokers.py.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.cases import Run
from benchmarks.contestants.orders import encode, order

ROOT = Path(__file__).parents[2]
OUTSTANDING = 100
"""Publishes under way at once."""
BODIES = [encode(order(number)) for number in range(1000)]


def start(run: Run, name: str) -> dict[str, float]:
    """Start a broker and write down its address, before the contestants of a case run."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.brokers", "start", name], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    (run.shared / "url").write_text(done.stdout.strip().partition("\t")[2])
    return {}


def start_kafka(run: Run) -> dict[str, float]:
    """See `start`."""
    return start(run, "kafka")


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
