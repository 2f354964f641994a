"""The handler's open transaction: its own statements, asyncpg's connection, SQLAlchemy on it.

Invariant: nothing but the unit of work ends the transaction; a statement that would is refused.
Read next: engine.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from trunkline.errors import LeaseLostError, TransactionError, TransportError
from trunkline.postgres.settings import DRIVER_ERRORS, OF_MACHINE, Settings, is_lost, is_of_server, translate

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from trunkline.store import Unit

_LEAD = r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/|;)*"
_ENDS = re.compile(
    _LEAD + r"(BEGIN|START\s+TRANSACTION|COMMIT|END|ABORT|PREPARE\s+TRANSACTION|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)"
    r"\s+)?TO\b))\b",
    re.IGNORECASE | re.DOTALL,
)
_MARKS = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|--[^\n]*|/\*.*?\*/|\?", re.DOTALL)
UNDO_S = 3.0
"""How long a server may take to undo a transaction; after that its connection is ended, and the server undoes it."""
_INSTEAD = "the unit commits when the handler returns and is undone when it raises; SAVEPOINT is allowed"


class PostgresTransaction:
    """A transaction on a connection of the pool; see store.Transaction.

    Attributes:
        failure: of the first statement that failed: PostgreSQL takes no other after it, unless a SAVEPOINT was before.
    """

    def __init__(self, connection: Any, pool: asyncpg.Pool, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._pool = pool
        self._transaction = connection.transaction()
        self._ended = False
        self._one = asyncio.Lock()
        self.failure: BaseException | None = None

    async def start(self) -> None:
        """Begin."""
        await self._transaction.start()

    # --- for handlers ---

    @property
    def asyncpg(self) -> asyncpg.Connection:
        """Return the connection, inside the transaction.

        Its own `transaction()` blocks are savepoints here.
        Raises: TransactionError E509 after the handler.
        """
        return self._open("")

    async def execute(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one statement; return the number of rows it changed.

        Args:
            sql: with `$1`, `$2` … for parameters, or `?` for each.
        Raises: TransactionError E509 after the handler, E510 for what would end the transaction; asyncpg's errors.
        """
        connection = self._open(sql)
        sql = _numbered(sql) if parameters else sql
        async with self._one:
            with self._noting_failure():
                if parameters:
                    status = await connection.execute(sql, *parameters)
                else:
                    # Prepared, so that it can be one statement only: "; COMMIT" is refused by the server.
                    statement = await connection.prepare(sql)
                    await statement.fetch()
                    status = statement.get_statusmsg()
        self._check_still_open()
        count = status.rpartition(" ")[2]
        return int(count) if count.isdigit() and not status.startswith("SELECT") else 0

    async def fetch(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one query; return its rows. Args and errors as `execute`."""
        connection = self._open(sql)
        async with self._one:
            with self._noting_failure():
                rows = await connection.fetch(_numbered(sql) if parameters else sql, *parameters)
        self._check_still_open()
        return [tuple(row) for row in rows]

    @contextlib.asynccontextmanager
    async def sqlalchemy(self) -> AsyncIterator[AsyncConnection]:
        """Give SQLAlchemy's AsyncConnection on this transaction; a Session is bound to it.

        Inside, a savepoint is open; it is released when the block ends, and undone when an exception leaves it.
        """
        from sqlalchemy.ext.asyncio import create_async_engine
        from sqlalchemy.pool import StaticPool

        connection = self._open("")

        async def existing(*_arguments: Any, **_options: Any) -> Any:
            return connection

        engine = create_async_engine("postgresql+asyncpg://", poolclass=StaticPool, async_creator=existing)
        try:
            async with engine.begin() as joined:
                with self._noting_failure():
                    yield joined
        finally:
            await engine.dispose(close=False)

    def connection(self) -> Any:
        """Refuse: there is no blocking connection here.

        Raises: TransactionError E514 always.
        """
        raise TransactionError(
            "E514",
            "a transaction in PostgreSQL has no DB-API connection",
            "use tx.execute and tx.fetch, tx.asyncpg, or async with tx.sqlalchemy() in an async handler",
        )

    def end(self) -> None:
        """Refuse further statements."""
        self._ended = True

    def _open(self, sql: str) -> Any:
        if self._ended:
            raise TransactionError(
                "E509", "the transaction ended with its handler", "use it before the handler returns"
            )
        ends = _ENDS.match(sql)
        if ends:
            raise TransactionError("E510", f"{ends[1].upper()} inside the unit of work", _INSTEAD)
        return self._connection

    @contextlib.contextmanager
    def _noting_failure(self) -> Any:
        try:
            yield
        except Exception as error:
            if is_lost(error):
                raise translate(error, self._settings) from error
            if self.failure is None:
                self.failure = error
            raise

    def _check_still_open(self) -> None:
        if not self._is_gone() and not self._connection.is_in_transaction():
            raise TransactionError("E511", "a statement ended the whole transaction", _INSTEAD)

    # --- for the engine ---

    def connection_for_commit(self) -> Any:
        """Return the connection, for what is committed with the handler's statements.

        Raises: RuntimeError, a failure of the handler, if the transaction is over.
        """
        if not self._is_gone() and not self._connection.is_in_transaction():
            raise RuntimeError("the handler ended its transaction by itself, so its unit of work cannot be committed")
        return self._connection

    async def commit(self) -> None:
        """Commit."""
        await self._transaction.commit()

    async def close(self) -> None:
        """Give the connection back after the commit."""
        if self._is_gone():
            return
        try:
            await self._pool.release(self._connection, timeout=10)
        except DRIVER_ERRORS as error:
            if not is_lost(error):
                raise

    async def abandon(self) -> None:
        """Undo everything and give the connection back."""
        self._ended = True
        if self._is_gone():
            return  # what is not committed is undone with its connection
        connection = self._connection
        try:
            if connection.is_in_transaction():
                async with asyncio.timeout(UNDO_S):
                    await self._transaction.rollback()
            else:
                connection.terminate()  # in a state that nobody knows
        except DRIVER_ERRORS:
            if not self._is_gone():
                connection.terminate()
        await self.close()

    def why_undone(self, error: BaseException, unit: Unit, *, sent: bool) -> BaseException:
        """Return what to tell about `unit`, whose transaction was not, or perhaps not, committed.

        Args:
            sent: whether the commit was asked for. Before it only statements of ours are run, with what the handler
                left behind; the commit itself checks what the user's statements put off.
        """
        if isinstance(error, LeaseLostError):
            # Not final here: the process goes on under a new number, and this message comes again.
            return TransportError("E508", "another process has this message now")
        if isinstance(error, asyncpg.InFailedSQLTransactionError):
            return self.failure or error
        if sent and is_lost(error) and not unit.deliveries:
            return TransportError(
                "E521",
                f"the connection to {self._settings.shown} was lost during a commit; whether it was done is not known",
                "look for what it wrote before you do it again",
            )
        ours = isinstance(error, OF_MACHINE) or is_lost(error) if sent else is_of_server(error)
        return translate(error, self._settings) if ours else error

    def _is_gone(self) -> bool:
        """Return whether the connection was closed: then the pool has taken it back by itself."""
        try:
            return bool(self._connection.is_closed())
        except asyncpg.InterfaceError:
            return True


def _numbered(sql: str) -> str:
    """Return `sql` with `$1`, `$2` … where it has `?`; one that has `$1` already stays as it is.

    >>> _numbered("UPDATE t SET a = ? WHERE b = '?' AND c = ?")
    "UPDATE t SET a = $1 WHERE b = '?' AND c = $2"
    """
    if "$1" in sql or "?" not in sql:
        return sql
    number = 0

    def mark(found: re.Match[str]) -> str:
        nonlocal number
        if found[0] != "?":
            return found[0]
        number += 1
        return f"${number}"

    return _MARKS.sub(mark, sql)
