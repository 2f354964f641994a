"""An independent ledger: what producers tried and were told, what consumers did, and whether that fits together.

Invariant: one pass over each history, one byte per message; a journal survives kill -9, because each entry is one
`write` to a file that is not the database. Never does: look into Trunkline's own tables. Read next: tests/faults/.
Source: the checkers `total-queue` of Jepsen and `jepsen.tests.kafka`, with definite failures told from unknown ends.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Self

import msgspec


class Kind(StrEnum):
    """What an entry says.

    Producer: BEGIN and END of one life of a process (no END: it was killed), INVOKE before a publish, then OK
    (confirmed), FAIL (definitely not stored) or UNKNOWN. Consumer: DELIVERED when the handler starts, EFFECT when its
    work is committed, ACKED when it is settled, DEAD when it was set aside, EXPIRED when it was too old.
    """

    BEGIN = "begin"
    END = "end"
    INVOKE = "invoke"
    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"
    DELIVERED = "delivered"
    EFFECT = "effect"
    ACKED = "acked"
    DEAD = "dead"
    EXPIRED = "expired"


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One line of a journal.

    Attributes:
        producer: who published the message.
        key: what it is in order with; a producer publishes one after the other per key.
        seq: 1, 2, 3, … per producer and key. The three together name the message.
    """

    kind: Kind
    producer: str
    key: str = ""
    seq: int = 0


class Journal:
    """An append-only file of entries.

    Each `add` is one write call: what was added before a kill -9 is in the file, whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def add(self, kind: Kind, producer: str, key: str = "", seq: int = 0) -> None:
        """Append one entry."""
        line = msgspec.json.encode(Entry(kind, producer, key, seq)) + b"\n"
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes of a journal entry were written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def read_journal(path: str | os.PathLike[str], *, growing: bool = False) -> Iterator[Entry]:
    """Yield the entries of a journal, in order.

    Args:
        growing: its writer still runs, so a last entry that has not come to its end is not there yet.

    Raises: msgspec.DecodeError for a line that is none.
    """
    decode = msgspec.json.Decoder(Entry).decode
    with open(path, "rb") as file:  # noqa: PTH123 - a path-like may be no Path
        for line in file:
            if growing and not line.endswith(b"\n"):
                return
            yield decode(line)


class Verdict(msgspec.Struct):
    """What `check` found. Lists hold the first EXAMPLES of each finding, `counts` says how many there are.

    Attributes:
        drained: whether the system had come to rest; if not, nothing is passed.
        counts: finding → number. Findings that fail: LOST (confirmed, and neither effect nor set aside; or delivered
            and never finished), UNEXPECTED (an effect or delivery of what was never invoked or definitely failed),
            DUP_EFFECT, ORDER (effects of a key out of order), JOURNAL (a history that no run can have, so entries are
            missing or out of place), DUP_DELIVERY beyond the allowance; OFFSET and CONSERVATION, see
            `check_offsets` and `check_conservation`.
            Counted only: RECOVERED (effects of unknown publishes), and `acknowledged`, `effects`, `redelivered`.
        examples: finding → first messages, as text.
    """

    drained: bool
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}

    @property
    def passed(self) -> bool:
        """Return whether nothing is wrong."""
        return self.drained and not any(self.counts.get(name) for name in FAILURES)

    def describe(self) -> str:
        """Return all of it, for people."""
        lines = [f"{name}: {number}" for name, number in sorted(self.counts.items())]
        lines += [f"{name}: {text}" for name, found in sorted(self.examples.items()) for text in found]
        if not self.drained:
            lines.insert(0, "not drained: what is missing may still come, so this proves nothing")
        return "\n".join([("passed" if self.passed else "FAILED"), *lines])

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + number

    def find(self, name: str, what: str) -> None:
        """Add a finding."""
        self.count(name)
        found = self.examples.setdefault(name, [])
        if len(found) < EXAMPLES:
            found.append(what)


EXAMPLES = 10
FAILURES = ("LOST", "UNEXPECTED", "DUP_EFFECT", "DUP_DELIVERY", "ORDER", "JOURNAL", "OFFSET", "CONSERVATION")

# One byte per message; a producer's entries set the low bits, a consumer's the high ones.
_OK, _FAIL, _UNKNOWN = 1, 2, 4
_DELIVERED, _EFFECT, _ACKED, _ASIDE = 16, 32, 64, 128
_ENDS = {Kind.OK: _OK, Kind.FAIL: _FAIL, Kind.UNKNOWN: _UNKNOWN}


class _Lane:
    """The messages of one producer and key, and how far its effects are."""

    __slots__ = ("last_effect", "name", "open", "states")

    def __init__(self, name: str) -> None:
        self.name = name
        self.states = bytearray(1)  # seq counts from 1
        self.open = 0
        self.last_effect = 0


class _Producers:
    """Reads what producers wrote."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.lanes: dict[tuple[str, str], _Lane] = {}
        self._open: dict[str, set[_Lane]] = {}
        self._alive: set[str] = set()

    def read(self, entry: Entry) -> None:
        """Take one entry."""
        kind, producer = entry.kind, entry.producer
        if kind is Kind.BEGIN:
            self._end_life(producer)
            self._alive.add(producer)
        elif kind is Kind.END:
            if producer not in self._alive or self._open.get(producer):
                self.verdict.find("JOURNAL", f"{producer} ended with a publish under way, or without a beginning")
            self._end_life(producer)
            self._alive.discard(producer)
        elif producer not in self._alive:
            self.verdict.find("JOURNAL", f"{_name(entry)}: {kind} outside the life of {producer}")
        elif kind is Kind.INVOKE:
            self._invoke(entry)
        elif kind in _ENDS:
            self._settle(entry)
        else:
            self.verdict.find("JOURNAL", f"{_name(entry)}: {kind} in a producer's journal")

    def finish(self) -> None:
        """Take the end of the journals: what is under way is unknown."""
        for producer in list(self._open):
            self._end_life(producer)

    def _invoke(self, entry: Entry) -> None:
        identity = entry.producer, entry.key
        lane = self.lanes.get(identity)
        if lane is None:
            lane = self.lanes[identity] = _Lane(f"{entry.producer}/{entry.key}")
        if lane.open or entry.seq != len(lane.states):
            self.verdict.find("JOURNAL", f"{_name(entry)}: invoked, expected {len(lane.states)} of this key")
            return
        lane.states.append(0)
        lane.open = entry.seq
        self._open.setdefault(entry.producer, set()).add(lane)

    def _settle(self, entry: Entry) -> None:
        lane = self.lanes.get((entry.producer, entry.key))
        if lane is None or lane.open != entry.seq:
            self.verdict.find("JOURNAL", f"{_name(entry)}: {entry.kind} without a publish under way")
            return
        lane.states[lane.open] |= _ENDS[entry.kind]
        lane.open = 0
        self._open[entry.producer].discard(lane)

    def _end_life(self, producer: str) -> None:
        for lane in self._open.pop(producer, ()):
            lane.states[lane.open] |= _UNKNOWN
            lane.open = 0


class _Consumers:
    """Reads what consumers wrote."""

    def __init__(
        self,
        verdict: Verdict,
        lanes: dict[tuple[str, str], _Lane],
        *,
        ordered: Callable[[str], bool],
        deliveries: bool,
    ) -> None:
        self.verdict = verdict
        self.lanes = lanes
        self.duplicates: list[str] = []
        self._ordered = ordered
        self._deliveries = deliveries

    def read(self, entry: Entry) -> None:
        """Take one entry."""
        lane = self.lanes.get((entry.producer, entry.key))
        if lane is None or not 0 < entry.seq < len(lane.states):
            self.verdict.find("UNEXPECTED", f"{_name(entry)}: {entry.kind}, but never invoked")
            return
        state = lane.states[entry.seq]
        if state & _FAIL:
            self.verdict.find("UNEXPECTED", f"{_name(entry)}: {entry.kind}, but its publish had failed")
            return
        match entry.kind:
            case Kind.DELIVERED:
                if state & _DELIVERED:
                    self.duplicates.append(_name(entry))
                lane.states[entry.seq] = (state | _DELIVERED) & ~_ACKED
            case Kind.EFFECT:
                self._effect(entry, lane, state)
            case Kind.DEAD | Kind.EXPIRED:
                self._needs_delivery(entry, state)
                if state & (_EFFECT | _ASIDE):
                    self.verdict.find("DUP_EFFECT", f"{_name(entry)}: {entry.kind} after it was finished")
                lane.states[entry.seq] |= _ASIDE
            case Kind.ACKED:
                if not state & (_EFFECT | _ASIDE) or state & _ACKED:
                    self.verdict.find("JOURNAL", f"{_name(entry)}: acked before its end, or twice")
                lane.states[entry.seq] |= _ACKED
            case _:
                self.verdict.find("JOURNAL", f"{_name(entry)}: {entry.kind} in a consumer's journal")

    def _effect(self, entry: Entry, lane: _Lane, state: int) -> None:
        self._needs_delivery(entry, state)
        if state & (_EFFECT | _ASIDE):
            self.verdict.find("DUP_EFFECT", _name(entry))
        elif entry.seq < lane.last_effect and self._ordered(entry.key):
            self.verdict.find("ORDER", f"{_name(entry)} after {lane.last_effect}")
        lane.last_effect = max(lane.last_effect, entry.seq)
        lane.states[entry.seq] |= _EFFECT

    def _needs_delivery(self, entry: Entry, state: int) -> None:
        if self._deliveries and not state & _DELIVERED:
            self.verdict.find("JOURNAL", f"{_name(entry)}: {entry.kind} without a delivery")


def check(
    produced: Iterable[Entry],
    consumed: Iterable[Entry],
    *,
    drained: bool,
    ordered: Callable[[str], bool] = lambda _key: True,
    deliveries: bool = False,
    acks: bool = False,
    redeliveries: int | None = None,
) -> Verdict:
    """Return what became of every message.

    Args:
        produced: the producers' journals; each producer's entries in its order.
        consumed: what consumers did, in the order in which it was committed.
        drained: whether the backlog was empty when `consumed` was read.
        ordered: whether effects of a key must come in the order of publication (Streams do, Queues do not).
        deliveries: whether `consumed` has DELIVERED entries, so that each effect needs one before it.
        acks: whether it has ACKED entries, so that everything finished needs one.
        redeliveries: most allowed DUP_DELIVERY, such as faults x prefetch; None only counts them.
    """
    verdict = Verdict(drained)
    producers = _Producers(verdict)
    for entry in produced:
        producers.read(entry)
    producers.finish()
    consumers = _Consumers(verdict, producers.lanes, ordered=ordered, deliveries=deliveries)
    for entry in consumed:
        consumers.read(entry)
    for lane in producers.lanes.values():
        _close(verdict, lane, acks=acks)
    verdict.count("redelivered", len(consumers.duplicates))
    if redeliveries is not None and len(consumers.duplicates) > redeliveries:
        for name in consumers.duplicates:
            verdict.find("DUP_DELIVERY", name)
    return verdict


def _close(verdict: Verdict, lane: _Lane, *, acks: bool) -> None:
    """Count one lane when everything was read."""
    for seq in range(1, len(lane.states)):
        state = lane.states[seq]
        finished = state & (_EFFECT | _ASIDE)
        if state & _OK:
            verdict.count("acknowledged")
        if state & _EFFECT:
            verdict.count("effects")
        if state & _UNKNOWN and finished:
            verdict.count("RECOVERED")
        if not finished and state & _OK:
            verdict.find("LOST", f"{lane.name}/{seq}")
        elif not finished and state & _DELIVERED:
            verdict.find("LOST", f"{lane.name}/{seq}: delivered, never finished")
        elif acks and finished and not state & _ACKED:
            verdict.find("JOURNAL", f"{lane.name}/{seq}: finished, never acked")


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a log was read.

    Attributes:
        reader: one life of one reader of a partition: what it reads comes in the order of the log.
        message: what stands there, by any name that tells messages apart.
    """

    reader: str
    partition: int
    offset: int
    message: str


def check_offsets(verdict: Verdict, places: Iterable[Place]) -> None:
    """Find what no log can show: two messages at one place, one message at two, or a reader that went back.

    Args:
        places: each reader's in the order in which it read them; readers may overlap after a fault.
    """
    at: dict[tuple[int, int], str] = {}
    where: dict[str, tuple[int, int]] = {}
    last: dict[tuple[str, int], int] = {}
    for place in places:
        spot = place.partition, place.offset
        text = f"partition {place.partition} offset {place.offset}"
        if at.setdefault(spot, place.message) != place.message:
            verdict.find("OFFSET", f"{text}: {at[spot]} and {place.message}")
        if where.setdefault(place.message, spot) != spot:
            verdict.find("OFFSET", f"{place.message} at {where[place.message]} and {spot}")
        before = last.get((place.reader, place.partition))
        if before is not None and place.offset <= before:
            verdict.find("OFFSET", f"{place.reader}: {text} after {before}")
        last[place.reader, place.partition] = place.offset


def check_conservation(verdict: Verdict, stored: Iterable[str], found: Mapping[str, Iterable[str]]) -> None:
    """Find what came from nowhere, vanished, or is in two places at once.

    Args:
        stored: what the broker took, each message as often as it did.
        found: place (handled, dead letters, still waiting, …) → what is there now.
    """
    left = Counter(stored)
    for place, messages in found.items():
        for message in messages:
            if left[message] <= 0:
                verdict.find("CONSERVATION", f"{message} in {place}, once more than it was stored")
            left[message] -= 1
    for message, number in left.items():
        if number > 0:
            verdict.find("CONSERVATION", f"{message} is nowhere")


def _name(entry: Entry) -> str:
    return f"{entry.producer}/{entry.key}/{entry.seq}"
