"""The processes that share a schema: signing on, signs of life, taking over from the dead.

Invariant: a process is taken over once, and only if its connection is gone or it was silent for a lease, by the
server's clock; it learns of it before it commits anything more, and then goes on under a new number.
Read next: engine.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import asyncpg

from trunkline.errors import TransportError
from trunkline.postgres.schema import in_schema, lock_number

if TYPE_CHECKING:
    from trunkline.postgres.engine import Engine

log = logging.getLogger("trunkline.postgres")

SWEEP_S = 1.0
"""How often each process looks for dead ones."""
SETTLE_S = 5.0
"""Time that others get after this process reconnected: when the server restarted, they all lost their connection."""


class Members:
    """This process among those that share the schema of `engine`.

    Attributes:
        sessions: application name of all its connections, so that they can be found.
        number: of this process, never given twice. alone: whether there is no other.
        groups: how many groups it has committed, as the database says: what an unknown outcome is compared with.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._class = lock_number(engine.settings.schema)
        self._reconnected = -math.inf
        self._locked = False
        self.sessions = f"trunkline {engine.clock.new_id()}"
        self.number = 0
        self.groups = 0
        self.alone = False

    def _sql(self, text: str) -> str:
        return in_schema(text, self._engine.settings.schema)

    async def sign_on(self, connection: asyncpg.Connection) -> bool:
        """Go on as this process, or begin as a new one; return whether it is a new one."""
        if self.number:
            self._reconnected = self._engine.clock.monotonic()
        self._locked = False
        self.alone = False
        new = not await self._resume(connection)
        if new:
            async with connection.transaction():
                number = await connection.fetchval(
                    self._sql("INSERT INTO @process (sessions, locked) VALUES ($1, $2) RETURNING id"),
                    self.sessions,
                    not self._engine.settings.pooled,
                )
                # Before the commit: no other process can see the row and find it unlocked.
                await self._lock(connection, number)
            # Only now: if the answer to the commit is lost, the next connection signs on anew too, and says so.
            self.number = number
        else:
            await self._lock(connection, self.number)
        return new

    async def _resume(self, connection: asyncpg.Connection) -> bool:
        row = await connection.fetchrow(
            self._sql("UPDATE @process SET beat = now() WHERE id = $1 RETURNING groups, dead"), self.number
        )
        if row is None:
            self.groups = 0
            return False
        self.groups = row["groups"]
        return not row["dead"]

    async def _lock(self, connection: asyncpg.Connection, number: int) -> None:
        """Hold the lock that says this process lives; while its old connection still has it, that will do."""
        if not self._engine.settings.pooled:
            self._locked = await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", self._class, number)

    async def sign_off(self, connection: asyncpg.Connection) -> None:
        """Be gone, with nothing left to take over."""
        await connection.execute(self._sql("DELETE FROM @process WHERE id = $1"), self.number)

    async def keep(self) -> None:
        """Show signs of life and look for the dead, until cancelled."""
        engine = self._engine
        lease_s = engine.settings.lease_s
        beaten = engine.clock.monotonic()
        while True:
            await engine.clock.sleep(min(SWEEP_S, lease_s * 0.1))
            # First what has a time limit: a connection that carries nothing is noticed, and the writer's made anew.
            await self._try(self.sweep())
            if engine.clock.monotonic() - beaten > lease_s * 0.3:
                beaten = engine.clock.monotonic()
                await self._try(engine.run(self._beat))

    async def _try(self, act: Awaitable[None]) -> None:
        try:
            await act
        except TransportError as error:
            log.warning("keeping the lease of %s failed: %s", self._engine.settings.shown, error)

    async def _beat(self, connection: asyncpg.Connection) -> None:
        if not self._locked:
            await self._lock(connection, self.number)

    async def sweep(self) -> None:
        """Take over from processes that died."""
        engine = self._engine
        settled = engine.clock.monotonic() - self._reconnected > SETTLE_S
        rows = await engine.fetch(
            self._sql(
                "SELECT p.id, p.beat < now() - $2 * interval '1 second' OR ($3 AND p.locked AND NOT EXISTS"
                " (SELECT 1 FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = $4 AND l.objid = p.id::oid"
                " AND l.objsubid = 2 AND l.database = (SELECT oid FROM pg_database WHERE datname ="
                " current_database()))) FROM @process p WHERE NOT p.dead AND p.id <> $1"
            ),
            self.number, engine.settings.lease_s, settled, self._class % 2**32,
        )  # fmt: skip
        self.alone = not rows
        for number in [row[0] for row in rows if row[1]]:
            if await engine.run(lambda connection, dead=number: self._take_over(connection, dead)):  # type: ignore[misc]
                log.warning("process %d of %s is gone; its messages are taken over", number, engine.settings.shown)

    async def _take_over(self, connection: asyncpg.Connection, number: int) -> bool:
        # What it has open would hold inbox rows, and whoever handles its messages now would wait for them.
        await connection.execute(
            self._sql(
                "SELECT pg_terminate_backend(a.pid) FROM @process p JOIN pg_stat_activity a ON a.application_name ="
                " p.sessions AND a.usename = current_user WHERE p.id = $1 AND NOT p.dead"
            ),
            number,
        )
        # Waits for a commit of that process that is under way: it holds FOR KEY SHARE.
        row = await connection.fetchrow(
            self._sql("SELECT 1 FROM @process WHERE id = $1 AND NOT dead FOR UPDATE"), number
        )
        if row is None:
            return False
        await connection.execute(self._sql("UPDATE @process SET dead = true WHERE id = $1"), number)
        # Every part there is, also one that this process does not use: nobody else would give it back.
        for (part,) in await connection.fetch(self._sql("SELECT part FROM @layout WHERE part <> 'process'")):
            await connection.execute(self._sql(f"SELECT @release_{part}($1)"), number)
        self._engine.tell({"treated", "returned", "staged", "members"})
        return True

    async def tidy(self, connection: asyncpg.Connection) -> None:
        """Forget processes that died a day ago."""
        await connection.execute(
            self._sql("DELETE FROM @process WHERE dead AND beat < now() - interval '1 day'"),
        )
