"""Real processes for fault tests: start, wait for a line, signal, reap.

Invariant: nothing here blocks the event loop; what was started is reaped, whatever happened. Read next: worker.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trunkline.clock import Clock, offload, system_clock

POLL_S = 0.02
TAIL_LINES = 30


class ProcessError(AssertionError):
    """A process did not do what was expected of it; the text ends with what it logged."""


class Process:
    """One `python -m MODULE ARGUMENTS`; what it prints and logs goes into files.

    Args:
        log: for its stderr; `log` with the suffix `.out` gets its stdout.
        through: a command that becomes the one after it, such as `HostName.command()`.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, clock: Clock = system_clock, through: Sequence[str] = ()
    ) -> None:
        self.log = log
        self._clock = clock
        self._out = log.with_suffix(".out")
        with log.open("ab") as errors, self._out.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                [*through, sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Return whether it still runs."""
        return self._process.poll() is None

    def said(self, text: str) -> bool:
        """Return whether it has printed a line."""
        return f"{text}\n".encode() in self._out.read_bytes()

    async def line(self, text: str, within_s: float = 30.0) -> None:
        """Wait until it has printed a line.

        Raises: ProcessError if it ends before, or takes too long.
        """
        end = self._clock.monotonic() + within_s
        while not self.said(text):
            if not self.alive() and not self.said(text):
                raise ProcessError(f"ended with {self._process.returncode} before {text!r}:\n{self.tail()}")
            if self._clock.monotonic() > end:
                raise ProcessError(f"no line {text!r} within {within_s:g} s:\n{self.tail()}")
            await self._clock.sleep(POLL_S)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    async def freeze(self) -> None:
        """Send SIGSTOP and wait until it stands; SIGCONT lets it go on."""
        self.send(signal.SIGSTOP)
        await offload(os.waitid, os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    async def wait(self, within_s: float = 30.0) -> int:
        """Return the exit code; negative is the signal that ended it.

        Raises: ProcessError if it goes on for too long.
        """
        end = self._clock.monotonic() + within_s
        while (code := self._process.poll()) is None:
            if self._clock.monotonic() > end:
                raise ProcessError(f"{self.pid} still runs after {within_s:g} s:\n{self.tail()}")
            await self._clock.sleep(POLL_S)
        return code

    async def kill(self) -> None:
        """Kill -9 and reap."""
        self._process.kill()
        await self.wait()

    async def stop(self, within_s: float = 30.0) -> None:
        """SIGTERM: it must end by itself and well.

        Raises: ProcessError if it does not.
        """
        self.send(signal.SIGTERM)
        code = await self.wait(within_s)
        if code != 0:
            raise ProcessError(f"exit code {code}:\n{self.tail()}")

    def tail(self) -> str:
        """Return the last lines that it logged."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.alive():
            self._process.kill()
        self._process.wait()
