"""The shop's processes as the demo sees them: start, kill -9, start again, stop.

Invariant: whatever was started here has ended when `Processes` is closed, and ends too when this process dies.
Read next: tether.py, demo.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

ROOT = Path(__file__).parents[2]
SERVICES = ("order", "payment", "inventory", "notification")
DATABASE = "shop.db"
STOP_S = 45.0
"""A service takes up to 30 s to finish what is under way."""
LAST_LINES = 15

# Any value will do for the stand-ins; a test key keeps the real Stripe out of reach.
_CREDENTIALS = {
    "STRIPE_API_KEY": "sk_test_demo",
    "TWILIO_ACCOUNT_SID": f"AC{0:032x}",
    "TWILIO_AUTH_TOKEN": "demo",
    "TWILIO_FROM": "+15005550006",
    "MAIL_FROM": "shop@example.com",
    "NO_PROXY": "127.0.0.1",
}


class DemoError(Exception):
    """The demo cannot go on; the text says why and where to look."""


class Lock:
    """An open, locked file that every child inherits: it stays locked until the last of them has ended.

    Attributes:
        descriptor: of the file.
    """

    def __init__(self, file: IO[str]) -> None:
        self.descriptor = file.fileno()
        self._file = file

    def note(self, name: str, pid: int) -> None:
        """Write down who has it, for whoever finds it locked."""
        self._file.write(f"{name} {pid}\n")
        self._file.flush()


class Child:
    """One process that may be started several times.

    Attributes:
        starts: how often it was started.
        kills: how often it was killed with SIGKILL.
    """

    def __init__(self, name: str, module: list[str], log: Path, lock: Lock | None = None) -> None:
        """Take what runs, without starting it.

        Args:
            name: for people.
            module: name and arguments, as after `python -m`.
            log: what it prints; appended to.
            lock: what it holds as long as it lives.
        """
        self.name = name
        self.starts = 0
        self.kills = 0
        self._command = [sys.executable, "-m", "examples.shop.tether", *module]
        self._log = log
        self._lock = lock
        self._process: subprocess.Popen[str] | None = None
        self._log_start = 0

    @property
    def up(self) -> bool:
        """Return whether it has said since its last start that it runs."""
        with self._log.open(errors="replace") as log:
            log.seek(self._log_start)
            return " runs on " in log.read()

    @property
    def pid(self) -> int | None:
        """Return the process id while it runs."""
        return self._process.pid if self.runs and self._process else None

    @property
    def runs(self) -> bool:
        """Return whether it is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self, environment: Mapping[str, str], stdout: int | None = None) -> IO[str] | None:
        """Start it; its log goes on where it was. Returns its output if `stdout` is a pipe."""
        self.starts += 1
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("a") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                self._command,
                cwd=ROOT,
                env={**os.environ, **environment},
                # Its other end closes when this process dies, whatever the cause.
                stdin=subprocess.PIPE,
                stdout=log if stdout is None else stdout,
                stderr=log,
                text=True,
                pass_fds=(self._lock.descriptor,) if self._lock else (),
                # Ctrl-C is for the demo, which then stops the services in its own order.
                start_new_session=True,
            )
        if self._lock:
            self._lock.note(self.name, self._process.pid)
        return self._process.stdout

    def kill(self) -> None:
        """End it with SIGKILL (`kill -9`): it cannot finish anything."""
        assert self._process is not None  # noqa: S101 - only what runs is killed
        self.kills += 1
        self._process.kill()
        self._process.wait()
        self._close()

    def terminate(self) -> None:
        """Ask it to stop."""
        if self._process is not None and self.runs:
            self._process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Wait for its end and return the exit code; one that takes too long is killed (-9)."""
        assert self._process is not None  # noqa: S101 - only what was started is waited for
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._close()
        self._process = None
        return code

    def _close(self) -> None:
        assert self._process is not None  # noqa: S101 - only what has ended is closed
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def was_started(self) -> bool:
        """Return whether there is a process whose end was not yet waited for."""
        return self._process is not None

    def last_words(self) -> str:
        """Return the end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])


class Processes:
    """The stand-ins in one process and each service in its own, with one database file in `folder`.

    Args:
        transport: URL of what carries the messages; by default the same file.
        lock: what each of them holds as long as it lives.

    Attributes:
        url: of the page.
        services: by name; `system` is all of them in one process.
    """

    def __init__(
        self, folder: Path, services: Sequence[str] = SERVICES, lock: Lock | None = None, transport: str | None = None
    ) -> None:
        port = _free_port()
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self._environment = {**_CREDENTIALS, "SHOP_PORT": str(port)}
        standins = ["examples.shop.standins", "--directory", str(folder)]
        # As long as a fast card network takes: a kill -9 then meets charges that are under way.
        standins += ["--authorisation-seconds", "0.05"]
        self.standins = Child("stand-ins", standins, folder / "standins.log", lock)
        store = f"sqlite:///{folder / DATABASE}"
        run = ["trunkline.cli", "run", "--transport", transport or store, "--store", store]
        self.services = {
            name: Child(name, [*run, f"examples.shop.{name}:{name}"], folder / f"{name}.log", lock) for name in services
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for children in (self.services.values(), [self.standins]):
            started = [child for child in children if child.was_started]
            for child in started:
                child.terminate()
            for child in started:
                child.ended()

    def start_standins(self) -> dict[str, str]:
        """Start the stand-ins; they listen when this returns. Returns their addresses, by the clients' settings.

        Raises: DemoError.
        """
        output = self.standins.start(self._environment, subprocess.PIPE)
        line = output.readline() if output is not None else ""
        if not line:
            raise DemoError(f"the stand-ins did not start:\n{self.standins.last_words()}")
        said = json.loads(line)
        said.pop("ledgers")
        self._environment |= said
        return dict(said)

    def start(self, *names: str) -> None:
        """Start services; all if none is named."""
        for name in names or self.services:
            self.services[name].start(self._environment)

    def kill(self, *names: str) -> None:
        """`kill -9` services."""
        for name in names:
            self.services[name].kill()

    def check(self, *, but: tuple[str, ...] = ()) -> None:
        """Raise DemoError if a service has ended by itself, except those in `but`."""
        for child in (*self.services.values(), self.standins):
            if child.name not in but and not child.runs:
                raise DemoError(f"{child.name} has ended by itself; the end of its log:\n{child.last_words()}")

    def stop(self) -> None:
        """Stop the services gracefully.

        Raises: DemoError if one does not end well.
        """
        running = [child for child in self.services.values() if child.was_started]
        # One that is still starting has nothing to finish, and SIGTERM would end it before it can say so.
        end = time.monotonic() + STOP_S
        while not all(child.up or not child.runs for child in running) and time.monotonic() < end:
            time.sleep(0.02)
        for child in running:
            child.terminate()
        codes = {child.name: child.ended() for child in running}
        bad = {name: code for name, code in codes.items() if code != 0}
        if bad:
            words = "\n".join(self.services[name].last_words() for name in bad)
            raise DemoError(f"services did not stop well (exit codes {bad}):\n{words}")


def _free_port() -> int:
    """Return SHOP_PORT, or a port that is free now: the order service must come back on the same one."""
    if "SHOP_PORT" in os.environ:
        return int(os.environ["SHOP_PORT"])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
