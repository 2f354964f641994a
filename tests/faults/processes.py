"""Real processes for the fault tests: start, wait for a line, signal, reap; and waiting for a condition."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Self, TypeVar

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, deadline_s: float = 30.0, every_s: float = 0.02) -> T:
    """Return the first true value of `condition`; it is asked again and again until the deadline."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        time.sleep(every_s)
    return value


class Process:
    """One process of a test; leaving the `with` block kills it if it still runs."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self._log: IO[bytes] = log.open("ab")
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=self._log
        )
        self.log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_line(self, text: str, deadline_s: float = 30.0) -> None:
        """Wait until the process has printed a line."""
        end = time.monotonic() + deadline_s
        assert self._process.stdout is not None
        while f"{text}\n".encode() not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise AssertionError(f"no line {text!r} within {deadline_s} s:\n{self.tail()}")
            read = os.read(self._process.stdout.fileno(), 65536)
            if not read:
                raise AssertionError(f"ended with {self.wait()} before {text!r}:\n{self.tail()}")
            self._buffer += read

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, deadline_s: float = 30.0) -> int:
        """Return the exit code; negative is the signal that ended it."""
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.pid} still runs after {deadline_s} s:\n{self.tail()}") from None

    def kill(self) -> None:
        """Kill -9 and reap."""
        self._process.kill()
        self._process.wait()

    def stop(self, deadline_s: float = 30.0) -> None:
        """SIGTERM; it must end by itself and well."""
        self.signal(signal.SIGTERM)
        code = self.wait(deadline_s)
        assert code == 0, f"exit code {code}:\n{self.tail()}"

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def close(self) -> None:
        if self.alive():
            self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()
