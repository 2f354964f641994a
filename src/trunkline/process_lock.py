"""Which processes that share a file are alive, told by locks that the kernel drops when one dies.

Invariant: while a process lives it holds byte `number` of the `-live` file beside the database; kill -9
frees it at once. Never does: decide what follows (engine.py). Read next: engine.py.
"""

from __future__ import annotations

import errno
import fcntl
import os


class ProcessLock:
    """This process's locks in `<path>-live`.

    POSIX locks belong to the process and end with the first close of the file in it, so there is one
    ProcessLock per process and path.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(f"{path}-live", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @staticmethod
    def pid() -> int:
        """Return the number of this process in the operating system."""
        return os.getpid()

    def take(self, number: int) -> None:
        """Hold `number` until `close` or the end of this process."""
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)

    def held_by_another(self, number: int) -> bool:
        """Return whether another living process holds `number`."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return True
            raise
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
        return False

    def close(self) -> None:
        """Give all up."""
        os.close(self._file)
