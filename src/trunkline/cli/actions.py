"""Acting on a file beside the services that work on it.

Invariant: transport and store are both opened, so that whatever this process takes over from a dead one is
given back whole; a file that does not exist is refused, never made. Read next: dead.py, publish.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial

from trunkline.channel import Channel
from trunkline.cli.embedded import existing_file, open_file
from trunkline.clock import system_clock
from trunkline.config import Settings
from trunkline.store import Store, Unit, resolve
from trunkline.transport import Staged, Transport, load_adapter


@contextlib.asynccontextmanager
async def opened(settings: Settings, channels: Iterable[Channel] = ()) -> AsyncIterator[tuple[Transport, Store]]:
    """Open transport and store of existing files, without receiving anything.

    Args:
        channels: to be declared, for publishing.
    Raises: ConfigurationError E230 to E232; TransportError.
    """
    open_file(settings.transport).__exit__(None, None, None)
    existing_file(settings.store, "--store")
    transport: Transport = load_adapter("trunkline.transports", settings.transport, system_clock)
    store: Store = load_adapter("trunkline.stores", settings.store, system_clock)
    await transport.start(channels, ())
    try:
        await store.start(transport, ())
        try:
            yield transport, store
        finally:
            await store.stop()
    finally:
        await transport.stop()


async def commit(store: Store, staged: Sequence[Staged]) -> None:
    """Commit staged messages through the store; the relay of a running service sends them when they are due."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    unit = Unit((), partial(resolve, future), "trunkline publish")
    unit.staged = tuple(staged)
    store.submit(unit)
    await future
