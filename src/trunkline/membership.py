"""The processes that share a file: signing on, signs of life, taking over from the dead.

Invariant: a process is taken over once, and only if it is gone or silent for a lease; what it held is given back
in every kind of table, or by nobody yet. Never does: commit for a process that was taken over (engine.py).
Read next: process_lock.py.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Collection
from typing import TYPE_CHECKING

import apsw

from trunkline.errors import FatalStoreError, TransportError
from trunkline.process_lock import ProcessLock

if TYPE_CHECKING:
    from trunkline.engine import Engine

log = logging.getLogger("trunkline.engine")


class Membership:
    """This process among those that share the file of `engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = ProcessLock(engine.path)

    def close(self) -> None:
        """Give up the lock."""
        self._lock.close()

    async def register(self) -> int:
        """Sign on; return the number of this process, which is never given twice."""
        now = self._engine.clock.now()
        pid = ProcessLock.pid()

        def register(connection: apsw.Connection) -> int:
            connection.execute("INSERT INTO trunkline_process (pid, started, beat) VALUES (?, ?, ?)", (pid, now, now))
            number = connection.last_insert_rowid()
            # Taken before the commit: no other process can see the row and find it unlocked.
            self._lock.take(number)
            return number

        return await self._engine.run(register)

    async def sweep(self) -> None:
        """Take over from processes that died; called at start and about once a second."""
        engine = self._engine
        now = engine.clock.now()
        rows = engine.reader.execute("SELECT id, beat FROM trunkline_process").fetchall()
        dead = [number for number, beat in rows if self._is_dead(number, beat, now)]  # type: ignore[arg-type]
        strange = self._strange_tables() if dead else ()
        dead = [number for number in dead if not self._has_rows(int(number), strange)]  # type: ignore[arg-type]
        if not dead:
            return

        def take_over(connection: apsw.Connection) -> list[int]:
            taken = []
            for number in dead:
                connection.execute("DELETE FROM trunkline_process WHERE id = ?", (number,))
                if connection.changes():
                    taken.append(number)
                    for stage in engine.stages:
                        stage.release(connection, number)  # type: ignore[arg-type]
            return taken  # type: ignore[return-value]

        for number in await engine.run(take_over):
            log.warning("process %d of %s is gone; its messages are taken over", number, engine.path)
            for stage in engine.stages:
                stage.foreign_change()

    def _strange_tables(self) -> set[str]:
        """Return the tables in which a process may hold rows and which no stage here knows."""
        tables = self._engine.reader.execute(
            "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c ON c.name = 'owner'"
            " WHERE m.type = 'table' AND m.name LIKE 'trunkline_%'"
        ).fetchall()
        known = {table for stage in self._engine.stages for table in stage.owned}
        return {str(name) for (name,) in tables} - known

    def _has_rows(self, number: int, tables: Collection[str]) -> bool:
        """Return whether a process holds rows that cannot be given back here: one that knows their table will."""
        reader = self._engine.reader
        return any(
            reader.execute(f"SELECT 1 FROM {table} WHERE owner = ? LIMIT 1", (number,)).fetchall()  # noqa: S608
            for table in tables
        )

    def _is_dead(self, number: int, beat: float, now: float) -> bool:
        engine = self._engine
        silent = beat < now - engine.lease_s
        return number != engine.process and (silent or not self._lock.held_by_another(number))

    def _is_gone(self) -> bool:
        """Return whether another file is at the path of the one that is open, or none."""
        moved = array("i", [0])  # SQLite writes its answer there
        self._engine.reader.file_control("main", apsw.SQLITE_FCNTL_HAS_MOVED, moved.buffer_info()[0])
        return moved[0] != 0

    async def keep(self) -> None:
        """Show signs of life and look for the dead, until the engine fails or this is cancelled.

        A file that was deleted or replaced ends it: what is committed to the one that is open, nobody will find.
        """
        engine = self._engine
        last_beat = engine.clock.now()
        gone = 0
        while engine.failure is None:
            await engine.clock.sleep(min(1.0, engine.lease_s * 0.1))
            now = engine.clock.now()
            try:
                gone = gone + 1 if self._is_gone() else 0
                if gone > 1:  # one look may have failed
                    what = f"{engine.path} was deleted or replaced under process {engine.process}"
                    engine.cannot_read(FatalStoreError("E515", what, "stop all its services before you touch the file"))
                    return
                if now - last_beat > engine.lease_s * 0.3:
                    last_beat = now
                    await engine.run(lambda connection, at=now: self._beat(connection, at))  # type: ignore[misc]
                await self.sweep()
            except TransportError as error:
                log.warning("keeping the lease of %s failed: %s", engine.path, error)
            except apsw.Error as error:
                engine.cannot_read(error)

    def _beat(self, connection: apsw.Connection, at: float) -> None:
        connection.execute("UPDATE trunkline_process SET beat = ? WHERE id = ?", (at, self._engine.process))
