"""Rows of a file that one App has taken, where Apps of one process share its number there.

Invariant: what is given back was taken here and not finished; what another App of the process took is left to it.
Never does: what a dead process held (membership.py). Read next: stores/sqlite/store.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import apsw

from trunkline.engine import Engine
from trunkline.errors import TransportError


class Claims:
    """What one App has taken of `table`.

    Attributes:
        rows: their numbers; one that cannot be in the file any more does no harm.
    """

    def __init__(self, engine: Engine, table: str) -> None:
        self._engine = engine
        self._table = table
        self.rows: set[int] = set()

    async def take(self, claim: Callable[[apsw.Connection], list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
        """Run `claim`, which sets the owner of rows and returns them, their number first; return them by number.

        Raises: TransportError if that was not committed; then nothing was taken.
        """
        new: set[int] = set()

        def note(connection: apsw.Connection) -> list[tuple[Any, ...]]:
            rows = sorted(claim(connection))
            # Before the commit: whoever waits for it may be cancelled, and the rows are taken all the same.
            new.update({row[0] for row in rows} - self.rows)
            self.rows |= new
            return rows

        try:
            return await self._engine.run(note)
        except TransportError:
            self.rows -= new
            raise

    def finished(self, rows: Iterable[int]) -> None:
        """Forget rows that were settled or sent."""
        self.rows.difference_update(rows)

    def give_back(self, connection: apsw.Connection) -> None:
        """Let others have what was not finished."""
        owned = [(row, self._engine.process) for row in self.rows]
        connection.executemany(f"UPDATE {self._table} SET owner = NULL WHERE seq = ? AND owner = ?", owned)  # noqa: S608
