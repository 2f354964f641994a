"""The broker of a simulated system: channels, subscriptions, and who reads what.

Invariant: everything here happens at once, at a moment of virtual time, and survives every process; only sessions end.
What was handed to a session that ended comes again. Never does: lose or delay anything (network.py).
Read next: transport.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from trunkline.channel import Channel, Queue, Stream
from trunkline.message import Message, partition_of
from trunkline.transport import Staged, Subscription


class Profile(msgspec.Struct, frozen=True):
    """How one kind of broker differs from the others.

    Attributes:
        scheme: of the transport it stands for.
        shared: store and channels are one database: a unit's messages and settlements are part of its commit.
        at_once: what a session had comes again when its connection ends, else when its lease does.
        whole: from a partition that changes hands all after the first unfinished message comes again.
        deduplicates: a message whose id it has is not stored twice.
        priority: a Queue lets urgent messages overtake.
    """

    scheme: str
    shared: bool = False
    at_once: bool = False
    whole: bool = True
    deduplicates: bool = False
    priority: bool = False


PROFILES = {
    one.scheme: one
    for one in (
        Profile("sqlite", shared=True, whole=False, priority=True),
        Profile("postgres", shared=True, whole=False, priority=True),
        Profile("rabbitmq", at_once=True, priority=True),
        Profile("kafka"),
        Profile("nats", deduplicates=True),
        Profile("redis", deduplicates=True),
    )
}


class Session:
    """One connection of one process.

    Attributes:
        deliver: label, entries → told to the process, through the network.
        told: label, partitions it may read from now on → told to the process.
    """

    def __init__(
        self,
        name: str,
        deliver: Callable[[str, list[Entry]], None],
        told: Callable[[str, frozenset[int]], None],
    ) -> None:
        self.name = name
        self.deliver = deliver
        self.told = told
        self.open = True


class Entry:
    """One message in one place.

    Attributes:
        handed: how often it was handed to a process.
        lost: a process that had it went away: it may have been in a handler then.
        at: when it was stored, in seconds since the epoch.
    """

    __slots__ = ("at", "handed", "lost", "message", "partition", "position")

    def __init__(self, message: Message, position: int, partition: int = -1, at: float = 0.0) -> None:
        self.message = message
        self.position = position
        self.partition = partition
        self.at = at
        self.handed = 0
        self.lost = False


class Line:
    """What one subscription to a Queue or Topic has not finished.

    Args:
        overtakes: see Broker.
    """

    def __init__(self, subscription: Subscription, *, priority: bool, overtakes: Callable[[str], bool]) -> None:
        self._overtakes = overtakes
        self.label = subscription.label
        self.readers: list[Session] = []
        self._priority = priority
        self._ready: deque[Entry] = deque()
        self._asking: dict[Session, int] = {}
        self._under_way: dict[int, tuple[Entry, Session]] = {}

    def add(self, message: Message, position: int) -> None:
        """Store one message."""
        entry = Entry(message, position)
        if self._priority:
            self._insert(entry)
        else:
            self._ready.append(entry)
        self._serve()

    def _insert(self, entry: Entry) -> None:
        rank = _rank(entry)
        index = next((i for i, other in enumerate(self._ready) if _rank(other) > rank), len(self._ready))
        self._ready.insert(index, entry)

    def join(self, session: Session) -> None:
        """Count a reader in."""
        self.readers.append(session)

    def leave(self, session: Session) -> None:
        """Give back what a session has; it comes again, first."""
        if session in self.readers:
            self.readers.remove(session)
        self._asking.pop(session, None)
        again = [entry for entry, owner in self._under_way.values() if owner is session]
        for entry in sorted(again, key=_rank if self._priority else _position, reverse=True):
            del self._under_way[entry.position]
            entry.lost = True
            if self._priority:
                self._insert(entry)
            else:
                self._ready.appendleft(entry)
        if again:
            self._serve()

    def ask(self, session: Session, limit: int) -> None:
        """Hand out up to `limit` messages, as soon as there are any."""
        self._asking[session] = limit
        self._serve()

    def _serve(self) -> None:
        while self._ready and self._asking:
            session = next(iter(self._asking))
            limit = self._asking.pop(session)
            if len(self._ready) > 1 and self._overtakes(self.label):
                self._ready.insert(1, self._ready.popleft())
            batch = [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]
            for entry in batch:
                entry.handed += 1
                self._under_way[entry.position] = entry, session
            session.deliver(self.label, batch)

    def settle(self, session: Session | None, positions: Iterable[int]) -> None:
        """Forget finished messages; those that another session has by now stay with it."""
        for position in positions:
            found = self._under_way.get(position)
            if found is not None and (session is None or found[1] is session):
                del self._under_way[position]

    def is_finished(self) -> bool:
        """Return whether nothing waits."""
        return not self._ready and not self._under_way

    def waiting(self) -> list[Entry]:
        """Return what is not finished."""
        return [*self._ready, *(entry for entry, _ in self._under_way.values())]


def _rank(entry: Entry) -> tuple[int, int]:
    return -min(max(entry.message.priority, 0), 9), entry.position


def _position(entry: Entry) -> int:
    return entry.position


class Cursor:
    """How far one subscription is in one Stream, and which session reads which partition."""

    def __init__(self, subscription: Subscription, logs: list[list[Entry]], *, whole: bool) -> None:
        self.label = subscription.label
        self.readers: list[Session] = []
        self._logs = logs
        self._whole = whole
        self._low = [_begin(subscription, log) for log in logs]
        self._next = list(self._low)
        self._done: list[set[int]] = [set() for _ in logs]
        self._lost: list[int] = [0 for _ in logs]
        self._owner: list[Session | None] = [None for _ in logs]
        self._leaving: dict[int, Session] = {}
        self._asking: dict[Session, int] = {}

    def added(self) -> None:
        """Hand on what came."""
        self._serve()

    def join(self, session: Session) -> None:
        """Count a reader in, and share the partitions out again."""
        self.readers.append(session)
        self._balance()

    def leave(self, session: Session) -> None:
        """Give a session's partitions to others: from the first unfinished message on everything comes again."""
        if session in self.readers:
            self.readers.remove(session)
        self._asking.pop(session, None)
        self._leaving = {number: owner for number, owner in self._leaving.items() if owner is not session}
        for number, owner in enumerate(self._owner):
            if owner is session:
                self._free(number)
        self._balance()

    def _free(self, number: int) -> None:
        self._owner[number] = None
        self._lost[number] = max(self._lost[number], self._next[number])
        self._next[number] = self._low[number]
        if self._whole:
            self._done[number].clear()

    def _balance(self) -> None:
        if not self.readers:
            return
        changed: set[Session] = set()
        for number in range(len(self._logs)):
            wanted = self.readers[number % len(self.readers)]
            owner = self._owner[number]
            if owner is None:
                self._owner[number] = wanted
                changed.add(wanted)
            elif owner is not wanted and number not in self._leaving:
                self._leaving[number] = owner
                changed.add(owner)
        for session in self.readers:
            if session in changed:
                session.told(self.label, self.assigned(session))
        self._serve()

    def assigned(self, session: Session) -> frozenset[int]:
        """Return the partitions that a session may begin messages of."""
        return frozenset(number for number in range(len(self._owner)) if self._may_begin(session, number))

    def _may_begin(self, session: Session, number: int) -> bool:
        return self._owner[number] is session and number not in self._leaving

    def released(self, session: Session, number: int) -> None:
        """Let go of a partition of which nothing is under way any more."""
        if self._leaving.get(number) is session:
            del self._leaving[number]
            self._free(number)
            self._lost[number] = 0  # it was finished, not lost
            self._balance()

    def ask(self, session: Session, limit: int) -> None:
        """Hand out up to `limit` messages of the session's partitions, as soon as there are any."""
        self._asking[session] = limit
        self._serve()

    def _serve(self) -> None:
        for session in list(self._asking):
            batch: list[Entry] = []
            limit = self._asking[session]
            for number, log in enumerate(self._logs):
                if self._next[number] < len(log) and self._may_begin(session, number):
                    batch += self._take(number, limit - len(batch))
            if batch:
                del self._asking[session]
                session.deliver(self.label, batch)

    def _take(self, number: int, limit: int) -> list[Entry]:
        log = self._logs[number]
        taken: list[Entry] = []
        while len(taken) < limit and self._next[number] < len(log):
            index = self._next[number]
            self._next[number] = index + 1
            if index not in self._done[number]:
                entry = log[index]
                entry.handed += 1
                again = Entry(entry.message, entry.position, number)
                again.lost = index < self._lost[number]
                taken.append(again)
        return taken

    def settle(self, number: int, position: int) -> None:
        """Note a finished message."""
        log, done = self._logs[number], self._done[number]
        index = _index(log, position, log[0].position if log else 0)
        if index >= self._low[number]:
            done.add(index)
        while self._low[number] in done:
            done.discard(self._low[number])
            self._low[number] += 1

    def commit(self, session: Session, number: int, position: int) -> None:
        """Note that everything before a position is finished; a session that has lost the partition is not heard."""
        if self._owner[number] is session:
            log = self._logs[number]
            while self._low[number] < len(log) and log[self._low[number]].position < position:
                self._low[number] += 1

    def is_finished(self) -> bool:
        """Return whether nothing waits."""
        return self._low == list(map(len, self._logs))

    def waiting(self) -> list[Entry]:
        """Return what is not finished."""
        return [
            entry
            for number, log in enumerate(self._logs)
            for index, entry in enumerate(log[self._low[number] :], self._low[number])
            if index not in self._done[number]
        ]


def _begin(subscription: Subscription, log: Sequence[Entry]) -> int:
    """Return where a new subscription begins in a log."""
    if subscription.since_s is not None:
        return bisect_left(log, subscription.since_s, key=lambda entry: int(entry.at))
    return len(log) if subscription.start == "latest" else 0


def _index(log: Sequence[Entry], position: int, first: int) -> int:
    """Return where a position is in a log whose positions rise by one or more."""
    index = min(position - first, len(log) - 1)
    while log[index].position > position:
        index -= 1
    return index


class Broker:
    """The channels of a system.

    Args:
        now: tells the time, in seconds since the epoch.
        stored: told about each message that is stored, for the ledger.
        overtakes: whether the next but one message of a Queue or Topic comes before the next.
    """

    def __init__(
        self,
        profile: Profile,
        now: Callable[[], float],
        stored: Callable[[Channel, Message, int], None],
        overtakes: Callable[[str], bool],
    ) -> None:
        self._now = now
        self._overtakes = overtakes
        self.profile = profile
        self.lines: dict[str, Line] = {}
        self.cursors: dict[str, Cursor] = {}
        self.sessions: list[Session] = []
        self._stored = stored
        self._logs: dict[str, list[list[Entry]]] = {}
        self._routes: dict[str, list[Line | Cursor]] = {}
        self._ids: dict[str, set[tuple[str, str]]] = {}
        self._position = 0

    def declare(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Make what is missing."""
        for channel in channels:
            self._channel(channel)
        for subscription in subscriptions:
            channel, label = subscription.channel, subscription.label
            self._channel(channel)
            if label in self.lines or label in self.cursors:
                continue
            found: Line | Cursor
            if isinstance(channel, Stream):
                found = self.cursors[label] = Cursor(subscription, self._logs[channel.name], whole=self.profile.whole)
            else:
                priority = isinstance(channel, Queue) and channel.priority
                found = self.lines[label] = Line(subscription, priority=priority, overtakes=self._overtakes)
                self._drain_early(channel, found)
            self._routes[channel.name].append(found)

    def _channel(self, channel: Channel) -> None:
        self._routes.setdefault(channel.name, [])
        if isinstance(channel, Stream):
            self._logs.setdefault(channel.name, [[] for _ in range(channel.partitions)])
        elif isinstance(channel, Queue):
            self._logs.setdefault(channel.name, [[]])

    def _drain_early(self, channel: Channel, line: Line) -> None:
        """Give the reader of a Queue what was sent before there was one."""
        if isinstance(channel, Queue):
            early = self._logs[channel.name][0]
            for entry in early:
                line.add(entry.message, entry.position)
            early.clear()

    def publish(self, batch: Sequence[Staged]) -> None:
        """Store messages in order."""
        for staged in batch:
            self._publish(staged.channel, staged.message)

    def _publish(self, channel: Channel, message: Message) -> None:
        if channel.name not in self._routes:
            self._channel(channel)
        if self.profile.deduplicates:
            ids, identity = self._ids.setdefault(channel.name, set()), (message.tenantid or "", message.identity)
            if identity in ids:
                return
            ids.add(identity)
        self._position += 1
        position = self._position
        self._stored(channel, message, position)
        routes = self._routes[channel.name]
        if isinstance(channel, Stream):
            partition = partition_of(message, channel.partitions)
            self._logs[channel.name][partition].append(Entry(message, position, partition, self._now()))
        elif isinstance(channel, Queue) and not routes:
            self._logs[channel.name][0].append(Entry(message, position))
        for route in routes:
            if isinstance(route, Cursor):
                route.added()
            else:
                route.add(message, position)

    def readers_of(self, channel: Channel) -> list[str]:
        """Return the labels of the subscriptions that a channel has by now."""
        return [route.label for route in self._routes[channel.name]]

    # --- sessions ---

    def join(self, session: Session, labels: Iterable[str]) -> None:
        """Count a process in."""
        self.sessions.append(session)
        for label in labels:
            self._of(label).join(session)

    def leave(self, session: Session) -> None:
        """Count a process out: what it had comes again."""
        if session in self.sessions:
            self.sessions.remove(session)
            session.open = False
            for found in self._all().values():
                if session in found.readers:
                    found.leave(session)

    def ask(self, session: Session, label: str, limit: int) -> None:
        """Hand out up to `limit` messages of a subscription, as soon as there are any."""
        if session.open:
            self._of(label).ask(session, limit)

    def settle(self, label: str, partition: int, position: int) -> None:
        """Note that a message is finished, whoever has it: it was settled by the store's commit."""
        if partition < 0:
            self.lines[label].settle(None, (position,))
        else:
            self.cursors[label].settle(partition, position)

    def confirm(self, session: Session, label: str, places: Iterable[tuple[int, int]]) -> None:
        """Note (-1, position) of what is finished, or (partition, position) up to which everything is."""
        for partition, position in places:
            if partition < 0:
                self.lines[label].settle(session, (position,))
            else:
                self.cursors[label].commit(session, partition, position)

    def release(self, session: Session, label: str, partition: int) -> None:
        """Let a partition go to the one it was promised to."""
        self.cursors[label].released(session, partition)

    def _of(self, label: str) -> Any:
        return self.cursors.get(label) or self.lines[label]

    def _all(self) -> dict[str, Line | Cursor]:
        return {**self.lines, **self.cursors}

    def waiting(self) -> dict[str, list[Entry]]:
        """Return what is not finished, by subscription."""
        return {label: waiting for label, one in self._all().items() if (waiting := one.waiting())}
