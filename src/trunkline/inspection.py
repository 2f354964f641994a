"""What an operator asks of a live broker or database: how it is set, how far its readers are, what it holds.

Invariant: asking changes nothing. Nothing is declared, taken, joined or moved, so it works beside running Apps and
where none ever ran. Never does: carry messages (transport.py). Read next: cli/doctor.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal, Protocol, cast

import msgspec

from trunkline.channel import Channel
from trunkline.clock import Clock, offload
from trunkline.message import Message
from trunkline.store import DeadLetterRow, OutboxEntry, ParkedRow, SetAside
from trunkline.transport import Subscription, adapters, load_adapter, parse_address

Verdict = Literal["kept", "weak", "broken", "unknown"]
"""`kept`: the promise holds. `weak`: a rare failure breaks it. `broken`: an ordinary one does, or nothing works so.
`unknown`: the server does not tell."""


class Finding(msgspec.Struct, frozen=True):
    """One setting of a live server, and what it does to what is promised.

    Attributes:
        subject: what has the setting: `server`, `stream orders`, `user`.
        setting: its name, as the server calls it. value: as it is now.
        meaning: what that means for the user, in one sentence without its full stop.
        change: what to change, where that is better.
        loses: what can be lost in which failure, to end the sentence "can be lost: …"; empty where nothing can.
        channel: the one it concerns; empty: all.
    """

    subject: str
    setting: str
    value: str
    verdict: Verdict
    meaning: str
    change: str = ""
    loses: str = ""
    channel: str = ""


class Lag(msgspec.Struct, frozen=True):
    """How far one subscription is behind, as far as it can be seen from outside.

    Attributes:
        waiting: messages not yet settled, those in flight included; None where that cannot be seen.
        in_flight: of these, handed to a process; None where that cannot be seen.
    """

    waiting: int | None
    in_flight: int | None = None


class Seen(msgspec.Struct, frozen=True):
    """A message as it lies on a broker.

    Attributes:
        position: where, as the broker counts.
        message: None if it is none. raw: its bytes then.
    """

    position: int
    message: Message | None
    raw: bytes = b""


class Inspector(Protocol):
    """Looks at the broker of a transport. Implementations are found by entry point `trunkline.inspectors`, by scheme.

    It is made as a transport is, from an Address and a Clock, and takes the same URL.
    """

    async def open(self) -> None:
        """Connect.

        Raises: ConfigurationError E244 to E248; TransportError E520 if it cannot be reached; without waiting for
            a server that refuses connections.
        """

    async def close(self) -> None:
        """Disconnect."""

    async def examine(
        self, channels: Sequence[Channel], subscriptions: Sequence[Subscription], held_s: float
    ) -> list[Finding]:
        """Return how the server and what is on it of `channels` are set. What it does not tell is `unknown`.

        Args:
            held_s: how long a message may stay unsettled: the longest handler, without a store also the longest retry.
        """

    async def look(self, subscriptions: Sequence[Subscription]) -> list[Lag | None]:
        """Return how far each is behind, or None for one that is not there yet."""

    def read(self, channel: Channel, *, from_start: bool, follow: bool) -> AsyncIterator[Seen]:
        """Yield what a channel holds, then what comes if `follow`.

        Args:
            from_start: begin with the oldest message of a Stream, not with what comes.
        Raises: ConfigurationError E230 where looking would take messages away.
        """


class LetterReader(Protocol):
    """Reads the dead and parked letters of a store and its outbox, without taking part in its work.

    `subscription` is a label or a name alone, None for all; `message_type` a CloudEvents type, None for all.
    """

    async def dead_letters(
        self, subscription: str | None = None, message_type: str | None = None, limit: int | None = None
    ) -> list[DeadLetterRow]:
        """Return dead letters, oldest first."""

    async def dead_letter(self, number: int) -> DeadLetterRow:
        """Return one dead letter.

        Raises: DeadLetterError E601.
        """

    async def dead_letter_numbers(self, subscription: str | None = None, message_type: str | None = None) -> list[int]:
        """Return the numbers of dead letters, oldest first."""

    async def parked(
        self, subscription: str | None, message_type: str | None, limit: int
    ) -> tuple[list[ParkedRow], int]:
        """Return the first parked message of each key and each one without a key, the next tries first.

        Also return how many there are beyond `limit`.
        """

    async def outbox(self, channel: str | None, message_type: str | None, limit: int) -> tuple[list[OutboxEntry], int]:
        """Return what waits to be sent, what is due first; also how many there are beyond `limit`."""

    async def set_aside(self) -> dict[str, SetAside]:
        """Return label → what is set aside, of all subscriptions that the store knows."""


class StoreInspector(LetterReader, Protocol):
    """Looks at a store on a server; an Inspector that is one too serves both."""

    async def open(self) -> None:
        """Connect; see Inspector."""

    async def close(self) -> None:
        """Disconnect."""


def load_inspector(url: str, clock: Clock) -> Inspector | None:
    """Return what looks at the broker that `url` names, not yet opened, or None if nothing installed does.

    Raises: ConfigurationError E201 or E240 to E242.
    """
    if parse_address(url).scheme not in adapters(GROUP):
        return None
    return cast("Inspector", load_adapter(GROUP, url, clock))


async def left_over(store_url: str, clock: Clock) -> str:
    """Return what waits in the database of a store that once was the transport too, in a sentence; empty if nothing.

    For an App whose transport is another one: nobody reads it there.
    Raises: TransportError or ConfigurationError if it cannot be looked into.
    """
    address = parse_address(store_url)

    def looker() -> Callable[[], Awaitable[dict[str, int]]] | None:
        there = address.scheme in adapters("trunkline.transports")
        return getattr(load_adapter("trunkline.transports", store_url, clock), "left_over", None) if there else None

    look = await offload(looker)  # entry points are looked for on the disk
    found = {} if look is None else await look()
    if not found:
        return ""
    first = ", ".join(f"{label} {waiting}" for label, waiting in list(found.items())[:SHOWN])
    more = f", {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    count = sum(found.values())
    return f"{address.shown} still holds {count} message{'s' * (count > 1)} of its own transport: {first}{more}"


SHOWN = 5
"""Subscriptions that are named one by one."""
RUN_ON_IT = "run the system with that as --transport until its backlog is 0"
GROUP = "trunkline.inspectors"
