"""An embedded file as an operator sees it: read only, while services work on it.

Invariant: opening never creates a file, registers no process and takes no lock that a service waits for.
Never does: change anything (actions.py). Read next: tail.py, backlog.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import apsw
import msgspec

from trunkline.config import GIVEN, Settings
from trunkline.engines import check_options
from trunkline.errors import ConfigurationError, DeadLetterError, FatalStoreError, TransportError
from trunkline.file_errors import unopened
from trunkline.message import read_packed
from trunkline.process_lock import ProcessLock
from trunkline.store import DeadLetterRow, OutboxEntry, ParkedRow, SetAside
from trunkline.stores.sqlite import read_dead_letters
from trunkline.transport import find_adapter, parse_address
from trunkline.transports.sqlite import count_backlog, last_position, oldest, read_log, read_queue

BUSY_MS = 5000


class StoredChannel(msgspec.Struct, frozen=True):
    """A channel that exists in the file."""

    number: int
    name: str
    kind: str
    partitions: int


class StoredMessage(msgspec.Struct, frozen=True):
    """A message in the file.

    Attributes:
        position: rises in commit order.
        raw: its envelope as stored.
    """

    position: int
    raw: bytes


class SubscriptionBacklog(msgspec.Struct, frozen=True):
    """How one subscription stands.

    Attributes:
        subscription: `name@channel`.
        waiting: not yet handled, those in flight included; None where the broker has none of it yet.
        in_flight: of these, handed to a process; None where the file or the broker does not say (Streams).
        parked: waiting for their next try, behind one that does, or behind a dead letter; None without a store.
        dead: set aside; None without a store.
        oldest_s: age of the oldest message that waits or is parked; None if there is none, or a broker does not say.
    """

    subscription: str
    channel: str
    kind: str
    waiting: int | None
    in_flight: int | None
    parked: int | None
    dead: int | None
    oldest_s: float | None


class ProcessRow(msgspec.Struct, frozen=True):
    """A process registered in the file."""

    number: int
    pid: int
    started: float
    beat: float
    alive: bool = False


def file_path(url: str, option: str = "--transport") -> str:
    """Return the path of the embedded file that `url` names.

    Raises: ConfigurationError E230 if it names something else, E206 if no file, E202 if nothing installed knows it,
        E227 or E228 for its options.
    """
    address = parse_address(url)
    find_adapter(f"trunkline.{option.removeprefix('--')}s", address)
    if address.scheme == "sqlite" and not address.path:
        raise ConfigurationError("E206", "sqlite: without a file", f"such as {option} sqlite:///shop.db")
    if address.scheme != "sqlite":
        raise ConfigurationError(
            "E230",
            f"{address.shown} cannot be looked into from outside",
            f"name an embedded file: {option} sqlite:///shop.db",
        )
    check_options(address.options)
    return address.path.removeprefix("/")


def existing_file(url: str, option: str = "--transport", origin: str = GIVEN) -> str:
    """Return the path of an embedded file that exists.

    Args:
        origin: what names it, as in Settings; for who did not mean it.
    Raises: ConfigurationError E202, E206, E225, E230 or E231; nothing is created.
    """
    path = file_path(url, option)
    try:
        is_file = Path(path).is_file()
    except OSError as error:
        raise unopened(path, error) from error
    if not is_file and Path(path).is_dir():
        raise unopened(path, IsADirectoryError())
    if not is_file:
        place = path if Path(path).is_absolute() else f"{path} in {Path.cwd()}"
        raise ConfigurationError(
            "E231",
            f"there is no {place}" + ("" if origin == GIVEN else f" (named by {origin})"),
            f"start a service on it first, or name the right file: {option} sqlite:///FILE",
        )
    return path


def open_file(url: str, option: str = "--transport", origin: str = GIVEN) -> EmbeddedFile:
    """Open an existing embedded file to read it.

    Raises: ConfigurationError E202, E203, E206, E225, E230, E231 or E232; TransportError E501.
    """
    return EmbeddedFile(existing_file(url, option, origin))


def open_store(settings: Settings) -> EmbeddedFile:
    """Open the existing file of the store to read it.

    Raises: as `open_file`.
    """
    if settings.store == settings.transport:
        return open_transport(settings)
    return open_file(settings.store, "--store", settings.origin["store"])


def open_transport(settings: Settings) -> EmbeddedFile:
    """Open the existing file of the transport to read it.

    Raises: as `open_file`.
    """
    return open_file(settings.transport, origin=settings.origin["transport"])


class EmbeddedFile:
    """Read-only view of the file at `path`; a context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
            self.connection.set_busy_timeout(BUSY_MS)
            self._tables = {
                name for (name,) in self.connection.execute("SELECT name FROM sqlite_schema WHERE type='table'")
            }
        except apsw.NotADBError as error:
            raise ConfigurationError("E203", f"{path} is not a SQLite database", "name another file") from error
        except apsw.Error as error:
            raise unopened(path, error) from error
        if "trunkline_process" not in self._tables:
            self.connection.close()
            what = "a SQLite database that no Trunkline service has used" if Path(path).stat().st_size else "empty"
            raise ConfigurationError(
                "E232", f"{path} is {what}", "start a service on it first, or name the file of a service"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query.

        Raises: FatalStoreError E503 for a damaged file, TransportError E506 for anything else.
        """
        with self._translated():
            return self.connection.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (apsw.CorruptError, apsw.NotADBError, apsw.IOError) as error:
            raise FatalStoreError(
                "E503", f"{self.path} is damaged: {error}", "stop its services, keep a copy, restore a backup"
            ) from error
        except apsw.Error as error:
            raise TransportError("E506", f"{self.path} refused a query: {error}", "run trunkline doctor") from error

    def version(self) -> int:
        """Return a number that changes with every commit of anyone."""
        return int(self.rows("PRAGMA data_version")[0][0])

    # --- what is in it ---

    def channels(self) -> list[StoredChannel]:
        """Return the channels, by name."""
        if "trunkline_channel" not in self._tables:
            return []
        return [
            StoredChannel(*row)
            for row in self.rows("SELECT id, name, kind, partitions FROM trunkline_channel ORDER BY name")
        ]

    def channel(self, name: str) -> StoredChannel:
        """Return the channel of that name.

        Raises: ConfigurationError E233.
        """
        found = self.channels()
        for channel in found:
            if channel.name == name:
                return channel
        have = ", ".join(channel.name for channel in found) or "none"
        raise ConfigurationError("E233", f"no channel {name!r} in {self.path}", f"there are: {have}")

    def labels(self) -> list[str]:
        """Return the labels of all subscriptions, `name@channel`."""
        if "trunkline_reader" not in self._tables:
            return []
        return [label for (label,) in self.rows("SELECT label FROM trunkline_reader ORDER BY label")]

    def processes(self) -> list[ProcessRow]:
        """Return the registered processes; `alive` is what the kernel's lock says."""
        rows = self.rows("SELECT id, pid, started, beat FROM trunkline_process ORDER BY id")
        if not rows or not Path(f"{self.path}-live").exists():
            return [ProcessRow(*row) for row in rows]
        lock = ProcessLock(self.path)
        try:
            return [ProcessRow(row[0], row[1], row[2], row[3], alive=lock.held_by_another(row[0])) for row in rows]
        finally:
            lock.close()

    # --- messages ---

    def last_position(self, channel: StoredChannel) -> int:
        """Return the position of the newest message of a Stream; later ones are higher."""
        return last_position(self.connection, channel.number)

    def read(self, channel: StoredChannel, after: int, limit: int) -> list[StoredMessage]:
        """Return messages of a channel in order: of a Stream the log, else those that wait.

        A message of a Topic is there once per subscription that has not handled it.
        """
        if channel.kind == "stream":
            rows = read_log(self.connection, channel.number, after, limit)
            found = [(position, event) for position, _, event in rows]
        else:
            numbers = self.rows("SELECT id FROM trunkline_subscription WHERE channel = ?", channel.number)
            found = [row for (number,) in numbers for row in read_queue(self.connection, number, after, limit)]
        return [StoredMessage(*row) for row in sorted(found)[:limit]]

    # --- backlogs ---

    def backlogs(self, aside: Mapping[str, SetAside] | None, now: float) -> list[SubscriptionBacklog]:
        """Return how each subscription stands.

        Args:
            aside: what the store holds of each, by label; None if there is no store.
        """
        found = []
        rows = self.rows(
            "SELECT s.id, s.name, c.name, c.kind FROM trunkline_subscription s"
            " JOIN trunkline_channel c ON c.id = s.channel ORDER BY c.name, s.name"
        )
        for number, name, channel, kind in rows:
            labels = [f"{name}@{channel}"]
            if kind == "queue":
                # A queue's row carries its own name; who owns it is what the store knows.
                labels = [label for label in aside or () if label.endswith(f"@{channel}")] or labels
            counts = count_backlog(self.connection, number, stream=kind == "stream")
            oldest = self._oldest(number, kind) if counts.waiting else None
            in_flight = None if kind == "stream" else counts.in_flight
            found.append(standing(labels, channel, kind, counts.waiting, in_flight, oldest, aside, now))
        return found

    def set_aside(self) -> dict[str, SetAside]:
        """Return label → what is set aside."""
        if "trunkline_parked" not in self._tables:
            return {}
        return {
            label: SetAside(parked, dead, None if event is None else _time(event))
            for label, parked, dead, event in self.rows(
                "SELECT r.label, (SELECT count(*) FROM trunkline_parked p WHERE p.reader = r.id),"
                " (SELECT count(*) FROM trunkline_dead_letter d WHERE d.reader = r.id),"
                " (SELECT event FROM trunkline_parked WHERE reader = r.id ORDER BY position LIMIT 1)"
                " FROM trunkline_reader r ORDER BY r.label"
            )
        }

    def _oldest(self, number: int, kind: str) -> float | None:
        if kind == "stream":
            return oldest(self.connection, number)
        rows = read_queue(self.connection, number, 0, 1)
        return _time(rows[0][1]) if rows else None

    # --- parked messages ---

    def parked(self, subscription: str | None = None, message_type: str | None = None) -> Iterator[ParkedRow]:
        """Yield the first parked message of each key and each one without a key.

        What is tried next comes first, what a dead letter holds last.
        """
        if "trunkline_parked" not in self._tables:
            return
        with self._translated():
            for label, event, behind, held_by, *rest in self.connection.execute(_PARKED, (subscription,)):
                message = read_packed(event)
                if message_type in (None, message.type if message else ""):
                    key, due, attempt, reason = rest
                    yield ParkedRow(label, message, key, due, attempt, reason, behind, held_by)

    # --- the outbox ---

    def outbox(self, channel: str | None = None, message_type: str | None = None) -> Iterator[OutboxEntry]:
        """Yield what waits to be sent, what is due first."""
        if "trunkline_outbox" not in self._tables:
            return
        with self._translated():
            for name, event, due in self.connection.execute(
                "SELECT channel, event, due FROM trunkline_outbox WHERE ?1 IS NULL OR channel = ?1 ORDER BY due, seq",
                (channel,),
            ):
                message = read_packed(event)
                if message_type in (None, message.type if message else ""):
                    yield OutboxEntry(name, message, due)

    # --- dead letters ---

    def dead_letters(
        self, subscription: str | None = None, message_type: str | None = None, limit: int = -1
    ) -> list[DeadLetterRow]:
        """Return dead letters, oldest first; see Store.dead_letters for the fields."""
        if "trunkline_dead_letter" not in self._tables:
            return []
        with self._translated():
            return read_dead_letters(self.connection, subscription=subscription, message_type=message_type, limit=limit)

    def dead_letter(self, number: int) -> DeadLetterRow:
        """Return one dead letter.

        Raises: DeadLetterError E601.
        """
        if "trunkline_dead_letter" in self._tables:
            with self._translated():
                rows = read_dead_letters(self.connection, number=number)
            if rows:
                return rows[0]
        raise DeadLetterError("E601", f"no dead letter {number} in {self.path}", 'list them with "trunkline dead list"')

    def dead_letter_numbers(self, subscription: str | None, message_type: str | None) -> list[int]:
        """Return the numbers of dead letters that fit, oldest first."""
        if "trunkline_dead_letter" not in self._tables:
            return []
        return [
            number
            for (number,) in self.rows(
                "SELECT d.seq FROM trunkline_dead_letter d JOIN trunkline_reader r ON r.id = d.reader"
                " WHERE (?1 IS NULL OR r.label = ?1 OR substr(r.label, 1, length(?1) + 1) = ?1 || '@')"
                " AND (?2 IS NULL OR d.type = ?2) ORDER BY d.seq",
                subscription, message_type,
            )
        ]  # fmt: skip


_PARKED = """
SELECT r.label, p.event,
    CASE WHEN p.key IS NULL THEN NULL
        ELSE (SELECT count(*) - 1 FROM trunkline_parked WHERE reader = p.reader AND key = p.key) END,
    (SELECT min(seq) FROM trunkline_dead_letter WHERE reader = p.reader AND key = p.key AND holds) AS held_by,
    p.key, p.due, p.attempt, p.reason
FROM trunkline_parked p JOIN trunkline_reader r ON r.id = p.reader
WHERE (?1 IS NULL OR r.label = ?1 OR substr(r.label, 1, length(?1) + 1) = ?1 || '@')
    AND (p.key IS NULL OR p.seq = (
        SELECT seq FROM trunkline_parked WHERE reader = p.reader AND key = p.key ORDER BY position, seq LIMIT 1))
ORDER BY held_by IS NOT NULL, p.due, p.seq
"""


def standing(
    labels: Sequence[str],
    channel: str,
    kind: str,
    waiting: int | None,
    in_flight: int | None,
    oldest: float | None,
    aside: Mapping[str, SetAside] | None,
    now: float,
) -> SubscriptionBacklog:
    """Put together what the transport and the store know of one subscription.

    Args:
        labels: of the subscription; several where a queue is read under several names.
        oldest: time of the oldest message that waits, if that is known.
    """
    parts = None if aside is None else [aside.get(label, SetAside()) for label in labels]
    times = [time for time in (oldest, *(part.oldest for part in parts or ())) if time is not None]
    return SubscriptionBacklog(
        ", ".join(labels), channel, kind, waiting, in_flight,
        None if parts is None else sum(part.parked for part in parts),
        None if parts is None else sum(part.dead for part in parts),
        max(0.0, now - min(times)) if times else None,
    )  # fmt: skip


def _time(raw: bytes) -> float | None:
    """Return the time of an envelope; an unreadable one has none."""
    message = read_packed(raw)
    return None if message is None else message.time
