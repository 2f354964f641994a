"""Dead and parked letters and the outbox of whatever store there is: a file, or a database on a server.

Invariant: looking changes and creates nothing; acting goes through the Store alone, so that it is one commit that
running services see at once. Read next: dead.py, actions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import islice
from typing import TypeVar, cast

from trunkline.cli.actions import acting
from trunkline.cli.embedded import EmbeddedFile, open_store
from trunkline.clock import system_clock
from trunkline.config import Settings
from trunkline.errors import ConfigurationError, DeadLetterError
from trunkline.inspection import GROUP, LetterReader, StoreInspector, load_inspector
from trunkline.store import DeadLetterRow, OutboxEntry, ParkedRow, SetAside, Store
from trunkline.transport import load_adapter, parse_address

T = TypeVar("T")


def ask(settings: Settings, question: Callable[[LetterReader], Awaitable[T]]) -> T:
    """Return the answer of the store's letters to one question.

    Raises: ConfigurationError or TransportError if the store cannot be looked into; what `question` raises.
    """

    async def answer() -> T:
        async with opened_letters(settings) as letters:
            return await question(letters)

    return asyncio.run(answer())


@contextlib.asynccontextmanager
async def opened_letters(settings: Settings) -> AsyncIterator[LetterReader]:
    """Open what reads the letters of the store.

    Raises: ConfigurationError E202, E203, E225, E230 to E232, E240 to E248; TransportError E501 or E520.
    """
    if parse_address(settings.store).scheme == "sqlite":
        with open_store(settings) as file:
            yield FileLetters(file)
        return
    check_store(settings)
    inspector = load_inspector(settings.store, system_clock)
    if inspector is not None and hasattr(inspector, "dead_letters"):
        await inspector.open()
        try:
            yield cast("StoreInspector", inspector)
        finally:
            await inspector.close()
        return
    async with acting(settings) as store:
        yield StoreLetters(store, settings.store)


def check_store(settings: Settings) -> None:
    """Refuse a store that no other process can look into.

    Raises: ConfigurationError E202, E230, E242 or E243.
    """
    shown = parse_address(settings.store).shown
    store: Store = load_adapter("trunkline.stores", settings.store, system_clock)
    if not store.keeps:
        raise ConfigurationError(
            "E230",
            f"{shown} keeps nothing: what is parked waits in the service's own memory,"
            " dead letters are in a Queue on the broker, and there is no outbox",
            '"trunkline backlog" counts them, "trunkline tail NAME.dead-letters" shows them where the broker lets one'
            " look, a handler on that Queue takes them; or name a store: --store sqlite:///shop.db",
        )
    if parse_address(settings.store).scheme == "memory":
        raise ConfigurationError(
            "E230", f"{shown} cannot be looked into from outside",
            "name an embedded file or a database: --store sqlite:///shop.db, --store postgresql://…",
        )  # fmt: skip


class FileLetters:
    """Letters of a store in a file."""

    def __init__(self, file: EmbeddedFile) -> None:
        self._file = file

    async def dead_letters(
        self, subscription: str | None = None, message_type: str | None = None, limit: int | None = None
    ) -> list[DeadLetterRow]:
        """See LetterReader."""
        return self._file.dead_letters(subscription, message_type, -1 if limit is None else limit)

    async def dead_letter(self, number: int) -> DeadLetterRow:
        """See LetterReader."""
        return self._file.dead_letter(number)

    async def dead_letter_numbers(self, subscription: str | None = None, message_type: str | None = None) -> list[int]:
        """See LetterReader."""
        return self._file.dead_letter_numbers(subscription, message_type)

    async def parked(
        self, subscription: str | None, message_type: str | None, limit: int
    ) -> tuple[list[ParkedRow], int]:
        """See LetterReader."""
        found = self._file.parked(subscription, message_type)
        return list(islice(found, limit)), sum(1 for _ in found)

    async def outbox(self, channel: str | None, message_type: str | None, limit: int) -> tuple[list[OutboxEntry], int]:
        """See LetterReader."""
        found = self._file.outbox(channel, message_type)
        return list(islice(found, limit)), sum(1 for _ in found)

    async def set_aside(self) -> dict[str, SetAside]:
        """See LetterReader."""
        return self._file.set_aside()


class StoreLetters:
    """Letters of any store, read through its contract: slower, and only what the contract tells."""

    def __init__(self, store: Store, url: str) -> None:
        self._store = store
        self._shown = parse_address(url).shown

    async def dead_letters(
        self, subscription: str | None = None, message_type: str | None = None, limit: int | None = None
    ) -> list[DeadLetterRow]:
        """See LetterReader."""
        rows = await self._store.dead_letters(None, 2**31)
        fit = (row for row in rows if _fits(row, subscription, message_type))
        return list(islice(fit, limit))

    async def dead_letter(self, number: int) -> DeadLetterRow:
        """See LetterReader."""
        for row in await self.dead_letters():
            if row.number == number:
                return row
        raise DeadLetterError("E601", f"no dead letter {number} in {self._shown}", 'list them: "trunkline dead list"')

    async def dead_letter_numbers(self, subscription: str | None = None, message_type: str | None = None) -> list[int]:
        """See LetterReader."""
        return [row.number for row in await self.dead_letters(subscription, message_type)]

    async def parked(self, *_: object) -> tuple[list[ParkedRow], int]:
        """Refuse: the contract of stores does not list what is parked.

        Raises: ConfigurationError E230.
        """
        raise self._not_listed("what is parked")

    async def outbox(self, *_: object) -> tuple[list[OutboxEntry], int]:
        """Refuse, as `parked` does.

        Raises: ConfigurationError E230.
        """
        raise self._not_listed("its outbox")

    def _not_listed(self, what: str) -> ConfigurationError:
        return ConfigurationError(
            "E230", f"{self._shown} does not list {what}", f"its package needs an entry point in {GROUP}"
        )

    async def set_aside(self) -> dict[str, SetAside]:
        """Count dead letters; what is parked the contract of stores does not tell."""
        found: dict[str, SetAside] = {}
        for row in await self.dead_letters():
            dead = found[row.subscription].dead if row.subscription in found else 0
            found[row.subscription] = SetAside(dead=dead + 1)
        return found


def _fits(row: DeadLetterRow, subscription: str | None, message_type: str | None) -> bool:
    named = subscription in (None, row.subscription, row.subscription.rpartition("@")[0])
    return named and message_type in (None, row.message_type)
