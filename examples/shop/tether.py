"""Run a module as `python -m` does, in a process that ends with its parent.

    python -m examples.shop.tether MODULE ARGUMENT...

Standard input is a pipe whose other end only the parent holds: when the parent dies, by `kill -9` too,
the kernel closes it. The process then stops as if it had been told to, and is killed if it does not.
Never does: read what comes through the pipe. Read next: processes.py.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

GRACE_S = 45.0
"""A service takes up to 30 s to finish what is under way."""


def watch(descriptor: int, grace_s: float = GRACE_S) -> None:
    """Send this process SIGTERM when `descriptor` comes to its end, and SIGKILL `grace_s` later.

    Returns at once; a thread waits.
    """
    threading.Thread(target=_end_with, args=(descriptor, grace_s), name="tether", daemon=True).start()


def _end_with(descriptor: int, grace_s: float) -> None:
    while os.read(descriptor, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin.fileno())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
