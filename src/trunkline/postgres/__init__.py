"""PostgreSQL below transport and store: engines of this process, one per database, schema and event loop.

Invariant: a transport and a store with the same URL get the same Engine, so that their writes are one commit.
Read next: engine.py.
"""

from __future__ import annotations

import asyncio

from trunkline.clock import Clock
from trunkline.postgres.engine import Engine, Stage
from trunkline.postgres.settings import Settings
from trunkline.postgres.transaction import PostgresTransaction

_engines: dict[tuple[int, Settings], Engine] = {}


async def open_engine(settings: Settings, clock: Clock) -> Engine:
    """Return this process's Engine for `settings`, opened; `close_engine` gives it back.

    Raises: see Engine.open.
    """
    key = (id(asyncio.get_running_loop()), settings)
    engine = _engines.get(key)
    if engine is None:
        engine = _engines[key] = Engine(settings, clock)
    engine.users += 1
    try:
        await engine.open()
    except BaseException:
        engine.users -= 1
        _engines.pop(key, None)
        raise
    return engine


async def close_engine(engine: Engine) -> None:
    """Give an Engine back; the last user closes it."""
    engine.users -= 1
    if engine.users == 0:
        for key, value in list(_engines.items()):
            if value is engine:
                del _engines[key]
        await engine.close()


__all__ = ["Engine", "PostgresTransaction", "Settings", "Stage", "close_engine", "open_engine"]
