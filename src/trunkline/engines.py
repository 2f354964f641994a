"""The Engines of this process: one per file and event loop.

Invariant: two connections of one process on one file would share and lose POSIX locks, so whoever opens a file
twice gets the same Engine. Read next: engine.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import apsw

from trunkline.clock import Clock
from trunkline.engine import LEASE_S, Engine
from trunkline.errors import ConfigurationError

log = logging.getLogger("trunkline.engine")

LOG_BYTES = 1000 * (24 + 4096)
"""Length that the write-ahead log reaches before it is checkpointed and written over: 1,000 frames of a page each."""

OPTIONS = ("lease_s", "vfs")
_SHOWN = "lease_s (seconds, such as ?lease_s=30) and vfs (name of a registered SQLite VFS)"
_engines: dict[tuple[int, str], Engine] = {}


async def open_engine(path: str, clock: Clock, options: Mapping[str, str]) -> Engine:
    """Return this process's Engine of `path`, opened; `close_engine` gives it back.

    Args:
        options: of the URL: `vfs`, name of a registered SQLite VFS; `lease_s`, see LEASE_S, the same in all processes.
    Raises: ConfigurationError E209 for a `lease_s` that is no number above 0, E227 for an option that does not exist
        and E228 for a `vfs` that does not; see also Engine.open.
    """
    check_options(options)
    resolved = os.path.realpath(path)  # noqa: ASYNC240 - once, at start
    key = (id(asyncio.get_running_loop()), resolved)
    engine = _engines.get(key)
    if engine is None:
        engine = _engines[key] = Engine(resolved, clock, options.get("vfs"), _lease_s(options))
        try:
            await engine.open()
            if engine.vfs is None:
                await engine.run(lambda _connection: _grow_log(Path(f"{resolved}-wal")))
        except BaseException:
            del _engines[key]
            raise
    engine.users += 1
    return engine


def _grow_log(path: Path) -> None:
    """Give the write-ahead log its length at once, under the write lock.

    A sync of a file that grows has the file system commit its own metadata too: 280 µs a commit against 170 (ext4).
    SQLite reads a log up to the last valid frame, and writes over what is behind it (SQLite file format §4.1).
    """
    try:
        with path.open("r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size < LOG_BYTES:
                file.write(bytes(LOG_BYTES - size))
                os.fsync(file.fileno())
    except OSError as error:
        log.warning("%s could not be given its length, commits are slower until it has grown: %s", path, error)


def check_options(options: Mapping[str, str]) -> None:
    """Refuse what a URL cannot ask for.

    Raises: ConfigurationError E227 for an option that does not exist, E228 for a `vfs` that does not.
    """
    for name in options:
        if name not in OPTIONS:
            raise ConfigurationError("E227", f"unknown option {name!r} in a sqlite: URL", f"options are: {_SHOWN}")
    vfs = options.get("vfs")
    if vfs is not None and vfs not in apsw.vfs_names():
        known = ", ".join(sorted(apsw.vfs_names()))
        raise ConfigurationError("E228", f"no SQLite VFS {vfs!r}", f"registered are: {known}; leave vfs out for files")


def _lease_s(options: Mapping[str, str]) -> float:
    text = options.get("lease_s", str(LEASE_S))
    try:
        lease_s = float(text)
    except ValueError:
        lease_s = 0.0
    if not 0 < lease_s < float("inf"):
        raise ConfigurationError("E209", f"lease_s is {text!r}", "a number of seconds above 0, such as 30")
    return lease_s


async def close_engine(engine: Engine) -> None:
    """Give an Engine back; the last user closes it."""
    engine.users -= 1
    if engine.users == 0:
        for key, value in list(_engines.items()):
            if value is engine:
                del _engines[key]
        await engine.close()
