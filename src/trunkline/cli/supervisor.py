"""Several processes of one service: start, restart with backoff, reload, stop.

Invariant: a signal to the supervisor reaches every worker once, and it waits for all of them; when it dies
itself, its workers notice and stop. Read next: run.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from trunkline.app import GRACE_S
from trunkline.cli.run import PARENT_PIPE, WORKER
from trunkline.cli.terminal import FAILED, USAGE
from trunkline.clock import Clock, offload, system_clock

log = logging.getLogger("trunkline.supervisor")

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
HEALTHY_S = 60.0
"""A worker that ran so long starts again without a longer wait."""
KILL_AFTER_S = GRACE_S + 15.0
"""A worker that has not stopped so long after the signal is killed."""
LOOK_S = 0.5
"""How often sources are looked at."""
SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv"}


def restart_delay(failures: int) -> float:
    """Return the wait before a restart, in seconds.

    Args:
        failures: how often the worker has died soon after its start, this time included; 1 or more.

    >>> [restart_delay(n) for n in (1, 2, 3, 7, 99)]
    [0.5, 1.0, 2.0, 30.0, 30.0]
    """
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures - 1, 32))


class Supervisor:
    """Keeps `count` processes of `command` running.

    Args:
        watch: restart them when a source below the current folder changes.
    """

    def __init__(self, command: Sequence[str], count: int, *, watch: bool, clock: Clock = system_clock) -> None:
        self._command = list(command)
        self._count = count
        self._watch = watch
        self._clock = clock
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        self._told: set[int] = set()
        self._stopping = False
        self._wake = asyncio.Event()
        self._signals = 0
        self._exit = 0
        self._pipe = (-1, -1)

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT; return the exit code."""
        return asyncio.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        self._pipe = os.pipe()
        watcher = asyncio.create_task(self._watch_sources()) if self._watch else None
        try:
            async with asyncio.TaskGroup() as group:
                for worker in range(1, self._count + 1):
                    group.create_task(self._keep(worker))
        finally:
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
            for end in self._pipe:
                os.close(end)
        return self._exit

    def _signalled(self, number: int) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals == 1:
            log.info("%s: stopping the workers; a second one stops at once", name)
            self._stop()
        else:
            log.info("%s again: stopping at once", name)
            for process in self._workers.values():
                _send(process, signal.SIGTERM)

    def _has_stopped(self) -> bool:
        return self._stopping

    def _stop(self) -> None:
        self._stopping = True
        self._tell_all()

    def _tell_all(self) -> None:
        """Let every worker drain and whoever waits for a restart look again; a worker is told once."""
        for process in self._workers.values():
            self._tell(process)
        self._wake.set()
        self._wake = asyncio.Event()

    def _tell(self, process: asyncio.subprocess.Process) -> None:
        if process.pid not in self._told:
            self._told.add(process.pid)
            _send(process, signal.SIGTERM)

    # --- one worker ---

    async def _keep(self, worker: int) -> None:
        failures = 0
        while not self._has_stopped():
            wake = self._wake
            started = self._clock.monotonic()
            process = await self._start(worker)
            code = await self._ended(process, wake)
            del self._workers[worker]
            self._told.discard(process.pid)
            if self._has_stopped():
                log.info("worker %d %s", worker, _said(code))
                if code != 0 and (code != -signal.SIGTERM or self._signals > 1):
                    self._exit = self._exit or FAILED
            elif wake.is_set():
                failures = 0
            else:
                failures = 1 if self._clock.monotonic() - started >= HEALTHY_S else failures + 1
                await self._before_restart(worker, code, failures, wake)

    async def _start(self, worker: int) -> asyncio.subprocess.Process:
        # A process group of its own: Ctrl-C reaches the supervisor alone, which tells each worker once.
        process = await asyncio.create_subprocess_exec(
            *self._command,
            env=os.environ | {PARENT_PIPE: str(self._pipe[0]), WORKER: str(worker)},
            pass_fds=(self._pipe[0],),
            process_group=0,
        )
        self._workers[worker] = process
        log.info("worker %d started, pid %d", worker, process.pid)
        return process

    async def _ended(self, process: asyncio.subprocess.Process, wake: asyncio.Event) -> int:
        """Wait for the end of a worker; told to stop, it is killed when it takes too long."""
        ended = asyncio.ensure_future(process.wait())
        woken = asyncio.ensure_future(wake.wait())
        await asyncio.wait((ended, woken), return_when=asyncio.FIRST_COMPLETED)
        woken.cancel()
        if not ended.done():
            self._tell(process)
            try:
                async with asyncio.timeout(KILL_AFTER_S):
                    await asyncio.shield(ended)
            except TimeoutError:
                log.warning("pid %d has not stopped for %.0f s: killed", process.pid, KILL_AFTER_S)
                process.kill()
        return await ended

    async def _before_restart(self, worker: int, code: int, failures: int, wake: asyncio.Event) -> None:
        if self._watch:
            log.warning("worker %d %s; starting again when a source changes", worker, _said(code))
            await wake.wait()
        elif code == USAGE:
            log.error("worker %d %s: no restart helps against that; stopping", worker, _said(code))
            self._exit = USAGE
            self._stop()
        else:
            delay = restart_delay(failures)
            log.warning("worker %d %s; starting again in %.1f s", worker, _said(code), delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await wake.wait()

    # --- sources ---

    async def _watch_sources(self) -> None:
        known = await offload(_sources, Path.cwd())
        while True:
            await self._clock.sleep(LOOK_S)
            found = await offload(_sources, Path.cwd())
            if found == known:
                continue
            different = sorted({path for path, _ in found ^ known})
            log.info("changed: %s; restarting", ", ".join(_relative(path) for path in different[:5]))
            known = found
            self._tell_all()


def _sources(folder: Path) -> frozenset[tuple[str, int]]:
    """Return (path, time of change) of the sources below `folder`."""
    return frozenset(_walk(str(folder)))


def _walk(folder: str) -> Iterator[tuple[str, int]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # a folder that vanished or is closed to us holds no source of this program
        return
    if any(entry.name == "pyvenv.cfg" for entry in entries):
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith(".") and entry.name not in SKIPPED:
                    yield from _walk(entry.path)
            elif entry.name.endswith(".py") or entry.name == "trunkline.toml":
                yield entry.path, entry.stat().st_mtime_ns
        except FileNotFoundError:
            continue


def _relative(path: str) -> str:
    return os.path.relpath(path)


def _send(process: asyncio.subprocess.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        log.debug("pid %d had already ended", process.pid)


def _said(code: int) -> str:
    """Return how a process ended.

    >>> _said(-9), _said(1)
    ('was killed by SIGKILL', 'ended with exit code 1')
    """
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
