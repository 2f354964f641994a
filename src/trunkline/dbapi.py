"""A DB-API 2.0 face on the handler's open transaction, so that SQLAlchemy and existing code join it.

Invariant: `commit` and `rollback` change nothing here: the unit of work ends the transaction.
Source: PEP 249. Read next: stores/sqlite.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apsw

apilevel = "2.0"
threadsafety = 1
paramstyle = "qmark"
sqlite_version_info = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
sqlite_version = apsw.sqlite_lib_version()

Binary = bytes


class Error(Exception):
    """PEP 249 Error."""


class Warning(Exception):  # noqa: A001, N818 - the name PEP 249 asks for
    """PEP 249 Warning."""


class InterfaceError(Error):
    """PEP 249 InterfaceError."""


class DatabaseError(Error):
    """PEP 249 DatabaseError."""


class DataError(DatabaseError):
    """PEP 249 DataError."""


class OperationalError(DatabaseError):
    """PEP 249 OperationalError."""


class IntegrityError(DatabaseError):
    """PEP 249 IntegrityError."""


class InternalError(DatabaseError):
    """PEP 249 InternalError."""


class ProgrammingError(DatabaseError):
    """PEP 249 ProgrammingError."""


class NotSupportedError(DatabaseError):
    """PEP 249 NotSupportedError."""


class Connection:
    """The transaction as a connection, with the shortcuts of `sqlite3.Connection`."""

    Error = Error
    IntegrityError = IntegrityError
    OperationalError = OperationalError
    ProgrammingError = ProgrammingError
    isolation_level = None

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def cursor(self) -> Cursor:
        """Return a new cursor."""
        return Cursor(self._connection)

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Cursor:
        """Run one statement on a new cursor."""
        return self.cursor().execute(sql, parameters)

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> Cursor:
        """Run one statement for each row on a new cursor."""
        return self.cursor().executemany(sql, rows)

    def commit(self) -> None:
        """Do nothing: the unit of work commits."""

    def rollback(self) -> None:
        """Do nothing: raise from the handler to undo the unit of work."""

    def close(self) -> None:
        """Do nothing: the unit of work owns the connection."""

    def create_function(self, name: str, arguments: int, function: Any, *, deterministic: bool = False) -> None:
        """Register a SQL function (SQLAlchemy registers `regexp` so)."""
        self._connection.create_scalar_function(name, function, arguments, deterministic=deterministic)


class Cursor:
    """PEP 249 cursor."""

    arraysize = 1

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._rows: Iterator[tuple[Any, ...]] = iter(())
        self.description: list[tuple[Any, ...]] | None = None
        self.rowcount = -1
        self.lastrowid: int | None = None

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Cursor:
        """Run one statement."""
        return self._run(lambda cursor: cursor.execute(sql, parameters))

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> Cursor:
        """Run one statement for each row."""
        return self._run(lambda cursor: cursor.executemany(sql, rows))

    def _run(self, call: Any) -> Cursor:
        before = self._connection.total_changes()
        cursor = self._connection.cursor()
        columns: list[str] = []

        def note_columns(started: apsw.Cursor, _sql: str, _bindings: Any) -> bool:
            columns.extend(name for name, _ in started.get_description())
            return True

        cursor.exec_trace = note_columns
        try:
            rows = list(call(cursor))
        except apsw.ConstraintError as error:
            raise IntegrityError(str(error)) from error
        except (apsw.SQLError, apsw.BindingsError) as error:
            raise OperationalError(str(error)) from error
        except apsw.Error as error:
            raise DatabaseError(str(error)) from error
        self._rows = iter(rows)
        self.description = [(name, None, None, None, None, None, None) for name in columns] or None
        self.rowcount = -1 if columns else self._connection.total_changes() - before
        self.lastrowid = self._connection.last_insert_rowid()
        return self

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the next row, or None."""
        return next(self._rows, None)

    def fetchmany(self, size: int | None = None) -> list[tuple[Any, ...]]:
        """Return up to `size` rows."""
        count = self.arraysize if size is None else size
        return [row for _, row in zip(range(count), self._rows, strict=False)]

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return the rows that are left."""
        return list(self._rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self._rows

    def close(self) -> None:
        """Forget the rows."""
        self._rows = iter(())

    def setinputsizes(self, sizes: Any) -> None:
        """Do nothing (PEP 249 allows it)."""

    def setoutputsize(self, size: Any, column: Any = None) -> None:
        """Do nothing (PEP 249 allows it)."""


def connect(*_arguments: Any, **_options: Any) -> Connection:
    """Refuse: a connection comes from `transaction.connection()`.

    Raises: NotSupportedError always.
    """
    raise NotSupportedError("take the connection from ctx.transaction(): tx.connection()")
