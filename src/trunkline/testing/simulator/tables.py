"""The user's own tables of one service, in memory, emptied between two runs.

Invariant: what a run finds is what a new database would have. Read next: store.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from trunkline.testing.simulator.database import open_database

_LINKED = "SELECT EXISTS (SELECT 1 FROM sqlite_master AS made, pragma_foreign_key_list(made.name))"
_TABLES = (
    "SELECT name FROM sqlite_master WHERE type = 'table'"
    " AND (name = 'sqlite_sequence' OR name NOT LIKE 'sqlite!_%' ESCAPE '!')"
)


class Tables:
    """One database.

    Attributes:
        connection: the only one on it.
    """

    def __init__(self) -> None:
        self.connection = open_database()
        self.connection.execute("PRAGMA foreign_keys=ON")
        self._made: list[str] = []
        self._is_linked = False
        self._version = -1

    def run_schema(self, statements: Sequence[str]) -> None:
        """Run the service's own table definitions."""
        for statement in statements:
            self.connection.execute(statement)
        version = self._schema_version()
        if version != self._version:
            self._version = version
            self._made = [str(name) for (name,) in self.connection.execute(_TABLES)]
            self._is_linked = self.connection.execute(_LINKED).fetchall() == [(1,)]

    def _schema_version(self) -> int:
        ((version,),) = self.connection.execute("PRAGMA schema_version").fetchall()
        return int(version)  # type: ignore[arg-type]

    def empty(self) -> bool:
        """Remove all rows; return False if a run changed more than rows: then it is not to be used again."""
        if self.connection.in_transaction or self._version != self._schema_version():
            return False
        if self._is_linked:  # else not: after it each statement has to be prepared again
            self.connection.execute("PRAGMA foreign_keys=OFF")
        for name in self._made:
            self.connection.execute(f'DELETE FROM "{name}"')  # noqa: S608 - names of the user's own tables
        if self._is_linked:
            self.connection.execute("PRAGMA foreign_keys=ON")
        return True
