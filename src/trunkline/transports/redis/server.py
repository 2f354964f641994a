"""The server that a URL names: where it is, who signs in, how to connect.

Invariant: a connection that is handed out is to a writable server that has what Trunkline needs.
Read next: connection.py.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError
from trunkline.link import TIMEOUT_S, Options
from trunkline.partitions import LEASE_S
from trunkline.transport import Address
from trunkline.transports.redis.connection import Connection, Refusal, failure, pack
from trunkline.wire import MAX_WIRE_BYTES

PORT = 6379
ATTEMPT_S = 5.0
"""How long one host may take to accept a connection; half of a shorter `timeout_s`, so that the reason is told."""
PROBE_S = 1.0
"""How long a port is looked at that did not answer as asked."""
OLDEST = (6, 2)
"""XAUTOCLAIM, XTRIM MINID and XPENDING IDLE came with this version."""

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Server:
    """Connects to the first of the hosts that is a primary.

    Attributes:
        version: of the server, known after the first connection.
        max_bytes: largest message that it takes.
        settings: those that decide what a confirmation is worth, where the server tells them.
    """

    def __init__(self, address: Address, clock: Clock) -> None:
        options = Options(address)
        self.timeout_s = options.seconds("timeout_s", TIMEOUT_S)
        self.lease_s = options.lease(LEASE_S)
        self.replicas = options.number("replicas", 0, least=0)
        prefix = options.text("prefix", "trunkline")
        files = {name: options.text(name) for name in ("ca", "cert", "key")}
        options.end()
        if address.scheme != "rediss" and any(files.values()):
            raise ConfigurationError(
                "E241", f"{address.shown} has ca, cert or key without TLS", "write rediss:// in place of redis://"
            )
        if not prefix or not _PREFIX.fullmatch(prefix):
            raise ConfigurationError(
                "E241",
                f"prefix={prefix!r} in the URL of {address.shown}",
                "letters, digits and '-', '_', '.', at most 100",
            )
        self.prefix = prefix
        self.shown = address.shown
        self.version: tuple[int, ...] = OLDEST
        self.max_bytes = MAX_WIRE_BYTES
        self.settings: dict[str, str] = {}
        self._clock = clock
        self._hosts = [(name, port or PORT) for name, port in address.hosts] or [("localhost", PORT)]
        self._database = _database(address)
        self._credentials = address.credentials
        self._tls = _tls(address, files) if address.scheme == "rediss" else None

    async def connect(self, lost: Callable[[Connection], None]) -> Connection:
        """Return a connection to the first host that is a writable server.

        Raises: ConfigurationError E244 to E248; TransportError E522 when it may work later.
        """
        problems = []
        for host, port in self._hosts:
            try:
                return await self._connect(host, port, lost)
            except TransportError as error:
                problems.append(error.message)
        raise TransportError("E522", "; ".join(problems), "see whether it runs")

    async def _connect(self, host: str, port: int, lost: Callable[[Connection], None]) -> Connection:
        connection = Connection(self.shown, self._clock, self.timeout_s, lost)
        try:
            async with asyncio.timeout(min(ATTEMPT_S, self.timeout_s / 2)):
                await self._open(connection, host, port)
                await self._greet(connection, f"{host}:{port}")
        except TimeoutError:
            await _forget(connection)
            await self._check_scheme(host, port)
            raise TransportError("E522", f"{host}:{port} does not answer", "see whether it runs") from None
        except _EndedAtOnceError:
            await _forget(connection)
            await self._check_scheme(host, port)
            raise
        except BaseException:
            await _forget(connection)
            raise
        return connection

    async def _check_scheme(self, host: str, port: int) -> None:
        """Look whether the port speaks TLS and the URL does not, or the other way round.

        Raises: ConfigurationError E245 if so.
        """
        if self._tls is None and await _speaks_tls(host, port):
            raise ConfigurationError("E245", f"{host}:{port} speaks TLS only", "write rediss:// in place of redis://")
        if self._tls is not None and await _speaks_plainly(host, port):
            raise ConfigurationError("E245", f"{host}:{port} speaks no TLS", "write redis:// in place of rediss://")

    async def _open(self, connection: Connection, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: connection, host, port, ssl=self._tls)
        except ssl.SSLError as error:
            hint = "give the authority's certificate with ca=, or the right host"
            if "WRONG_VERSION" in str(error) or "RECORD_LAYER" in str(error):
                hint = "this port speaks no TLS: write redis://"
            raise ConfigurationError("E245", f"{host}:{port}: TLS: {error}", hint) from error
        except socket.gaierror as error:
            raise TransportError("E522", f"host {host!r} is not known: {error.strerror}", "correct the name") from error
        except OSError as error:
            raise TransportError("E522", f"{host}:{port}: {error}", "see whether it runs") from error

    def _hello(self) -> tuple[str | int, ...]:
        user, password = self._credentials.user, self._credentials.password
        signs_in = user is not None or password is not None
        return ("HELLO", 2, "AUTH", user or "default", password or "") if signs_in else ("HELLO", 2)

    async def _greet(self, connection: Connection, place: str) -> None:
        commands = [pack(self._hello()), pack(("SELECT", self._database)), pack(("PING",))]
        try:
            hello, select, ping = await connection.request(b"".join(commands), 3)
        except TransportError as error:
            raise _EndedAtOnceError("E522", f"{place} ended the connection at once", "see its log") from error
        if isinstance(hello, Refusal):
            if str(hello).startswith("ERR unknown command"):
                raise _too_old(place, "6.0 or older")
            raise failure(self.shown, hello)
        self._check(place, dict(zip(hello[::2], hello[1::2], strict=False)), connection)
        if isinstance(select, Refusal):
            if str(select).startswith("NOPERM"):
                raise failure(self.shown, select)
            raise ConfigurationError("E246", f"database {self._database} of {place}: {select}", "name another")
        if isinstance(ping, Refusal) and not str(ping).startswith("NOPERM"):
            raise failure(self.shown, ping)

    def _check(self, place: str, facts: dict[bytes, Any], connection: Connection) -> None:
        text = bytes(facts.get(b"version", b"")).decode()
        self.version = tuple(int(part) for part in text.split(".") if part.isdigit())
        if self.version < OLDEST:
            raise _too_old(place, text)
        mode = bytes(facts.get(b"mode", b"standalone")).decode()
        if mode != "standalone":
            raise ConfigurationError(
                "E248", f"{place} runs as {mode}", "name plain servers, primary and replicas, with commas between"
            )
        if facts.get(b"role") not in (b"master", b"primary"):
            raise TransportError("E522", f"{place} is a replica", "name the primary too")
        connection.number = int(facts.get(b"id", 0))

    async def learn(self, connection: Connection) -> None:
        """Ask for the settings that decide what a confirmation is worth; a server may keep them to itself."""
        names = ("appendonly", "appendfsync", "maxmemory-policy", "proto-max-bulk-len")
        replies = await connection.request(b"".join(pack(("CONFIG", "GET", name)) for name in names), len(names))
        for reply in replies:
            if isinstance(reply, list) and len(reply) == 2:  # noqa: PLR2004 - name and value
                self.settings[reply[0].decode()] = reply[1].decode()
        self.max_bytes = min(MAX_WIRE_BYTES, int(self.settings.get("proto-max-bulk-len", MAX_WIRE_BYTES)))

    def doubts(self) -> Sequence[str]:
        """Return what the server's settings take from the promises."""
        settings = self.settings
        found = []
        if settings.get("appendonly") == "no":
            found.append("appendonly is no: what was confirmed is lost when the server ends")
        elif settings.get("appendfsync", "always") != "always":
            found.append(f"appendfsync is {settings['appendfsync']}: a power failure can lose what was confirmed")
        if settings.get("maxmemory-policy", "").startswith("allkeys"):
            found.append(
                f"maxmemory-policy is {settings['maxmemory-policy']}: messages are evicted when memory is full"
            )
        return found


class _EndedAtOnceError(TransportError):
    """The server closed the connection before it answered."""


async def _speaks_tls(host: str, port: int) -> bool:
    """Return whether a TLS handshake gets an answer; whose certificate it is does not matter here."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError):
        return False
    writer.transport.abort()  # a farewell in TLS waits for the other side's
    return True


async def _speaks_plainly(host: str, port: int) -> bool:
    """Return whether a PING without TLS is answered."""
    writer = None
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(pack(("PING",)))
            return await reader.read(1) in (b"+", b"-")
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()


async def _forget(connection: Connection) -> None:
    if connection.open:
        await connection.close()


def _too_old(place: str, version: str) -> ConfigurationError:
    return ConfigurationError("E248", f"{place} is Redis {version}", "version 6.2 or later is needed, better 7")


def _database(address: Address) -> int:
    text = address.path.strip("/")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 6):  # noqa: PLR2004
        raise ConfigurationError("E241", f"{text!r} in {address.shown} is no database", "a number, such as /0")
    return int(text)


def _tls(address: Address, files: dict[str, str | None]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=files["ca"])
        if files["cert"] is not None:
            context.load_cert_chain(files["cert"], files["key"])
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            "E245", f"a file of ca, cert or key in the URL of {address.shown} cannot be used: {error}", "PEM is needed"
        ) from error
    return context
