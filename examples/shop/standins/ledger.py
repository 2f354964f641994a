"""The database file of a stand-in.

Invariant: a transaction that has ended is in the file before the caller can answer, so it survives
`kill -9`.
Never does: anything about Stripe, Twilio or mail. Read next: stripe.py.
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def open_ledger(path: str, schema: str) -> sqlite3.Connection:
    """Open the file, make missing tables, and return a connection in autocommit mode.

    Args:
        path: file name; made when missing.
        schema: SQL that may run again on a file that has it already.
    """
    database = sqlite3.connect(path, isolation_level=None, cached_statements=64)
    database.execute("PRAGMA journal_mode = WAL")
    # NORMAL: a commit is in the operating system's cache, safe from kill -9 but not from a power
    # cut, and costs no fsync.
    database.execute("PRAGMA synchronous = NORMAL")
    # An audit may read the file while the stand-in writes it.
    database.execute("PRAGMA busy_timeout = 5000")
    database.executescript(schema)
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block writes, all or nothing; roll back when it raises."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
