"""What SQLite's errors mean for the file of the embedded engine.

Never does: open or read one. Read next: engine.py.
"""

from __future__ import annotations

import errno
from pathlib import Path

import apsw

from trunkline.errors import ConfigurationError, FatalStoreError, StoreFullError, TransportError, TrunklineError

LOCK_WAIT_S = 30.0
"""Longest wait for the write lock that another process holds."""
DEVICE_ERRORS = (apsw.FullError, apsw.IOError, apsw.CorruptError)
"""The disk is full, or failed."""


def unopened(path: str, error: Exception) -> TrunklineError:
    """Return why the file at `path` cannot be opened: E225 where no file can be, else E501.

    Args:
        error: what SQLite said.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return ConfigurationError("E225", f"{path} is a directory", f"name a file in it: {place / 'shop.db'}")
        if not place.parent.is_dir():
            if place.parent.exists():
                return ConfigurationError("E225", f"{place.parent} is no folder for {place.name}", "name another one")
            return ConfigurationError(
                "E225", f"folder {place.parent} of {place.name} does not exist", "create it, or name another one"
            )
    except OSError as denied:
        if denied.errno == errno.ENAMETOOLONG:
            return ConfigurationError("E225", f"{path} is too long for the name of a file", "name a shorter one")
        error = denied
    return TransportError("E501", f"{path} cannot be opened: {error}", "check that it and its folder can be written")


def translated(error: BaseException, path: str) -> TransportError:
    """Return what SQLite's error means for the file at `path`: E502, E503, E504, or E506 for all others."""
    if isinstance(error, TransportError):
        return error
    if isinstance(error, apsw.FullError):
        return StoreFullError("E502", f"no room left for {path}", "free disk space; nothing of this was stored")
    if isinstance(error, apsw.IOError | apsw.CorruptError | apsw.NotADBError):
        hint = "what was confirmed is kept; stop, check the disk, restart"
        return FatalStoreError("E503", f"the disk failed under {path}: {error}", hint)
    if isinstance(error, apsw.BusyError):
        return locked(path, LOCK_WAIT_S)
    return TransportError("E506", f"{path} refused a statement: {error}")


def locked(path: str, seconds: float) -> TransportError:
    """Return E504: another process held the file's write lock for so long."""
    return TransportError("E504", f"{path} was locked by another process for over {seconds:g} s", "find it")
