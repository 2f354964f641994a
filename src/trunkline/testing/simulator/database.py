"""SQLite with the clock and the randomness that user code has: virtual in a simulation.

`CURRENT_TIMESTAMP`, `datetime('now')` and the like ask the VFS for the time; `random()` and `randomblob()` draw from a
generator inside SQLite, and are replaced. Source: sqlite.org/c3ref/vfs.html, xCurrentTimeInt64. Read next: tables.py.
"""

from __future__ import annotations

from typing import Any

import apsw

from trunkline.clock import system_clock
from trunkline.testing.simulator.interception import random_bytes

_NAME = "trunkline-simulated"
_UNIX_EPOCH_MS = 210_866_760_000_000
"""1970 in milliseconds since noon on the day on which Julian days begin."""


class _Vfs(apsw.VFS):
    """The operating system as SQLite sees it, with the time that `time.time` tells."""

    def __init__(self) -> None:
        super().__init__(_NAME, "")

    def xCurrentTimeInt64(self) -> int:  # noqa: N802 - SQLite's name for it
        return _UNIX_EPOCH_MS + int(system_clock.now() * 1000)


def open_database() -> apsw.Connection:
    """Return a new database in memory."""
    vfs = _Vfs()
    try:
        connection = apsw.Connection(":memory:", vfs=_NAME)  # keeps it
    finally:
        vfs.unregister()  # it is for no other database of this process
    connection.create_scalar_function("random", _random, 0)
    connection.create_scalar_function("randomblob", _randomblob, 1)
    return connection


def _random(*_none: Any) -> int:
    return int.from_bytes(random_bytes(8), "big", signed=True)


def _randomblob(*sizes: Any) -> bytes:
    return random_bytes(max(int(sizes[0]), 1))
