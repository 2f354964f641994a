"""How long it takes until Trunkline is there: imports, the command line, a start after `kill -9`.

Read next: peers.py.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.cases import Run
from benchmarks.contestants.embedded import declare, fill, url
from benchmarks.contestants.orders import OrderCreated
from trunkline import App, Service

SCRIPTS = Path(sys.executable).parent


def command(_run: Run, *, arguments: list[str]) -> dict[str, float]:
    """Time one whole process, from the call to its exit."""
    program, *rest = arguments
    began = time.perf_counter()
    subprocess.run([str(SCRIPTS / program), *rest], check=True, stdout=subprocess.DEVNULL)
    return {"ms": (time.perf_counter() - began) * 1000}


def after_kill(run: Run, *, full: bool) -> dict[str, float]:
    """Kill a service in the middle of its work; start it again; wait for the first message it handles."""
    if full:
        for path in run.shared.glob("trunkline.db*"):
            shutil.copy(path, run.folder / path.name)
    else:
        declare("queue")
        uvloop.run(fill(run.folder, 20_000))
    _work(run.folder, handle=2000, ending=signal.SIGKILL)
    return {"s": _work(run.folder, handle=1, ending=signal.SIGTERM)}


def _work(folder: Path, *, handle: int, ending: signal.Signals) -> float:
    """Run a service until it has handled so many and has more under way; return when that was, since its start."""
    given = json.dumps({"messages": handle, "folder": str(folder), "shared": "", "options": {}})
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.contest", "start:serve", given], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        reached = float(process.stdout.readline())
        process.send_signal(ending)
    return reached - began


def serve(run: Run) -> dict[str, float]:
    """Handle orders; after so many, tell and keep the next ones in their handlers."""
    declare("queue")
    service = Service("payment")
    count = 0

    @service.handle
    async def charge(_order: OrderCreated) -> None:
        nonlocal count
        count += 1
        if count == run.messages:
            print(time.monotonic(), flush=True)
        if count >= run.messages:
            await asyncio.Event().wait()

    App(service, transport=url(run.folder), grace_s=0).run()
    return {}
