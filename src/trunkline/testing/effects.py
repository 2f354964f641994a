"""The table into which workers write the effects of messages, in whatever store keeps it.

Invariant: its rows count up by themselves, so for one key their order is the order of the commits.
Read next: worker.py.
"""

from __future__ import annotations

from typing import Any

from trunkline.clock import offload
from trunkline.store import Transaction
from trunkline.testing.ledger import Entry, Kind
from trunkline.transport import parse_address

_ROW = "producer TEXT NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL, pid INTEGER NOT NULL"


class EffectTable:
    """A table of effects.

    Args:
        store: URL of the store that it is in: `sqlite:` or `postgresql:`.
        name: of the table.
    """

    def __init__(self, store: str, name: str) -> None:
        self.store = store
        self.name = name
        self._address = parse_address(store)
        self._file = self._address.path.removeprefix("/")
        self._sqlite = self._address.scheme != "postgresql"
        number = "INTEGER PRIMARY KEY AUTOINCREMENT" if self._sqlite else "BIGSERIAL PRIMARY KEY"
        self.schema = f"CREATE TABLE IF NOT EXISTS {name} (n {number}, {_ROW})"
        places = "?, ?, ?, ?" if self._sqlite else "$1, $2, $3, $4"
        self._insert = f"INSERT INTO {name} (producer, key, seq, pid) VALUES ({places})"  # noqa: S608 - our own name

    @staticmethod
    def fits(store: str) -> bool:
        """Return whether a table can be in this store and be read from outside."""
        return parse_address(store).scheme in {"sqlite", "postgresql"}

    async def add(self, tx: Transaction, producer: str, key: str, seq: int, pid: int) -> None:
        """Write one effect in a handler's transaction."""
        await tx.execute(self._insert, (producer, key, seq, pid))

    async def read(self) -> list[Entry]:
        """Return all effects as a consumer's journal: each is a delivery that was committed.

        Raises: ConfigurationError or TransportError if the server of the store does not answer as it should.
        """
        query = f"SELECT producer, key, seq FROM {self.name} ORDER BY n"  # noqa: S608 - our own name
        rows = await (offload(self._read_sqlite, query) if self._sqlite else self._read_postgres(query))
        return [Entry(Kind.EFFECT, producer, key, seq) for producer, key, seq in rows]

    async def is_locked(self) -> bool:
        """Return whether nobody can write to the file of the store now; a server locks nobody out."""
        return self._sqlite and await offload(self._is_busy)

    def _is_busy(self) -> bool:
        import apsw

        connection = apsw.Connection(self._file)
        try:
            connection.execute("BEGIN IMMEDIATE; ROLLBACK")
        except apsw.BusyError:
            return True
        finally:
            connection.close()
        return False

    def _read_sqlite(self, query: str) -> list[tuple[Any, ...]]:
        import apsw

        try:
            connection = apsw.Connection(self._file, flags=apsw.SQLITE_OPEN_READONLY)
        except apsw.CantOpenError:
            return []  # no process has opened the store yet
        try:
            connection.set_busy_timeout(10_000)
            return list(connection.execute(query)) if self._exists(connection) else []
        finally:
            connection.close()

    def _exists(self, connection: Any) -> bool:
        return bool(list(connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (self.name,))))

    async def _read_postgres(self, query: str) -> list[tuple[Any, ...]]:
        from trunkline.postgres.settings import DRIVER_ERRORS, connect, read_settings, translate

        settings = read_settings(self._address)
        connection = await connect(settings, f"effects {self.name}")
        try:
            found = await connection.fetchval("SELECT to_regclass($1)", self.name)
            rows = [tuple(row) for row in await connection.fetch(query)] if found else []
            await connection.close()
        except DRIVER_ERRORS as error:
            raise translate(error, settings) from error
        finally:
            connection.terminate()  # nothing to do if it is closed
        return rows
