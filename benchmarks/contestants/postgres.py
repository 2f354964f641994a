"""PostgreSQL as a queue: what 100 publishers insert at the same time in one commit, one consumer with SKIP LOCKED.

Its own server for each run, default settings (fsync and synchronous_commit on). Runs in the environment of peers.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Run
from benchmarks.contestants.broker import BODIES, Together, publish_and_consume
from benchmarks.contestants.orders import decode


def end_to_end(run: Run) -> dict[str, float]:
    """Publish and consume; rate until the last acknowledgement."""
    import uvloop

    data = run.folder / "data"
    data.mkdir()
    as_other: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(run.folder, "postgres", "postgres")
        shutil.chown(data, "postgres", "postgres")
        as_other = {"user": "postgres", "group": "postgres", "extra_groups": []}
    programs = Path(shutil.which("postgres") or "").resolve().parent
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "bench", "-A", "trust", "--no-instructions"],
        check=True, stdout=subprocess.DEVNULL, cwd=run.folder, **as_other,
    )  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", data, "-h", "", "-k", run.folder],
        stdout=subprocess.DEVNULL, stderr=(run.folder / "log").open("wb"), cwd=run.folder, **as_other,
    )  # fmt: skip
    try:
        return uvloop.run(_measure(run))
    finally:
        server.terminate()
        server.wait()


async def _measure(run: Run) -> dict[str, float]:
    import asyncpg

    address = {"host": str(run.folder), "user": "bench", "database": "postgres"}
    deadline = time.monotonic() + 30
    while True:
        try:
            consumer = await asyncpg.connect(**address)
            break
        except (OSError, asyncpg.CannotConnectNowError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
    await consumer.execute("CREATE TABLE message (position BIGSERIAL PRIMARY KEY, body BYTEA NOT NULL)")
    publisher = await asyncpg.connect(**address)

    async def consume() -> None:
        handled = 0
        while handled < run.messages:
            async with consumer.transaction():
                rows = await consumer.fetch(
                    "SELECT position, body FROM message ORDER BY position LIMIT 100 FOR UPDATE SKIP LOCKED"
                )
                for row in rows:
                    decode(row["body"])
                taken = [row["position"] for row in rows]
                await consumer.execute("DELETE FROM message WHERE position = ANY($1)", taken)
            handled += len(rows)

    async def insert(numbers: list[int]) -> None:
        bodies = [BODIES[number % 1000] for number in numbers]
        await publisher.execute("INSERT INTO message (body) SELECT unnest($1::bytea[])", bodies)

    measured = await publish_and_consume(run.messages, Together(insert).publish, consume())
    await publisher.close()
    await consumer.close()
    return measured
