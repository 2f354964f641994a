"""A DB-API 2.0 face on the handler's open transaction, so that SQLAlchemy and existing code join it.

Invariant: `commit` and `rollback` change nothing here: the unit of work ends the transaction.
Source: PEP 249. Read next: stores/sqlite.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any

import apsw

from trunkline.errors import TransactionError

apilevel = "2.0"
threadsafety = 1
paramstyle = "qmark"
sqlite_version_info = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
sqlite_version = apsw.sqlite_lib_version()

Binary = bytes

_ENDS = re.compile(r"\s*(BEGIN|COMMIT|END|ROLLBACK(?!\s+(TRANSACTION\s+)?TO\b))\b", re.IGNORECASE)


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


class ApswTransaction:
    """The handler's open transaction on an apsw connection: the Transaction of the SQLite stores.

    Args:
        connection: with the transaction open.
        failed: gives what to raise for an error of apsw; the error itself, or the device's failure.
    """

    def __init__(
        self, connection: apsw.Connection, failed: Callable[[apsw.Error], Exception] = lambda error: error
    ) -> None:
        self._open: apsw.Connection | None = connection
        self.failed = failed
        # A handler's thread that outlived its time must not write into the next unit.
        self.lock = Lock()

    def end(self) -> None:
        """Refuse further statements; one that is running ends first."""
        with self.lock:
            self._open = None

    def raw(self, sql: str = "") -> apsw.Connection:
        """Return the connection for a statement.

        Raises: TransactionError E509 after the handler, E510 for a statement that would end the transaction.
        """
        if self._open is None:
            raise TransactionError(
                "E509", "the transaction ended with its handler", "use it before the handler returns"
            )
        if _ENDS.match(sql):
            raise TransactionError(
                "E510",
                f"{sql.split(None, 1)[0].upper()} inside the unit of work",
                "the unit commits when the handler returns and is undone when it raises; SAVEPOINT is allowed",
            )
        return self._open

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return the number of rows it changed."""
        with self.lock:
            connection = self.raw(sql)
            before = connection.total_changes()
            try:
                connection.execute(sql, parameters)
            except apsw.Error as error:
                raise self.failed(error) from None
            return connection.total_changes() - before

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one query; return its rows."""
        with self.lock:
            connection = self.raw(sql)
            try:
                return connection.execute(sql, parameters).fetchall()
            except apsw.Error as error:
                raise self.failed(error) from None

    def connection(self) -> Connection:
        """Return a DB-API 2.0 connection on this transaction."""
        return Connection(self)


class Connection:
    """The transaction as a connection, with the shortcuts of `sqlite3.Connection`."""

    Error = Error
    IntegrityError = IntegrityError
    OperationalError = OperationalError
    ProgrammingError = ProgrammingError
    isolation_level = None

    def __init__(self, transaction: ApswTransaction) -> None:
        self._transaction = transaction

    def cursor(self) -> Cursor:
        """Return a new cursor."""
        return Cursor(self._transaction)

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
        self._transaction.raw().create_scalar_function(name, function, arguments, deterministic=deterministic)


class Cursor:
    """PEP 249 cursor."""

    arraysize = 1

    def __init__(self, transaction: ApswTransaction) -> None:
        self._transaction = transaction
        self._rows: Iterator[tuple[Any, ...]] = iter(())
        self.description: list[tuple[Any, ...]] | None = None
        self.rowcount = -1
        self.lastrowid: int | None = None

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> Cursor:
        """Run one statement."""
        return self._run(sql, lambda cursor: cursor.execute(sql, parameters))

    def executemany(self, sql: str, rows: Sequence[Sequence[Any]]) -> Cursor:
        """Run one statement for each row."""
        return self._run(sql, lambda cursor: cursor.executemany(sql, rows))

    def _run(self, sql: str, call: Any) -> Cursor:
        with self._transaction.lock:
            return self._run_locked(sql, call)

    def _run_locked(self, sql: str, call: Any) -> Cursor:
        connection = self._transaction.raw(sql)
        before = connection.total_changes()
        cursor = connection.cursor()
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
            failure = self._transaction.failed(error)
            raise (DatabaseError(str(error)) if failure is error else failure) from error
        self._rows = iter(rows)
        self.description = [(name, None, None, None, None, None, None) for name in columns] or None
        self.rowcount = -1 if columns else connection.total_changes() - before
        self.lastrowid = connection.last_insert_rowid()
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
