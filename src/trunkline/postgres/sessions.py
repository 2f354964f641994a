"""The connections of one process to one database: one that writes, one that reads, a pool for handlers.

Invariant: what is committed never waits for what is read, nor for a handler; the two of ours are made and lost
together.
Read next: engine.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import asyncpg

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, StoreLostError, TransportError
from trunkline.link import Link
from trunkline.postgres.settings import DRIVER_ERRORS, STEADY, Settings, arguments, connect, is_lost, translate

LOCK_WAIT = "5s"
"""Longest wait of a group for a lock that somebody else's transaction holds."""


class Sessions:
    """The connections of a process.

    Args:
        name: by which other processes find them in the server's list.
        made: readies the two new connections, the writing one first, before anybody uses them.
        heard: called with the words of each notification.

    Attributes:
        writer: on which groups are written; None while it is made.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        name: str,
        *,
        made: Callable[[asyncpg.Connection], Awaitable[None]],
        heard: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._name = name
        self._made = made
        self._heard = heard
        self.link = Link(settings.shown, clock, self._connect)
        self.channel = f"trunkline.{settings.schema}"
        self.writer: asyncpg.Connection | None = None
        self._reader: asyncpg.Connection | None = None
        self._pool: asyncpg.Pool | None = None
        self._reading = asyncio.Lock()

    async def start(self) -> None:
        """Connect.

        Raises: ConfigurationError E205 or E244 to E248; TransportError E520.
        """
        try:
            await self.link.start(self._settings.timeout_s)
        except BaseException:
            await self._drop()
            raise

    async def _connect(self) -> None:
        """Make both connections; called by Link."""
        await self._drop()
        settings = self._settings
        try:
            steady = {**STEADY, "lock_timeout": LOCK_WAIT}
            self.writer = await connect(settings, self._name, **steady)
            # A claim that a crash of the server undoes is only claimed again.
            self._reader = await connect(settings, self._name, **steady, synchronous_commit="off")
            await self._made(self.writer)
            if not settings.pooled:
                await self._reader.add_listener(self.channel, self._notified)
            pooled = arguments(settings, self._name, {})
            if self._pool is not None:
                self._pool.set_connect_args(**pooled)
            else:
                self._pool = await asyncpg.create_pool(
                    **pooled,
                    min_size=0,
                    max_size=settings.pool,
                    max_inactive_connection_lifetime=60,
                )
        except BaseException as error:
            await self._drop()
            if isinstance(error, ConfigurationError | TransportError) or not isinstance(error, Exception):
                raise
            raise translate(error, settings) from error
        for connection in (self.writer, self._reader):
            connection.add_termination_listener(self._terminated)

    def _notified(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        self._heard(str(payload))

    def _terminated(self, connection: asyncpg.Connection) -> None:
        if connection in (self.writer, self._reader):
            self.link.lost(None)

    async def _drop(self) -> None:
        connections = [c for c in (self.writer, self._reader) if c is not None]
        self.writer = self._reader = None
        for connection in connections:
            connection.terminate()
        await self._clock.sleep(0)  # asyncpg's transports end in the next turn of the loop

    def end_pool(self) -> None:
        """Cut off handlers' transactions: whoever waits for one is told that its connection is lost."""
        if self._pool is not None:
            self._pool.terminate()

    async def close(self) -> None:
        """Disconnect."""
        await self.link.stop()
        reader = self._reader
        for connection in (self.writer, reader):
            if connection is not None:
                connection.remove_termination_listener(self._terminated)
        try:
            if reader is not None and not reader.is_closed() and not self._settings.pooled:
                await reader.remove_listener(self.channel, self._notified)
            for connection in (reader, self.writer):
                if connection is not None and not connection.is_closed():
                    await connection.close(timeout=5)
        except DRIVER_ERRORS as error:
            if not is_lost(error):
                raise
        await self._drop()
        self.end_pool()
        await self._clock.sleep(0)

    # --- using them ---

    def writing(self) -> asyncpg.Connection:
        """Return the connection on which groups are written.

        Raises: asyncpg.InterfaceError, as for one that is lost.
        """
        if self.writer is None:
            raise asyncpg.InterfaceError("connection is closed")
        return self.writer

    async def fetch(self, sql: str, *parameters: Any) -> list[Any]:
        """Run a statement by itself on the reading connection; return its rows.

        Raises: TransportError.
        """
        await self.link.up(self._settings.timeout_s)
        async with self._reading:
            try:
                if self._reader is None:
                    raise asyncpg.InterfaceError("connection is closed")
                async with asyncio.timeout(self._settings.timeout_s):
                    return cast("list[Any]", await self._reader.fetch(sql, *parameters))
            except DRIVER_ERRORS as error:
                raise self.translate(error) from error

    async def acquire(self) -> tuple[Any, asyncpg.Pool]:
        """Return a connection for a handler, and the pool to give it back to.

        Raises: StoreLostError if the server is not reached, TransportError E517 if none becomes free.
        """
        settings = self._settings
        try:
            await self.link.up(settings.timeout_s)
        except TransportError as error:
            raise StoreLostError(error.code, error.message, error.hint) from error
        assert self._pool is not None  # noqa: S101 - made with the first connection
        try:
            return await self._pool.acquire(timeout=settings.timeout_s), self._pool
        except TimeoutError as error:
            raise TransportError(
                "E517",
                f"no connection to {settings.shown} became free within {settings.timeout_s:g} s",
                f"all {settings.pool} are in open transactions: ?pool= allows more",
            ) from error
        except DRIVER_ERRORS as error:
            raise translate(error, settings) from error

    def broken(self, error: BaseException) -> None:
        """Make the connections again if an error says that one of them is gone."""
        if is_lost(error):
            self.link.lost(error)

    def translate(self, error: BaseException) -> TransportError:
        """Return what a failed statement of ours means to whoever waits."""
        self.broken(error)
        return translate(error, self._settings)
