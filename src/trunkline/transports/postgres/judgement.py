"""What PostgreSQL's settings do to what is promised.

Invariant: pure; what can be lost is said for each failure. Source: PostgreSQL, "Reliability and the Write-Ahead Log",
"Write Ahead Log" and "Replication" settings. Read next: inspector.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trunkline.inspection import Finding
from trunkline.postgres.settings import Settings

OWN_CONNECTIONS = 2
"""What an App has open beside its handlers' transactions."""
CUT_OFF = {
    "statement_timeout": "a statement that takes longer is cut off",
    "idle_in_transaction_session_timeout": "a handler that waits longer with an open transaction is cut off",
    "transaction_timeout": "a handler with a transaction that takes longer is cut off",
}


def judge(settings: Mapping[str, str], facts: Mapping[str, Any], asked: Settings, held_s: float) -> Iterator[Finding]:
    """Yield what each setting is worth.

    Args:
        settings: of pg_settings, in their own units.
        facts: what the server says of itself, its clients and standbys.
    """
    yield Finding("server", "version", str(facts["server_version"]), "kept", "has what Trunkline uses")
    yield from _disk(settings)
    yield from _copies(settings, facts)
    yield from _connections(settings, facts, asked)
    yield from _pooler(facts, asked)
    yield from _transactions(settings, held_s)
    if not facts["exists"] and not facts["may_create"]:
        yield Finding(
            f"user {facts['me']}", "CREATE", "no", "broken",
            f"the schema {asked.schema} does not exist and this user may not make it (E246)",
            f"CREATE SCHEMA {asked.schema} AUTHORIZATION {facts['me']}",
        )  # fmt: skip


def _disk(settings: Mapping[str, str]) -> Iterator[Finding]:
    if settings["fsync"] == "on":
        yield Finding("server", "fsync", "on", "kept", "what is committed is forced to disk")
    else:
        yield Finding(
            "server", "fsync", "off", "broken", "when the machine fails the whole database may be damaged",
            "fsync = on", "everything, when the machine fails",
        )  # fmt: skip
    if settings["full_page_writes"] == "on":
        yield Finding("server", "full_page_writes", "on", "kept", "a page that was half written is mended")
    else:
        yield Finding(
            "server", "full_page_writes", "off", "weak",
            "a page that was half written when the machine failed stays damaged",
            "full_page_writes = on, unless the file system writes whole pages",
            "what is on pages half written, when the machine fails",
        )  # fmt: skip
    level = settings["synchronous_commit"]
    if level != "off":
        yield Finding("server", "synchronous_commit", level, "kept", "confirmed means on the disk of the server")
        return
    wait_ms = 3 * int(settings["wal_writer_delay"])
    yield Finding(
        "server", "synchronous_commit", "off", "broken",
        f"up to {wait_ms} ms of confirmed messages and effects are lost when the server crashes",
        "synchronous_commit = on",
        f"up to {wait_ms} ms of confirmed messages and effects, when the server crashes",
    )  # fmt: skip


def _copies(settings: Mapping[str, str], facts: Mapping[str, Any]) -> Iterator[Finding]:
    names, standbys, in_step = settings["synchronous_standby_names"], facts["standbys"], facts["in_step"]
    value = f"{names or 'none named'}, {standbys} standby{'s' * (standbys != 1)} connected"
    waits = names and settings["synchronous_commit"] not in ("off", "local")
    if waits and not in_step:
        yield Finding(
            "server", "synchronous_standby_names", value, "broken",
            "no standby is in step, so no commit ends and everything waits", "connect a standby, or empty the setting",
        )  # fmt: skip
    elif waits:
        yield Finding("server", "synchronous_standby_names", value, "kept", "confirmed means on a standby too")
    elif standbys:
        yield Finding(
            "server", "synchronous_standby_names", value, "weak",
            "a failover can lose what was confirmed and had not reached the standby",
            "synchronous_standby_names = 'ANY 1 (…)'", "the last confirmed messages, in a failover",
        )  # fmt: skip
    else:
        yield Finding(
            "server", "synchronous_standby_names", value, "weak", "there is one copy of everything",
            "a standby named in synchronous_standby_names", "everything, when the disk of the server is lost",
        )  # fmt: skip


def _connections(settings: Mapping[str, str], facts: Mapping[str, Any], asked: Settings) -> Iterator[Finding]:
    most = int(settings["max_connections"]) - int(settings.get("superuser_reserved_connections", 0))
    each = OWN_CONNECTIONS + asked.pool
    more = max(0, most - facts["connections"]) // each
    yield Finding(
        "server", "max_connections", f"{settings['max_connections']}, {facts['connections']} in use",
        "kept" if more else "weak",
        f"a process takes up to {each} ({OWN_CONNECTIONS} and ?pool={asked.pool}): there is room for {more} more",
        "" if more else "raise max_connections, or lower ?pool= in the URL",
    )  # fmt: skip


def _pooler(facts: Mapping[str, Any], asked: Settings) -> Iterator[Finding]:
    """A pooler such as PgBouncer cannot be asked from inside; the server's own port gives it away."""
    named = {port for _, port in asked.hosts}
    if asked.pooled:
        yield Finding(
            "URL", "statement_cache", "0", "kept",
            "a pooler may stand between; without notifications other processes' messages are found by looking",
        )  # fmt: skip
    elif facts["port"] is not None and facts["port"] not in named:
        yield Finding(
            "server", "port", str(facts["port"]), "unknown",
            "the URL names another port: if a pooler in transaction mode stands between, statements fail",
            "behind such a pooler ?statement_cache=0 in the URL; behind a plain proxy nothing",
        )  # fmt: skip


def _transactions(settings: Mapping[str, str], held_s: float) -> Iterator[Finding]:
    level = settings["default_transaction_isolation"]
    usual = level == "read committed"
    yield Finding(
        "server", "default_transaction_isolation", level, "kept" if usual else "weak",
        "handlers see what others have committed" if usual
        else "transactions of handlers that meet are undone and done again, so busy systems become slow",
        "" if usual else "read committed for this user: ALTER ROLE … SET default_transaction_isolation",
    )  # fmt: skip
    for name, meaning in CUT_OFF.items():
        limit_ms = int(settings.get(name, 0))
        if limit_ms and limit_ms / 1000 < held_s:
            yield Finding(
                "server", name, f"{limit_ms / 1000:g} s", "weak", f"{meaning}, fails and is tried again",
                f"0, or more than the longest handler ({held_s:g} s) for this user",
            )  # fmt: skip
    if settings.get("autovacuum") == "off":
        yield Finding(
            "server", "autovacuum", "off", "weak", "tables grow and reading becomes slow, for what is handled stays",
            "autovacuum = on",
        )  # fmt: skip
