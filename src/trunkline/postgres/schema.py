"""The schema in the database: which parts it has, in which layout.

Invariant: two processes that start at once make each part once; nothing of another layout is touched.
Read next: engine.py.
"""

from __future__ import annotations

import re
from zlib import crc32

import asyncpg

from trunkline.errors import ConfigurationError
from trunkline.postgres.settings import Settings, not_permitted

LAYOUT = 2
"""Layout of the tables; another number is not read."""

PROCESSES = """
CREATE TABLE @layout (part text PRIMARY KEY, version integer NOT NULL);
CREATE TABLE @process (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, sessions text NOT NULL, groups bigint NOT NULL DEFAULT 0,
    locked boolean NOT NULL, dead boolean NOT NULL DEFAULT false, started timestamptz NOT NULL DEFAULT now(),
    beat timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 20);
"""

_TABLE = re.compile(r"@(?=[a-z])")


def in_schema(sql: str, schema: str) -> str:
    """Return `sql` with the schema before each table that is written as `@table`.

    >>> in_schema("SELECT * FROM @inbox", "shop")
    'SELECT * FROM "shop".inbox'
    """
    return _TABLE.sub(f'"{schema}".', sql)


def lock_number(schema: str) -> int:
    """Return the class of our advisory locks in a database, a signed 32-bit number."""
    return crc32(f"trunkline {schema}".encode()) - 2**31


async def ensure_part(connection: asyncpg.Connection, settings: Settings, part: str, tables: str) -> None:
    """Make the tables of a part that are missing.

    Args:
        tables: what the part has; among it a function release_PART(integer) that gives back what a dead process held.
    Raises: ConfigurationError E205 for another layout or another program's schema, E246 without permission.
    """
    schema = settings.schema
    try:
        if await _is_there(connection, settings, part):
            return
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1, 0)", lock_number(schema))
            if await _is_there(connection, settings, part):
                return
            if part == "process":
                await connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
            await connection.execute(in_schema(tables, schema))
            await connection.execute(in_schema("INSERT INTO @layout VALUES ($1, $2)", schema), part, LAYOUT)
    except asyncpg.InsufficientPrivilegeError as error:
        raise not_permitted(error, settings) from error


async def _is_there(connection: asyncpg.Connection, settings: Settings, part: str) -> bool:
    schema, shown = settings.schema, settings.shown
    # Asked in one query: pg_class is readable by everyone.
    tables = await connection.fetch(
        "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = $1 AND c.relkind IN ('r', 'p')",
        schema,
    )
    names = {row[0] for row in tables}
    if not names:
        return False
    another = f"name another one with ?prefix= in the URL of {shown}"
    if "layout" not in names:
        raise ConfigurationError("E205", f"schema {schema!r} of {shown} was made by another program", another)
    try:
        version = await connection.fetchval(in_schema("SELECT version FROM @layout WHERE part = $1", schema), part)
    except asyncpg.UndefinedColumnError as error:
        raise ConfigurationError(
            "E205", f"schema {schema!r} of {shown} was made by another program", another
        ) from error
    if version not in (None, LAYOUT):
        raise ConfigurationError(
            "E205",
            f"schema {schema!r} of {shown} has layout {version}, this release reads {LAYOUT}",
            f"use the release that wrote it, or {another}",
        )
    return version is not None
