"""Processes that outlive the command that started them.

Invariant: nothing is signalled that was not started here: a process is known by its number and its birth.
"""

import contextlib
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

from scripts.brokers.kind import Launch, group_of

PROC = Path("/proc")
POLL_S = 0.02
MOST_FILES = 65_536
"""RabbitMQ's Erlang machine ends connections when it has no file left; a login shell often allows only 1,024."""


def spawn(launch: Launch, log: Path, cwd: Path) -> subprocess.Popen[bytes]:
    """Start a server in a session of its own, with all the files that it may open; what it prints is added to `log`."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MOST_FILES if allowed == resource.RLIM_INFINITY else min(allowed, MOST_FILES)
    shell = ("/bin/sh", "-c", f'ulimit -Sn {files}; exec "$0" "$@"')
    with log.open("ab") as out:
        return subprocess.Popen(
            (*shell, *launch.argv),
            env={**os.environ, **launch.env},
            cwd=cwd,
            user=launch.user,
            group=None if launch.user is None else group_of(launch.user),
            extra_groups=None if launch.user is None else [],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def birth(pid: int) -> str | None:
    """Return when a process began, in the system's own words; None if it is gone or a zombie.

    A process number is used again in time; together with its birth it is not.
    """
    if PROC.joinpath("self").exists():
        try:
            fields = PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        state, threads, started = fields[0], int(fields[17]), fields[19]  # as in proc(5)
        # A zombie with threads left still holds its ports and locks.
        return None if state == "X" or (state == "Z" and threads <= 1) else started
    listed = _ps("-o", "stat=,lstart=", "-p", str(pid)).strip()
    return None if not listed or listed.startswith("Z") else listed.partition(" ")[2].strip()


def _ps(*options: str) -> str:
    return subprocess.run(("ps", *options), stdout=subprocess.PIPE, text=True, check=False).stdout


def is_alive(pid: int, born: str) -> bool:
    """Say whether that very process runs."""
    return birth(pid) == born


def _parents() -> dict[int, int]:
    if PROC.joinpath("self").exists():
        found = {}
        for entry in PROC.glob("[0-9]*"):
            with contextlib.suppress(OSError):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        return found
    pairs = [line.split() for line in _ps("-A", "-o", "pid=,ppid=").splitlines()]
    return {int(pid): int(parent) for pid, parent in pairs}


def family(pid: int) -> dict[int, str]:
    """Return a process and all that descend from it, with their births."""
    parents, members = _parents(), {pid}
    while more := {child for child, parent in parents.items() if parent in members} - members:
        members |= more
    return {member: born for member in members if (born := birth(member)) is not None}


def end(pid: int, born: str, first: signal.Signals, patience_s: float) -> bool:
    """End a server and its family: by `first`, and by SIGKILL what is left after `patience_s`.

    Returns: whether the server itself went without SIGKILL.
    """
    if not is_alive(pid, born):
        return True
    members = family(pid)
    if first is not signal.SIGKILL:
        _signal({pid: born}, first)
        _wait({pid: born}, patience_s)
    went = not is_alive(pid, born)
    members |= family(pid)
    _signal(members, signal.SIGKILL)
    _wait(members, 10)
    return went


def _signal(members: dict[int, str], number: signal.Signals) -> None:
    for pid, born in members.items():
        if is_alive(pid, born):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _wait(members: dict[int, str], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while any(is_alive(pid, born) for pid, born in members.items()) and time.monotonic() < until:
        time.sleep(POLL_S)
