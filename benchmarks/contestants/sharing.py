"""Processes of one service that share a backlog, with as many lanes each as they are given.

The readers join first and are stopped while the backlog is published, so that none of it has been fetched when they go
on. Read next: trunkline_on_brokers.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import apsw
import uvloop

from benchmarks.cases import Run
from benchmarks.contestants.embedded import url as url_of_file
from benchmarks.contestants.orders import OrderCreated
from benchmarks.contestants.trunkline_on_brokers import PARTITIONS, address, declare, fill, settled
from trunkline import App, Service

JOIN_S = 60.0
"""Longest wait until every process has its share of the partitions."""


def consume(run: Run, processes: int, file: bool, **options: Any) -> dict[str, float]:  # noqa: FBT001 - from JSON
    """Handle and acknowledge a backlog with so many processes; `options` are those of `read`."""
    url = url_of_file(run.folder) if file else address(run)
    options |= {"url": url, "processes": processes}
    (run.folder / "counts").write_bytes(bytes(8 * processes))
    counts = _counts(run.folder)
    with ExitStack() as stack:
        readers = [_reader(stack, run, {**options, "number": number}) for number in range(processes)]
        for reader in readers:
            if not reader.stdout.readline():  # else it has joined
                raise RuntimeError("a reader did not start")
        with _unlocked(url) if file else nullcontext():
            for reader in readers:
                reader.send_signal(signal.SIGSTOP)
            for reader in readers:
                os.waitid(os.P_PID, reader.pid, os.WSTOPPED)  # before the lock is there to be taken again
        declare(options["kind"])
        uvloop.run(fill(run, url, _place(url, options["store"])))
        began = time.monotonic()
        for reader in readers:
            reader.send_signal(signal.SIGCONT)
        while sum(counts) < run.messages:
            if any(reader.poll() is not None for reader in readers):
                raise RuntimeError(f"a reader has ended; handled so far: {list(counts)}")
            time.sleep(0.002)
        for reader in readers:
            reader.stdin.close()
        ended = max(json.loads(reader.stdout.readline())["ended"] for reader in readers)
        for reader in readers:
            reader.wait()
    return {"per_s": run.messages / (ended - began)}


def _reader(stack: ExitStack, run: Run, options: dict[str, Any]) -> Any:
    """Start a reader that does not outlive `stack`."""
    given = json.dumps({"messages": run.messages, "folder": str(run.folder), "shared": "", "options": options})
    reader = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contest", "sharing:read", given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
    )  # fmt: skip
    stack.callback(reader.kill)
    return reader


@contextmanager
def _unlocked(url: str) -> Iterator[None]:
    """Keep the file's lock, so that no reader is stopped while it has it."""
    connection = apsw.Connection(url.removeprefix("sqlite:///"))
    connection.set_busy_timeout(10_000)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.close()


def _counts(folder: Path) -> memoryview:
    """Return how many messages each process has handled, shared by all of them."""
    with (folder / "counts").open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")


def _place(url: str, store: str) -> str:
    """`own` is the transport's own database."""
    return url if store == "own" else store


def read(run: Run, **options: Any) -> dict[str, float]:
    """Handle until standard input ends, then until the broker has every acknowledgement; see `_read`."""
    return {"ended": uvloop.run(_read(run, **options))}


async def _read(
    run: Run, *, number: int, processes: int, url: str, kind: str, store: str, lanes: int, wait_s: float
) -> float:
    declare(kind)
    counts = _counts(run.folder)
    service = Service("reader")

    @service.handle(after_dead_letter="continue", concurrency=lanes)
    async def handle(_order: OrderCreated) -> None:
        if wait_s:
            await asyncio.sleep(wait_s)
        counts[number] += 1

    gc.collect()
    gc.freeze()
    async with App(service, transport=url, store=_place(url, store)) as app:
        if kind == "stream":
            await _joined(app, PARTITIONS // processes)
        print("joined", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await settled(app)
        return time.monotonic()


async def _joined(app: App, share: int) -> None:
    """Wait until this process has so many partitions."""
    subscription = app._consumers[0].subscription  # noqa: SLF001
    async with asyncio.timeout(JOIN_S):
        while sum(app.transport.owns(subscription, number) for number in range(PARTITIONS)) != share:  # noqa: ASYNC110 - the broker says when
            await asyncio.sleep(0.02)
