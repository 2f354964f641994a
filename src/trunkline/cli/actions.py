"""Acting beside the services: on their transport, on their store.

Invariant: where transport and store are one place both are opened, so that whatever this process takes over from a
dead one is given back whole; a file that does not exist is refused, never made. Read next: letters.py, publish.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from trunkline.channel import Channel
from trunkline.cli.embedded import existing_file, file_path, open_file
from trunkline.clock import system_clock
from trunkline.config import Settings
from trunkline.errors import ConfigurationError
from trunkline.store import Store, Unit, resolve
from trunkline.transport import Staged, Transport, adapters, load_adapter, parse_address


def place(url: str) -> str:
    """Return what tells two places apart."""
    address = parse_address(url)
    return str(Path(file_path(url)).resolve()) if address.scheme == "sqlite" else url


def one_place(settings: Settings) -> bool:
    """Return whether messages and the state of services are in one place, which both a transport and a store know."""
    both = parse_address(settings.transport).scheme in adapters("trunkline.stores")
    return both and place(settings.transport) == place(settings.store)


class NoTransport:
    """Stands for a transport where only the store is worked on: it is no database of anybody."""

    engine = None


@contextlib.asynccontextmanager
async def acting(settings: Settings) -> AsyncIterator[Store]:
    """Open the store alone, or with the transport where they are one place.

    Raises: ConfigurationError E230 to E232, E240 to E248; TransportError.
    """
    _check_file(settings.store, "--store" if settings.store != settings.transport else "--transport")
    async with contextlib.AsyncExitStack() as stack:
        transport = cast("Transport", NoTransport())
        if one_place(settings):
            transport = await stack.enter_async_context(sending(settings.transport, ()))
        store: Store = load_adapter("trunkline.stores", settings.store, system_clock)
        await store.start(transport, ())
        stack.push_async_callback(store.stop)
        yield store


@contextlib.asynccontextmanager
async def sending(url: str, channels: Iterable[Channel]) -> AsyncIterator[Transport]:
    """Open a transport to send, without receiving anything.

    Args:
        channels: declared where they are missing.
    Raises: ConfigurationError E230 to E232, E240 to E248; TransportError.
    """
    _check_file(url, "--transport")
    transport: Transport = load_adapter("trunkline.transports", url, system_clock)
    if not transport.capabilities.durable:
        raise ConfigurationError(
            "E230", f"{parse_address(url).shown} cannot be looked into from outside",
            "name an embedded file or a broker: --transport sqlite:///shop.db",
        )  # fmt: skip
    await transport.start(channels, ())
    try:
        yield transport
    finally:
        await transport.stop()


def _check_file(url: str, option: str) -> None:
    """Refuse a file that no service has made."""
    if parse_address(url).scheme != "sqlite":
        return
    if option == "--store":
        existing_file(url, option)
    else:
        open_file(url, option).__exit__(None, None, None)


async def publish(settings: Settings, channel: Channel, staged: Sequence[Staged]) -> None:
    """Send messages of one channel, or leave those for later to the store.

    A message for now needs no store, unless it is the same place.
    """
    if staged[0].due is None and not one_place(settings):
        async with sending(settings.transport, [channel]) as transport:
            await transport.send(staged)
        return
    async with contextlib.AsyncExitStack() as stack:
        _check_file(settings.store, "--store" if settings.store != settings.transport else "--transport")
        transport = await stack.enter_async_context(sending(settings.transport, [channel]))
        store: Store = load_adapter("trunkline.stores", settings.store, system_clock)
        await store.start(transport, ())
        stack.push_async_callback(store.stop)
        if staged[0].due is None:
            await transport.send(staged)
        else:
            await _commit(store, staged)


async def _commit(store: Store, staged: Sequence[Staged]) -> None:
    """Commit staged messages through the store; the relay of a running service sends them when they are due."""
    from trunkline.handler import check_schedules

    check_schedules(store)
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    unit = Unit((), partial(resolve, future), "trunkline publish")
    unit.staged = tuple(staged)
    store.submit(unit)
    await future
