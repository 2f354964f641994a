"""Finds a simulated process that does not come back: a blocking call, or a loop without an await.

Invariant: a run that goes on is never touched. One real thread looks once a second or so whether steps are made; it
is started with the first run and ends when there are none. Read next: interception.py.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

from trunkline.clock import system_clock
from trunkline.errors import SimulationError
from trunkline.testing.simulator.stack import place, stack

if TYPE_CHECKING:
    from trunkline.testing.simulator.loop import SimulatedLoop

LIMIT_S = 10.0
"""Real seconds after which a step is taken for one that never ends."""
LOOK_S = 1.0
DEBUGGERS = frozenset({"bdb", "pdb", "pydevd", "_pydevd_bundle", "debugpy"})
GAVE_UP = 70
"""Exit code of a process that could not be brought back (EX_SOFTWARE)."""


class Watchdog:
    """Watches one run after the other.

    Attributes:
        limit_s: real seconds that a step may take.
    """

    def __init__(self) -> None:
        self.limit_s = LIMIT_S
        self._lock = threading.Lock()
        self._loop: SimulatedLoop | None = None
        self._thread = 0
        self._runs = 0
        self._seen = (0, 0)
        self._since = 0.0
        self._told = False
        self._looks: threading.Thread | None = None

    def begin(self, loop: SimulatedLoop) -> None:
        """Watch a run of this thread."""
        with self._lock:
            self._loop = loop
            self._runs += 1
            self._thread = threading.get_ident()
            if self._looks is None or not self._looks.is_alive():  # it does not live on in a forked process
                self._looks = threading.Thread(target=self._look, name="trunkline-watchdog", daemon=True)
                self._looks.start()

    def end(self) -> None:
        """Watch it no more; whoever is interrupted because of it has been when this returns."""
        with self._lock:
            self._loop = None

    def _look(self) -> None:
        wait = threading.Event().wait
        idle = 0
        while idle < 2:  # noqa: PLR2004 - twice: a run may be about to begin
            wait(min(LOOK_S, self.limit_s / 4))
            with self._lock:
                idle = 0 if self._look_once() else idle + 1
                if idle == 2:  # noqa: PLR2004 - as above
                    self._looks = None

    def _look_once(self) -> bool:
        """See whether a step has been made; return False if there is no run.

        Nothing of a run stays with this thread: a collection would find it in use, and no later one looks again.
        """
        loop = self._loop
        if loop is None:
            return False
        now = system_clock.monotonic()
        at = self._runs, loop.steps
        if at != self._seen:
            self._seen, self._since, self._told = at, now, False
        elif now - self._since > self.limit_s:
            if self._told:
                self._give_up()
            self._since, self._told = now, self._interrupt(loop)
        return True

    def _interrupt(self, loop: SimulatedLoop) -> bool:
        """Tell where it is, and raise KeyboardInterrupt there, which no `except Exception` catches.

        Returns: whether it did; not where somebody is debugging.
        """
        frame = sys._current_frames().get(self._thread)  # noqa: SLF001 - the public way to another thread's stack
        if _is_debugged(frame):
            return False
        where = place(frame)
        loop.refused = SimulationError(
            "E705",
            f"{loop.running.name} has not come back for {self.limit_s:g} s{where and f': it is at {where}'}",
            "a blocking call or a loop without an await; virtual time stands still while a step runs",
        )
        sys.stderr.write(f"{loop.refused}\nIts stack:\n{stack(frame, 'SimulatedLoop._step')}")
        sys.stderr.flush()
        main = threading.main_thread().ident == self._thread
        if main and hasattr(signal, "pthread_kill") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.pthread_kill(self._thread, signal.SIGINT)  # ends a blocking call too
        else:
            error = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), error)
        return True

    def _give_up(self) -> None:
        """End the operating system's process: what it is in cannot be interrupted, and a build must not hang."""
        sys.stderr.write(f"E705 it still has not; this process (pid {os.getpid()}) ends\n")
        sys.stderr.flush()
        os._exit(GAVE_UP)


def _is_debugged(frame: FrameType | None) -> bool:
    """Return whether somebody looks at the step in a debugger, and may take their time."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in DEBUGGERS:
            return True
        frame = frame.f_back
    return False


watchdog = Watchdog()
"""The one of this process."""
