"""What a postgresql: URL asks for, and one connection made from it.

Invariant: what no waiting mends (password, permission, TLS, version) is a ConfigurationError, everything else a
TransportError; no secret is in any text. Read next: engine.py.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from trunkline.errors import ConfigurationError, StoreFullError, StoreLostError, TransportError
from trunkline.link import TIMEOUT_S, Options, said
from trunkline.transport import Address, Credentials

LEASE_S = 10.0
"""A process that has not shown a sign of life for so long is taken over, even if its connection stands."""
POOL = 10
"""Most handlers of one process that have a transaction open at the same time."""
STATEMENTS = 100
"""Prepared statements kept per connection; 0 for a pooler in transaction mode."""
OLDEST_VERSION = 13
SSL_MODES = ("disable", "prefer", "require", "verify-ca", "verify-full")

_SCHEMA_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,47}")
_DISCONNECTED = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,  # the primary became a standby: another host is the primary now
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
DRIVER_ERRORS = (
    asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError, AttributeError,
)  # fmt: skip
"""Whatever a statement can meet; an AttributeError, see _GONE."""
OF_MACHINE = (
    *_DISCONNECTED, asyncpg.InsufficientResourcesError, asyncpg.PostgresSystemError, asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
)  # fmt: skip
"""What no statement is to blame for, whoever wrote it: no room, no memory, a restart, others in the way."""
_OF_VALUES = ("22", "23", "54")
"""Classes of SQLSTATE that what is written is to blame for: data, constraints, limits."""
_GONE = re.compile("'NoneType' object has no attribute '(bind_execute|execute|prepare|query|close_statement)")
"""What asyncpg says when its connection breaks between two steps of one statement."""
_CLOSED = re.compile("closed|released|cannot perform operation: connection", re.IGNORECASE)


class Settings(msgspec.Struct, frozen=True):
    """A database and how to use it.

    Attributes:
        credentials: read anew for each connection.
        schema: in which all tables are; `prefix` in the URL, as on every broker.
        pool: see POOL. statement_cache: see STATEMENTS. lease_s: see LEASE_S.
        timeout_s: how long a start or a publish waits for the server.
    """

    shown: str
    hosts: tuple[tuple[str, int], ...]
    credentials: Credentials
    database: str
    schema: str
    timeout_s: float
    lease_s: float
    pool: int
    statement_cache: int
    sslmode: str
    ca: str | None
    cert: str | None
    key: str | None

    @property
    def pooled(self) -> bool:
        """Return whether a pooler may give each transaction another server connection."""
        return self.statement_cache == 0


def read_settings(address: Address) -> Settings:
    """Return what a URL asks for.

    Raises: ConfigurationError E206 without a database, E240 or E241 for an option.
    """
    options = Options(address)
    schema = options.text("prefix", "trunkline") or ""
    if not _SCHEMA_NAME.fullmatch(schema):
        raise ConfigurationError(
            "E241",
            f"prefix={schema!r} in the URL of {address.shown}",
            "it names the schema: lower-case letters, digits, '_', '-' and '.', up to 48",
        )
    database = address.path.strip("/")
    if not database:
        raise ConfigurationError(
            "E206", f"{address.shown} names no database", "such as postgresql://user:password@host/shop"
        )
    ca = options.text("ca")
    settings = Settings(
        address.shown,
        tuple((name, port or 5432) for name, port in address.hosts) or (("localhost", 5432),),
        address.credentials,
        database,
        schema,
        options.seconds("timeout_s", TIMEOUT_S),
        options.lease(LEASE_S),
        options.number("pool", POOL),
        options.number("statement_cache", STATEMENTS, least=0),
        options.choice("sslmode", SSL_MODES, "verify-full" if ca else "prefer"),
        ca,
        options.text("cert"),
        options.text("key"),
    )
    options.end()
    return settings


def _tls(settings: Settings) -> Any:
    """Return what asyncpg takes for `ssl`: certificates are verified as sslmode says, as libpq does.

    Raises: ConfigurationError E245 for a file that cannot be read.
    """
    if settings.sslmode in ("disable", "prefer") and settings.cert is None:
        return settings.sslmode
    try:
        context = ssl.create_default_context(cafile=settings.ca)
        if settings.cert is not None:
            context.load_cert_chain(settings.cert, settings.key)
    except OSError as error:
        place = ", ".join(str(Path(path)) for path in (settings.ca, settings.cert, settings.key) if path)
        raise ConfigurationError(
            "E245", f"{place} for {settings.shown} cannot be used: {error}", "name readable PEM files"
        ) from error
    context.check_hostname = settings.sslmode == "verify-full"
    if not settings.sslmode.startswith("verify"):
        context.verify_mode = ssl.CERT_NONE
    return context


STEADY = {
    # Each of our statements has one good plan, by index; tables that grow and shrink mislead the planner's numbers.
    "enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}  # fmt: skip
"""Settings of connections on which only our own statements run."""


async def connect(settings: Settings, sessions: str, **server_settings: str) -> asyncpg.Connection:
    """Return a connection to the primary.

    Args:
        sessions: what the server is told as the name of the application.

    Raises: ConfigurationError E244 to E248; TransportError E520 if the server is not reached.
    """
    try:
        connection = await asyncpg.connect(**arguments(settings, sessions, server_settings))
    except Exception as error:
        raise refusal(error, settings) from error
    if connection.get_server_version().major < OLDEST_VERSION:
        version = connection.get_server_version()
        await connection.close()
        raise ConfigurationError(
            "E248",
            f"{settings.shown} is PostgreSQL {version.major}.{version.minor}",
            f"{OLDEST_VERSION} or newer is needed",
        )
    return connection


def arguments(settings: Settings, sessions: str, server_settings: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `asyncpg.connect`."""
    return {
        "host": [name for name, _ in settings.hosts],
        "port": [port for _, port in settings.hosts],
        "user": settings.credentials.user,
        # asyncpg asks for it at each connection, those that a pool makes later among them.
        "password": None if settings.credentials.password is None else lambda: settings.credentials.password,
        "database": settings.database,
        "ssl": _tls(settings),
        "timeout": settings.timeout_s,
        "statement_cache_size": settings.statement_cache,
        "target_session_attrs": "primary",
        # A pooler passes on no settings but the name; statements there run with the server's own.
        "server_settings": {"application_name": sessions, **({} if settings.pooled else server_settings)},
    }


def refusal(error: Exception, settings: Settings) -> Exception:
    """Return what a failed connection means."""
    shown = settings.shown
    text = str(error)
    if isinstance(error, ConfigurationError):
        return error
    if isinstance(error, ssl.SSLError | ssl.CertificateError) or "SSL" in text or "no encryption" in text:
        return ConfigurationError(
            "E245", f"TLS with {shown} failed: {text}", "options are sslmode, ca, cert and key; ca names a PEM file"
        )
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return ConfigurationError(
            "E244", f"{shown} refused user and password: {text}", "postgresql://user:password@host/database"
        )
    if isinstance(error, asyncpg.InvalidCatalogNameError | asyncpg.InsufficientPrivilegeError):
        return not_permitted(error, settings)
    if isinstance(error, asyncpg.InterfaceError | ValueError):
        return ConfigurationError("E246", f"{shown} cannot be used: {text}", "see the cause above")
    return TransportError("E520", f"{shown} was not reached: {said(error)}", "check that it runs")


def not_permitted(error: Exception, settings: Settings) -> ConfigurationError:
    """Return E246 for a database or schema that the user may not use."""
    return ConfigurationError(
        "E246",
        f"{settings.shown} does not permit this: {error}",
        f"create the database, and let the user create and use the schema {settings.schema}",
    )


def is_lost(error: BaseException) -> bool:
    """Return whether an error means that the connection is gone."""
    if isinstance(error, AttributeError):
        return bool(_GONE.search(str(error)))
    if isinstance(error, asyncpg.InterfaceError) and not isinstance(error, asyncpg.PostgresError):
        return bool(_CLOSED.search(str(error)))
    return isinstance(error, _DISCONNECTED)


def is_of_server(error: BaseException) -> bool:
    """Return whether what a statement of ours met is the fault of no message: others would meet it as well.

    So it is with whatever the server says (a missing permission or table, no room) that is not about what was written.
    """
    if isinstance(error, asyncpg.PostgresError):
        return (error.sqlstate or "")[:2] not in _OF_VALUES
    return is_lost(error)


def translate(error: BaseException, settings: Settings) -> TransportError:
    """Return what a failed statement of ours means to whoever waits.

    Raises: an AttributeError that is not asyncpg's.
    """
    if isinstance(error, AttributeError) and not is_lost(error):
        raise error
    if isinstance(error, TransportError):
        return error
    if isinstance(error, asyncpg.DiskFullError):
        return StoreFullError("E502", f"no room left for {settings.shown}", "free disk space; nothing was stored")
    if is_lost(error):
        return StoreLostError(
            "E520",
            f"the connection to {settings.shown} was lost: {said(error)}",
            "a running service makes it anew; try again",
        )
    kind = StoreLostError if is_of_server(error) else TransportError
    return kind("E506", f"{settings.shown} refused a statement: {error}")
