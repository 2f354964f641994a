"""The demo's folder: empty at the start, and one demo's alone until the last of its processes has ended.

Invariant: the lock belongs to an open file that every process of the demo inherits, so the kernel drops
it when the last of them ends, whoever was killed whenever.
Read next: demo.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.shop.audit import PLACED
from examples.shop.processes import DemoError, Lock


@contextmanager
def claimed(folder: Path) -> Iterator[Lock]:
    """Make the folder empty, and ours alone; gives the lock, for the processes to inherit.

    Raises: DemoError if it holds other things, or a process of another demo still runs in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not "w": until it is ours, the file tells who has it.
    with lock_of(folder).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise DemoError(_taken(folder, file.read())) from error
        file.truncate(0)
        if folder.exists() and any(folder.iterdir()) and not (folder / PLACED).exists():
            raise DemoError(f"{folder} holds other things than a demo's; name an empty folder")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / PLACED).touch()
        lock = Lock(file)
        lock.note("demo", os.getpid())
        yield lock


def lock_of(folder: Path) -> Path:
    """Return the file that is locked: beside the folder, which may be emptied."""
    return folder.with_name(f"{folder.name}.lock")


def _taken(folder: Path, noted: str) -> str:
    alive = [(name, pid) for name, pid in map(str.split, noted.splitlines()) if _lives(int(pid))]
    names = ", ".join(f"{name} ({pid})" for name, pid in alive) or "one that has just started"
    if any(name == "demo" for name, _ in alive):
        return f"another demo runs in {folder}: {names}; stop it, or name another folder"
    return (
        f"processes of a demo that was killed still run in {folder}: {names};"
        " they end by themselves within a minute, or by kill -9"
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
