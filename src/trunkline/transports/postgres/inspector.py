"""A PostgreSQL database as an operator sees it: its settings, its readers, its messages, its dead and parked letters.

Invariant: the connection is read-only, and takes no part in what processes share. It serves the transport and the
store. Settings are those of postgresql.conf, as PostgreSQL documents them. Read next: tables.py, ../../inspection.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import asyncpg

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, DeadLetterError
from trunkline.inspection import Finding, Lag, Seen
from trunkline.message import read_packed
from trunkline.postgres.schema import in_schema
from trunkline.postgres.settings import connect, read_settings, translate
from trunkline.store import DeadLetterRow, OutboxEntry, ParkedRow, SetAside
from trunkline.transport import Address, Subscription
from trunkline.transports.postgres.judgement import judge
from trunkline.transports.postgres.tables import QUEUE_BACKLOG, STREAM_BACKLOG, queue_range, stored_name

PAGE = 500
LOOK_S = 0.2
"""How often a table is looked at for more."""

_FACTS = """
SELECT current_setting('server_version') AS server_version, current_user AS me,
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
    (SELECT count(*) FROM pg_stat_replication) AS standbys,
    (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')) AS in_step,
    inet_server_port() AS port, has_database_privilege(current_database(), 'CREATE') AS may_create,
    to_regnamespace($1) IS NOT NULL AS exists
"""
_SUBSCRIPTIONS = "SELECT s.id, c.name, s.name FROM @subscription s JOIN @channel c ON c.id = s.channel"
_ALL = """
SELECT s.id, CASE c.kind WHEN 'queue' THEN c.name ELSE s.name || '@' || c.name END, c.kind = 'stream'
FROM @subscription s JOIN @channel c ON c.id = s.channel ORDER BY 2
"""
_READ_LOG = """
SELECT partition, position, event FROM @log
WHERE channel = $1 AND position > coalesce(($2::bigint[])[partition + 1], -1)
ORDER BY at, position, partition LIMIT $3
"""
_READ_MESSAGES = """
SELECT place, event FROM @message WHERE place > $1 AND place < $2 AND place > $3 ORDER BY place LIMIT $4
"""
_JOINED = "FROM @dead_letter d JOIN @reader r ON r.id = d.reader"
_DEAD = f"""
SELECT d.seq, r.label, d.channel, d.id, d.type, d.key, d.code, d.reason, d.detail, d.attempt, d.at, d.holds,
    (SELECT count(*) FROM @parked p WHERE d.holds AND p.reader = d.reader AND p.lane = d.lane), d.event
{_JOINED}
"""  # noqa: S608 - a constant of this module
_FITS = "($1::text IS NULL OR r.label = $1 OR starts_with(r.label, $1 || '@'))"
_NUMBERS = f"SELECT d.seq {_JOINED} WHERE {_FITS} AND ($2::text IS NULL OR d.type = $2) ORDER BY d.seq"
_PARKED = f"""
SELECT r.label, p.event, p.key, p.due, p.attempt, p.reason,
    CASE WHEN p.lane IS NULL THEN NULL
        ELSE (SELECT count(*) - 1 FROM @parked o WHERE o.reader = p.reader AND o.lane = p.lane) END,
    h.held_by
FROM @parked p JOIN @reader r ON r.id = p.reader CROSS JOIN LATERAL (
    SELECT min(seq) AS held_by FROM @dead_letter d WHERE d.reader = p.reader AND d.lane = p.lane AND d.holds) h
WHERE {_FITS} AND (p.lane IS NULL OR p.seq = (
    SELECT seq FROM @parked o WHERE o.reader = p.reader AND o.lane = p.lane ORDER BY position, seq LIMIT 1))
ORDER BY h.held_by IS NOT NULL, p.due, p.seq
"""  # noqa: S608 - a constant of this module
_OUTBOX = """
SELECT channel, event, due, seq FROM @outbox WHERE ($1::text IS NULL OR channel = $1) AND (due, seq) > ($2, $3)
ORDER BY due, seq LIMIT $4
"""
_OUTBOX_COUNT = "SELECT count(*) FROM @outbox WHERE $1::text IS NULL OR channel = $1"
_ASIDE = """
SELECT r.label, (SELECT count(*) FROM @parked p WHERE p.reader = r.id),
    (SELECT count(*) FROM @dead_letter d WHERE d.reader = r.id),
    (SELECT event FROM @parked p WHERE p.reader = r.id ORDER BY position LIMIT 1)
FROM @reader r ORDER BY r.label
"""


class PostgresInspector:
    """Looks at the database that `address` names."""

    def __init__(self, address: Address, clock: Clock) -> None:
        self._settings = read_settings(address)
        self._clock = clock
        self._connection: asyncpg.Connection | None = None

    async def open(self) -> None:
        """Connect; see Inspector."""
        self._connection = await connect(self._settings, "trunkline look", default_transaction_read_only="on")

    async def close(self) -> None:
        """Disconnect; see Inspector."""
        if self._connection is not None:
            await self._connection.close(timeout=5)

    async def _rows(self, sql: str, *parameters: Any) -> list[Any]:
        """Run a query.

        Raises: ConfigurationError E232 if the schema has no such table; TransportError.
        """
        assert self._connection is not None  # noqa: S101 - opened
        try:
            return list(await self._connection.fetch(in_schema(sql, self._settings.schema), *parameters))
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError) as error:
            raise ConfigurationError(
                "E232", f"schema {self._settings.schema!r} of {self._settings.shown} holds nothing of Trunkline",
                "start a service on it first, or name the right one: ?prefix=",
            ) from error  # fmt: skip
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise translate(error, self._settings) from error

    # --- settings ---

    async def examine(
        self, channels: Sequence[Channel], subscriptions: Sequence[Subscription], held_s: float
    ) -> list[Finding]:
        """Return what the server's settings are worth; see Inspector."""
        rows = await self._rows("SELECT name, setting, unit, reset_val FROM pg_settings")
        (facts,) = await self._rows(_FACTS, self._settings.schema)
        found = list(judge({row[0]: row[1] for row in rows}, dict(facts), self._settings, held_s))
        if subscriptions or channels:
            found += await self._declared(channels, exists=facts["exists"])
        return found

    async def _declared(self, channels: Sequence[Channel], *, exists: bool) -> list[Finding]:
        """Return what is wrong with channels that exist."""
        if not exists:
            return []
        try:
            rows = await self._rows("SELECT name, kind, partitions FROM @channel")
        except ConfigurationError:
            return []  # not used as a transport yet
        there = {name: (kind, partitions) for name, kind, partitions in rows}
        return list(_differences(there, channels))

    # --- what waits ---

    async def look(self, subscriptions: Sequence[Subscription]) -> list[Lag | None]:
        """Count what waits for each; see Inspector."""
        numbers = {(channel, name): number for number, channel, name in await self._rows(_SUBSCRIPTIONS)}
        return [
            await self._lag(subscription, numbers.get((subscription.channel.name, stored_name(subscription))))
            for subscription in subscriptions
        ]

    async def _lag(self, subscription: Subscription, number: int | None) -> Lag | None:
        if number is None:
            return None
        if isinstance(subscription.channel, Stream):
            ((waiting,),) = await self._rows(STREAM_BACKLOG, number)
            return Lag(waiting)
        ((waiting, in_flight),) = await self._rows(QUEUE_BACKLOG, *queue_range(number))
        return Lag(waiting, in_flight)

    async def left_over(self) -> dict[str, int]:
        """Return subscription → what waits for it, of all that the schema has; nothing if it has none."""
        try:
            rows = await self._rows(_ALL)
        except ConfigurationError:
            return {}
        found = {}
        for number, label, is_stream in rows:
            asked = (STREAM_BACKLOG, number) if is_stream else (QUEUE_BACKLOG, *queue_range(number))
            found[label] = (await self._rows(*asked))[0][0]
        return {label: waiting for label, waiting in found.items() if waiting}

    # --- messages ---

    async def read(self, channel: Channel, *, from_start: bool, follow: bool) -> AsyncIterator[Seen]:
        """Yield rows, which reading leaves where they are; see Inspector."""
        rows = await self._rows("SELECT id FROM @channel WHERE name = $1", channel.name)
        if not rows:
            raise ConfigurationError(
                "E233", f"no channel {channel.name!r} in {self._settings.shown}", "start a service on it first"
            )
        page = await (self._log(channel, rows[0][0], from_start or not follow) if isinstance(channel, Stream)
                      else self._waiting(rows[0][0], topic=not isinstance(channel, Queue)))  # fmt: skip
        while True:
            found = await page()
            for seen in found:
                yield seen
            if not found and not follow:
                return
            if not found:
                await self._clock.sleep(LOOK_S)

    async def _log(self, channel: Stream, number: int, whole: bool) -> Any:  # noqa: FBT001
        """Return what fetches the next page of a Stream."""
        after = [-1] * channel.partitions
        if not whole:
            for partition, following in await self._rows(
                "SELECT partition, next FROM @head WHERE channel = $1", number
            ):
                after[partition] = following - 1

        async def page() -> list[Seen]:
            rows = await self._rows(_READ_LOG, number, after, PAGE)
            for partition, position, _ in rows:
                after[partition] = max(after[partition], position)
            return [Seen(position, read_packed(event), event) for _, position, event in rows]

        return page

    async def _waiting(self, channel: int, *, topic: bool) -> Any:
        """Return what fetches the next page of what waits for the subscriptions of a channel."""
        numbers = [row[0] for row in await self._rows("SELECT id FROM @subscription WHERE channel = $1", channel)]
        after = dict.fromkeys(numbers, 0)
        seen: set[str] = set()

        def new(event: bytes) -> bool:
            message = read_packed(event)
            if not topic or message is None:
                return True
            known = message.identity in seen
            seen.add(message.identity)
            return not known

        async def page() -> list[Seen]:
            rows = []
            for number in numbers:
                found = await self._rows(_READ_MESSAGES, *queue_range(number), after[number], PAGE)
                if found:
                    after[number] = found[-1][0]
                rows += [Seen(place, read_packed(event), event) for place, event in found if new(event)]
            return rows

        return page

    # --- letters of the store ---

    async def dead_letters(
        self, subscription: str | None = None, message_type: str | None = None, limit: int | None = None
    ) -> list[DeadLetterRow]:
        """See LetterReader."""
        rows = await self._rows(
            f"{_DEAD} WHERE {_FITS} AND ($2::text IS NULL OR d.type = $2) ORDER BY d.seq LIMIT $3",
            subscription, message_type, limit,
        )  # fmt: skip
        return [DeadLetterRow(*row) for row in rows]

    async def dead_letter(self, number: int) -> DeadLetterRow:
        """See LetterReader."""
        rows = await self._rows(f"{_DEAD} WHERE d.seq = $1", number)
        if not rows:
            raise DeadLetterError(
                "E601", f"no dead letter {number} in {self._settings.shown}", 'list them with "trunkline dead list"'
            )
        return DeadLetterRow(*rows[0])

    async def dead_letter_numbers(self, subscription: str | None = None, message_type: str | None = None) -> list[int]:
        """See LetterReader."""
        rows = await self._rows(
            _NUMBERS, subscription, message_type
        )  # fmt: skip
        return [row[0] for row in rows]

    async def parked(
        self, subscription: str | None, message_type: str | None, limit: int
    ) -> tuple[list[ParkedRow], int]:
        """See LetterReader."""
        found = []
        for label, event, key, due, attempt, reason, behind, held_by in await self._rows(_PARKED, subscription):
            message = read_packed(event)
            if message_type in (None, message.type if message else ""):
                found.append(ParkedRow(label, message, key, due, attempt, reason, behind, held_by))
        return found[:limit], max(0, len(found) - limit)

    async def outbox(self, channel: str | None, message_type: str | None, limit: int) -> tuple[list[OutboxEntry], int]:
        """See LetterReader."""
        if message_type is None:
            rows = await self._rows(_OUTBOX, channel, 0.0, 0, limit)
            ((count,),) = await self._rows(_OUTBOX_COUNT, channel)
            return [_entry(row) for row in rows], count - len(rows)
        found: list[OutboxEntry] = []
        more, due, number = 0, 0.0, 0
        while rows := await self._rows(_OUTBOX, channel, due, number, PAGE):
            fit = [one for one in map(_entry, rows) if one.message is not None and one.message.type == message_type]
            room = limit - len(found)
            found += fit[:room]
            more += len(fit[room:])
            _, _, due, number = rows[-1]
        return found, more

    async def set_aside(self) -> dict[str, SetAside]:
        """See LetterReader."""
        found = {}
        for label, parked, dead, event in await self._rows(_ASIDE):
            message = None if event is None else read_packed(event)
            found[label] = SetAside(parked, dead, None if message is None else message.time)
        return found


def _entry(row: Sequence[Any]) -> OutboxEntry:
    channel, event, due, _ = row
    return OutboxEntry(channel, read_packed(event), due)


def _differences(there: Mapping[str, tuple[str, int]], channels: Sequence[Channel]) -> Iterator[Finding]:
    for channel in channels:
        kind, partitions = there.get(channel.name, (channel.kind, None))
        wanted = channel.partitions if isinstance(channel, Stream) else partitions
        if (kind, partitions) == (channel.kind, wanted) or partitions is None:
            continue
        asked = f" with {channel.partitions} partitions" if isinstance(channel, Stream) else ""
        yield Finding(
            f"{channel.kind} {channel.name}", "declared as", f"{kind}, {partitions} partitions", "broken",
            f"the system declares it as {channel.kind}{asked} and does not start (E207)",
            "declare it as it exists, or use another name or ?prefix=", channel=channel.name,
        )  # fmt: skip
