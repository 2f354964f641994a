"""One statement of ours in a transaction of the user's, whichever driver it is open on.

Invariant: it is run only inside an open transaction, so it is committed or undone with what the user wrote.
Never does: commit, or import a driver that the user has not. Read next: ../stores/postgres/store.py.
"""

from __future__ import annotations

from typing import Any

from trunkline.clock import offload
from trunkline.errors import PublishError

_KNOWN = "a connection of asyncpg or psycopg, or SQLAlchemy's AsyncConnection or AsyncSession on one of them"


async def run_within(connection: Any, sql: str, *parameters: Any) -> None:
    """Run `sql`, with parameters `$1`, `$2` …, on a connection of the user's.

    Raises: PublishError E315 if it is of no known kind, E316 if no transaction is open; what its driver raises.
    """
    packages = {cls.__module__.partition(".")[0] for cls in type(connection).__mro__}
    if "sqlalchemy" in packages:
        await _within_sqlalchemy(connection, sql, parameters)
    elif "asyncpg" in packages:
        if not connection.is_in_transaction():
            raise _no_transaction("async with connection.transaction():")
        await connection.execute(sql, *parameters)
    elif "psycopg" in packages:
        await _within_psycopg(connection, sql, parameters)
    else:
        raise _unknown(connection)


async def _within_sqlalchemy(connection: Any, sql: str, parameters: tuple[Any, ...]) -> None:
    if hasattr(connection, "get_bind") and hasattr(connection, "flush"):
        connection = await connection.connection()  # of an AsyncSession
    if not hasattr(connection, "get_raw_connection"):
        raise _unknown(connection)
    # Makes SQLAlchemy begin, which it puts off until the first statement that goes through it.
    await connection.exec_driver_sql("SELECT 1")
    raw = await connection.get_raw_connection()
    await run_within(raw.driver_connection, sql, *parameters)


async def _within_psycopg(connection: Any, sql: str, parameters: tuple[Any, ...]) -> None:
    import psycopg

    idle = connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    if idle and connection.autocommit:
        raise _no_transaction("async with connection.transaction():")
    if isinstance(connection, psycopg.AsyncConnection):
        async with psycopg.AsyncRawCursor(connection) as cursor:
            await cursor.execute(sql, parameters)
    else:
        await offload(_blocking, connection, sql, parameters)


def _blocking(connection: Any, sql: str, parameters: tuple[Any, ...]) -> None:
    import psycopg

    with psycopg.RawCursor(connection) as cursor:
        cursor.execute(sql, parameters)


def _no_transaction(how: str) -> PublishError:
    return PublishError("E316", "publishing within a connection that has no transaction open", f"open one: {how}")


def _unknown(connection: Any) -> PublishError:
    kind = f"{type(connection).__module__}.{type(connection).__qualname__}"
    return PublishError("E315", f"publishing within {kind}", f"it can be {_KNOWN}")
