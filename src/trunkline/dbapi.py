"""A DB-API 2.0 face on the handler's open transaction, so that SQLAlchemy and existing code join it.

Invariant: `commit` and `rollback` change nothing here: the unit of work ends the transaction.
Source: PEP 249. Read next: stores/sqlite/store.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, TypeVar

import apsw

from trunkline.errors import TransactionError

apilevel = "2.0"
threadsafety = 1
paramstyle = "qmark"
sqlite_version_info = tuple(int(part) for part in apsw.sqlite_lib_version().split("."))
sqlite_version = apsw.sqlite_lib_version()

Binary = bytes

T = TypeVar("T")

_INSTEAD = (
    "the unit commits when the handler returns and is undone when it raises; SAVEPOINT is allowed, and everything on"
    " tables of your own"
)
_ENDS = re.compile(
    r"\s*(BEGIN\b|COMMIT\b|END\b|ROLLBACK\b(?!\s+(TRANSACTION\s+)?TO\b)|(RELEASE|ROLLBACK)\b.*\btrunkline_)",
    re.IGNORECASE | re.DOTALL,
)
"""Statements that the engine has prepared itself, so that the Guard would not be asked about them."""


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


class Guard:
    """SQLite authorizer that refuses what a handler's statement must not do, however it is written.

    It is asked when a statement is prepared; ApswTransaction turns it on for the statements of handlers only.
    Source: SQLite C interface, sqlite3_set_authorizer.
    """

    def __init__(self) -> None:
        self.watching = False
        self.refused = ""

    def __call__(self, action: int, first: str | None, second: str | None, _schema: Any, _trigger: Any) -> int:
        """Return whether a part of a statement may run."""
        if self.watching and _is_refused(action, first or "", second or ""):
            what = str(apsw.mapping_authorizer_function[action]).removeprefix("SQLITE_").replace("_", " ")
            self.refused = " ".join(part for part in (what, first, second) if part)
            return apsw.SQLITE_DENY
        return apsw.SQLITE_OK


_ASKING = {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list"}
"""PRAGMAs that take an argument and change nothing."""
_ACTING = {"wal_checkpoint", "incremental_vacuum", "optimize", "shrink_memory"}
"""PRAGMAs that take none and do something."""
_ENDING = {apsw.SQLITE_TRANSACTION, apsw.SQLITE_ATTACH, apsw.SQLITE_DETACH}
_ON_FIRST = {apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE, apsw.SQLITE_DROP_TABLE}
_ON_SECOND = {
    apsw.SQLITE_ALTER_TABLE, apsw.SQLITE_SAVEPOINT, apsw.SQLITE_CREATE_TRIGGER, apsw.SQLITE_DROP_TRIGGER,
    apsw.SQLITE_CREATE_INDEX, apsw.SQLITE_DROP_INDEX,
}  # fmt: skip


def _is_refused(action: int, first: str, second: str) -> bool:
    if action == apsw.SQLITE_PRAGMA:
        return first.lower() not in _ASKING if second else first.lower() in _ACTING
    ours = "trunkline_"
    return (
        action in _ENDING
        or (action in _ON_FIRST and first.lower().startswith(ours))
        or (action in _ON_SECOND and second.lower().startswith(ours))
    )


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
        self._failed = failed
        self._failure: Exception | None = None
        guard = connection.authorizer
        if not isinstance(guard, Guard):
            guard = connection.authorizer = Guard()
        self._guard = guard
        # A handler's thread that outlived its time must not write into the next unit.
        self.lock = Lock()

    def end(self) -> None:
        """Refuse further statements; one that is running ends first."""
        with self.lock:
            self._open = None

    def raw(self, sql: str = "") -> apsw.Connection:
        """Return the connection for a statement.

        Raises: TransactionError E509 after the handler, E510 for a statement that would end the transaction, E511
            after SQLite has ended it by itself; the device's failure, if that was why.
        """
        if self._open is None:
            raise TransactionError(
                "E509", "the transaction ended with its handler", "use it before the handler returns"
            )
        if _ENDS.match(sql):
            raise TransactionError(
                "E510",
                f"{sql.split(None, 1)[0].upper()} inside the unit of work",
                _INSTEAD,
            )
        if not self._open.in_transaction:  # each statement would be a commit of its own
            raise self._failure or TransactionError(
                "E511", "an earlier statement undid the whole transaction, as OR ROLLBACK does", "use OR ABORT"
            )
        return self._open

    def run(self, sql: str, call: Callable[[apsw.Connection], T]) -> T:
        """Return `call(connection)`, a statement of the handler's, under the guard.

        Raises: as `raw`; what the statement meets, translated where it is the device's failure.
        """
        with self.lock:
            connection = self.raw(sql)
            self._guard.watching = True
            try:
                return call(connection)
            except apsw.AuthError as error:
                raise TransactionError("E510", f"{self._guard.refused} inside the unit of work", _INSTEAD) from error
            except apsw.Error as error:
                failure = self._failed(error)
                if failure is error:
                    raise
                self._failure = failure
                raise failure from None
            finally:
                self._guard.watching = False

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return the number of rows it changed."""

        def call(connection: apsw.Connection) -> int:
            before = connection.total_changes()
            connection.execute(sql, parameters)
            return connection.total_changes() - before

        return self.run(sql, call)

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one query; return its rows."""
        return self.run(sql, lambda connection: connection.execute(sql, parameters).fetchall())

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

    def _run(self, sql: str, call: Callable[[apsw.Cursor], apsw.Cursor]) -> Cursor:
        columns: list[str] = []

        def note_columns(started: apsw.Cursor, _sql: str, _bindings: Any) -> bool:
            columns.extend(name for name, _ in started.get_description())
            return True

        def run(connection: apsw.Connection) -> tuple[list[Any], int, int]:
            before = connection.total_changes()
            cursor = connection.cursor()
            cursor.exec_trace = note_columns
            rows = list(call(cursor))
            return rows, connection.total_changes() - before, connection.last_insert_rowid()

        try:
            rows, changed, self.lastrowid = self._transaction.run(sql, run)
        except apsw.ConstraintError as error:
            raise IntegrityError(str(error)) from error
        except (apsw.SQLError, apsw.BindingsError) as error:
            raise OperationalError(str(error)) from error
        except apsw.Error as error:
            raise DatabaseError(str(error)) from error
        self._rows = iter(rows)
        self.description = [(name, None, None, None, None, None, None) for name in columns] or None
        self.rowcount = -1 if columns else changed
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
