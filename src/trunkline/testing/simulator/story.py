"""What happened in a run that broke a promise, for whoever has to mend it at night.

Invariant: faults and what broke are never left out; of the rest only what has to do with the messages concerned, and it
is said how much is missing. Read next: diagram.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

from trunkline.testing.simulator.account import Violation, name_of
from trunkline.testing.simulator.broker import PROFILES
from trunkline.testing.simulator.campaign import Failure
from trunkline.testing.simulator.faults import CRASH, KINDS
from trunkline.testing.simulator.world import Event, Result

LINES = 60
"""Most lines of a story on a terminal; the file has all of them."""
FIRST = 10
"""Of these, lines from the beginning; the others are from the end."""
NETWORK = "sent"
_UNEVENTFUL = frozenset({NETWORK, "settles", "confirmed", "passed", "RetryLater", "Discard", "duplicate"})
"""Kinds of events that a short story leaves out: another line says it, or nothing came of it."""
_ENDS = frozenset({"commit", "known", "passed", "Discard", "DeadLetter", "RetryLater"})
_FATES = frozenset({"publish", "stored", "received", "commit", "known", "retried", "parked", "buried", "discarded"})
"""Kinds of events that say what became of a message."""
_ID = re.compile(r"'([0-9a-f]{8}-[0-9a-f]{4}-7000-8000-[0-9a-f]{12})'")


class Line(msgspec.Struct, frozen=True):
    """One thing that happened.

    Attributes:
        at: virtual seconds. who: did it.
        to: the other end, if something went from one place to another; `who` for what stays there.
        text: follows `who` in a sentence. label: the same for a drawing.
        mark: `fault`, `broken` or nothing.
        lost: it never arrived. dashed: only says that something arrived.
    """

    at: float
    who: str
    to: str
    text: str
    label: str
    mark: str = ""
    lost: bool = False
    dashed: bool = False

    def __str__(self) -> str:
        sign = {"fault": "!", "broken": "X"}.get(self.mark, " ")
        return f"{sign} {self.at:9.3f}  {self.who:12} {self.text}"


class Story(msgspec.Struct, frozen=True):
    """A run as it is told.

    Attributes:
        violation: what was broken. broker: that was simulated.
        lines: what matters, in order. everything: all that happened, for a file.
        left_out: what is not in `lines`, in words.
        faults: how many there were, in words.
    """

    violation: Violation
    broker: str
    lines: list[Line]
    everything: list[Line]
    left_out: str
    faults: str

    def head(self) -> list[str]:
        """Return what was broken, and how."""
        return [f"broken: {self.violation.promise}", *(f"  {line}" for line in self.violation.text.splitlines())]

    def title(self) -> str:
        """Return what stands above the lines."""
        return f"what happened, on {self.broker}, in virtual seconds; {self.faults}:"

    def short(self) -> list[Line | str]:
        """Return the lines for a terminal: of many, some in the middle are left out."""
        lines = self.lines
        if len(lines) <= LINES:
            return list(lines)
        middle = lines[FIRST : len(lines) - LINES + FIRST]
        kept = [line for line in middle if line.mark]
        return [*lines[:FIRST], f"  … {len(middle) - len(kept)} lines", *kept, *lines[len(lines) - LINES + FIRST :]]

    def text(self, *, everything: bool = False) -> str:
        """Return the story, for a terminal or with all that happened."""
        lines: Sequence[Line | str] = self.everything if everything else self.short()
        left_out = [] if everything or not self.left_out else ["", f"left out: {self.left_out}"]
        return "\n".join([*self.head(), "", self.title(), *map(str, lines), *left_out, ""])


def tell(failure: Failure) -> Story:
    """Return the story of a failure."""
    result, violation = failure.result, failure.violation
    wanted = _concerned(result, failure.plain, violation)
    shown = _until_broken(result.events, violation)
    shared = PROFILES[failure.broker].shared
    end = Line(
        result.seconds, "in the end", "in the end", f"{violation.promise}: {_first_line(violation.text)}",
        f"{violation.promise}: {_first_line(violation.text)}", "broken",
    )  # fmt: skip
    teller = _Teller(result, wanted, shared=shared)
    lines = _joined([line for event in shown for line in teller.lines(event) if event.kind not in _UNEVENTFUL])
    if not any(line.mark == "broken" for line in lines):
        lines.append(end)
    everything = _Teller(result, None, shared=shared)
    return Story(
        violation, failure.broker, lines, [line for event in result.events for line in everything.lines(event)] + [end],
        _left_out(result, shown, wanted), _faults(result),
    )  # fmt: skip


def _concerned(result: Result, plain: Result, violation: Violation) -> set[str]:
    """Return the messages that the story is about: the one it happened to, all of its key, their causes and effects.

    If it happened to none in particular: those of which something else became than in a run without faults.
    """
    messages = result.messages
    if violation.subject:
        start = {violation.subject}
    else:
        now, before = _fates(result), _fates(plain)
        start = {
            one for one, message in messages.items()
            if now[message.type, message.data] != before.get((message.type, message.data))
        }  # fmt: skip
    keys = {messages[one].partitionkey for one in start if one in messages} - {None}
    found = start | {one for one, message in messages.items() if violation.subject and message.partitionkey in keys}
    for one in start:
        cause = messages[one].causationid if one in messages else None
        found |= {other for other, message in messages.items() if cause and message.causationid == cause}
        while cause in messages and cause not in found:
            found.add(cause)
            cause = messages[cause].causationid
    if violation.subject:
        grown = True
        while grown:
            more = {one for one, message in messages.items() if message.causationid in found} - found
            grown = bool(more)
            found |= more
    return found


def _fates(result: Result) -> dict[tuple[str, bytes], Counter[tuple[str, str]]]:
    """Return what became of the messages of the same type and payload: their ids differ between runs."""
    fates: dict[tuple[str, bytes], Counter[tuple[str, str]]] = {
        (message.type, message.data): Counter() for message in result.messages.values()
    }
    for event in result.events:
        if event.kind in _FATES:
            for one in event.about:
                message = result.messages.get(one)
                if message is not None:
                    fates[message.type, message.data][event.who, event.kind] += 1
    return fates


def _until_broken(events: list[Event], violation: Violation) -> list[Event]:
    """Return the events up to the one that broke the promise; all if it came out at the end."""
    for number, event in enumerate(events):
        if event.kind == "broken" and event.text == violation.promise and event.about in ((), (violation.subject,)):
            return events[: number + 1]
    return events


def _left_out(result: Result, shown: list[Event], wanted: set[str]) -> str:
    others = [one for one in result.messages if one not in wanted] if wanted else []
    network = sum(event.kind in _UNEVENTFUL for event in shown)
    names = ", ".join(name_of(result.messages[one], one) for one in others[:3])
    parts = [
        f"{len(others)} messages ({names}{', …' if len(others) > 3 else ''})" if others else "",  # noqa: PLR2004
        f"{network} steps of the network and confirmations" if network else "",
        f"{len(result.events) - len(shown)} events after it was broken" if len(shown) < len(result.events) else "",
    ]
    return "; ".join(part for part in parts if part)


def _joined(lines: list[Line]) -> list[Line]:
    """Join lines that say one thing: what starts together, what is sent and stored at once, tries that fail alike."""
    joined: list[Line] = []
    for line in lines:
        last = joined[-1] if joined else None
        if last is not None and line.label.startswith("request_lost") and (last.who, last.at) == (line.who, line.at):
            joined[-1] = msgspec.structs.replace(last, lost=last.to == "broker")
        together = None if last is None else _as_one(last, line)
        if together is None:
            joined.append(line)
        else:
            joined[-1] = together
    return joined


def _as_one(last: Line, line: Line) -> Line | None:
    if line.text == "starts" and last.text in {"starts", "start"} and last.at == line.at:
        who = f"{last.who}, {line.who}"
        return msgspec.structs.replace(last, who=who, to=who, text="start", label="start")
    if last.mark == "fault" and line.text.startswith("was in ") and line.who == last.who:
        return msgspec.structs.replace(
            last, text=f"{last.text}; it {line.text}", label=f"{last.label}; it {line.label}"
        )
    if last.to == "broker" and line.who == "broker" and line.label == f"stores {last.label}":
        return msgspec.structs.replace(
            last, text=f"{last.text.removesuffix(' to the broker')}, stored on {line.text.rpartition(' on ')[2]}"
        )
    first, again = _TRY.fullmatch(last.text), _TRY.fullmatch(line.text)
    if first and again and last.who == line.who and (first[1], first[4]) == (again[1], again[4]):
        text = f"{first[1]}, attempts {first[2]} to {again[2]}: {first[4]}"
        return msgspec.structs.replace(last, text=text, label=text)
    return None


_TRY = re.compile(r"(fails on .*), attempts? (\d+)( to \d+)?: (.*)", re.DOTALL)


def _faults(result: Result) -> str:
    count = sum(result.fired.values())
    if not count:
        return "without any fault"
    names = ", ".join(kind if number == 1 else f"{number} times {kind}" for kind, number in result.fired.items())
    return f"{count} fault{'' if count == 1 else 's'} ({names})"


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


class _Teller:
    """Makes lines of events, in order.

    Args:
        wanted: messages that are named; None or empty: all.
        shared: what a commit publishes is stored with it.
    """

    def __init__(self, result: Result, wanted: set[str] | None, *, shared: bool) -> None:
        self._messages = result.messages
        self._wanted = wanted
        self._shared = shared
        self._places = iter(result.places)
        self._open: dict[str, dict[str, None]] = {}
        self._seen: Counter[tuple[str, str]] = Counter()
        self._started: set[str] = set()
        self._passed = {
            (event.who, one)
            for event in result.events
            if wanted is not None and event.kind == "passed"
            for one in event.about
        }
        kept = result.events if shared and wanted is not None else []
        self._in_commit = {one for event in kept if event.kind == "commit" for one in event.made}
        self._marks = {
            one: (repr(one), *([repr(message.partitionkey)] if message.partitionkey else []))
            for one, message in self._messages.items()
        }
        self._violations = {violation.promise: violation.text for violation in reversed(result.violations)}

    def lines(self, event: Event) -> Iterator[Line]:
        """Yield the line of an event, if it has to do with what is told."""
        self._follow(event)
        about = self._about(event)
        if event.kind == "fault":
            yield self._fault(event)
        elif about or not event.about or event.kind == "broken":
            told = _WORDS.get(event.kind, _Teller._other)(self, event, about)
            if told is not None:
                yield told

    def _about(self, event: Event) -> tuple[str, ...]:
        """Return the messages that are told of: wanted, and not of a type that the receiver has no handler for."""
        passed = self._passed if event.kind == "received" else ()
        return tuple(one for one in event.about if self._is_wanted(one) and (event.who, one) not in passed)

    def _is_wanted(self, one: str) -> bool:
        return not self._wanted or one in self._wanted

    def _follow(self, event: Event) -> None:
        """Keep track of what each process has under way."""
        if event.kind == "received":
            self._open.setdefault(event.who, {}).update(dict.fromkeys(event.about))
        elif event.kind in _ENDS:
            for one in event.about:
                self._open.get(event.who, {}).pop(one, None)

    def _names(self, some: Sequence[str], *, of: int = 0) -> str:
        names = ", ".join(name_of(self._messages.get(one), one) for one in some)
        return f"{names} (and {of - len(some)} more)" if of > len(some) else names

    def _fault(self, event: Event) -> Line:
        kind, who, step = next(self._places)
        if kind == CRASH:
            had = self._open.pop(who, {})
            known = [one for one in had if self._is_wanted(one)]
            text = f"CRASHES before its step {step}"
            if known:
                text += f", with {self._names(known, of=len(had))} under way"
            return Line(event.at, who, who, text, text, "fault")
        where = "" if event.to in (who, "broker") else f" ({event.to})"
        return Line(event.at, who, who, f"FAULT {kind}{where}: {KINDS[kind]}", f"{kind}{where}", "fault")

    def _process(self, event: Event, _about: Sequence[str]) -> Line:
        text = event.text
        if text == "starts":
            text = "starts again" if event.who in self._started else "starts"
            self._started.add(event.who)
        else:
            self._open.pop(event.who, None)
        return Line(event.at, event.who, event.who, text, text)

    def _publish(self, event: Event, about: Sequence[str]) -> Line:
        names = self._names(about, of=len(event.about))
        return Line(event.at, event.who, "broker", f"sends {names} to the broker", names)

    def _stored(self, event: Event, about: Sequence[str]) -> Line | None:
        names = self._names(about)
        if about[0] in self._in_commit:
            return None  # the line of the commit says so
        self._seen[event.who, about[0]] += 1
        again = " once more" if self._seen[event.who, about[0]] > 1 else ""
        return Line(event.at, "broker", "broker", f"stores {names} on {event.text}{again}", f"stores {names}{again}")

    def _received(self, event: Event, about: Sequence[str]) -> Line:
        parts = []
        for one in about:
            self._seen[event.who, one] += 1
            parts.append(self._names([one]) + (" again" if self._seen[event.who, one] > 1 else ""))
        more = f" (and {len(event.about) - len(about)} more)" if len(event.about) > len(about) else ""
        return Line(event.at, "broker", event.who, f"hands {', '.join(parts)}{more} to {event.who}", ", ".join(parts))

    def _commit(self, event: Event, about: Sequence[str]) -> Line:
        text = f"commits: {self._names(about, of=len(event.about))} handled"
        if event.made:
            kept = "published in the same commit" if self._shared else "in its outbox"
            text += f", {self._names(event.made)} {kept}"
        return Line(event.at, event.who, event.who, text, text)

    def _dead(self, event: Event, about: Sequence[str]) -> Line:
        text = f"commits: {self._names(about)} set aside as a dead letter"
        return Line(event.at, event.who, event.who, text, text)

    def _cut_short(self, event: Event, _about: Sequence[str]) -> Line | None:
        if not event.text:
            return None
        return Line(event.at, event.who, event.who, f"was in {event.text}", f"was in {event.text}", "fault")

    def _known(self, event: Event, about: Sequence[str]) -> Line:
        text = f"has handled {self._names(about)} before, and changes nothing"
        return Line(event.at, event.who, event.who, text, text)

    def _confirmed(self, event: Event, about: Sequence[str]) -> Line:
        names = self._names(about)
        return Line(event.at, "broker", event.who, f"confirmed {names} to {event.who}", f"has {names}", dashed=True)

    def _settles(self, event: Event, about: Sequence[str]) -> Line:
        names = self._names(about)
        return Line(
            event.at, event.who, "broker", f"tells the broker that {names} is done", f"done: {names}", dashed=True
        )

    def _outside(self, event: Event, _about: Sequence[str]) -> Line | None:
        named = [one for one, marks in self._marks.items() if any(mark in event.text for mark in marks)]
        if named and not any(map(self._is_wanted, named)):
            return None
        call = _ID.sub(lambda found: self._number(found[1]), event.text)
        return Line(event.at, event.who, event.to, f"has {event.to}.{call} done", call)

    def _number(self, one: str) -> str:
        return f"<id of {self._names([one])}>" if one in self._messages else repr(one)

    def _network(self, event: Event, _about: Sequence[str]) -> Line:
        return Line(event.at, event.who, event.to, f"network: {event.text}", event.text)

    def _gone(self, event: Event, _about: Sequence[str]) -> Line:
        text = f"counts the connection of {event.text} as over: what it had comes again"
        return Line(event.at, "broker", "broker", text, text)

    def _broken(self, event: Event, _about: Sequence[str]) -> Line:
        text = f"{event.text}: {_first_line(self._violations.get(event.text, ''))}"
        return Line(event.at, event.who, event.who, text, text, "broken")

    def _other(self, event: Event, about: Sequence[str]) -> Line | None:
        """Return the line of a fact of delivery.py: a message failed, is tried again, parked, set aside or dropped."""
        text = f"{_FACTS.get(event.kind, event.kind)} {self._names(about)}"
        text = ", ".join(filter(None, (f"{text} in {event.to}" if event.to else text, event.text)))
        return Line(event.at, event.who, event.who, text, text)


_FACTS = {"retried": "fails on", "parked": "fails on", "buried": "gives up", "discarded": "drops"}
_WORDS: dict[str, Callable[[_Teller, Event, Sequence[str]], Line | None]] = {
    "process": _Teller._process,  # noqa: SLF001 - the table of its own methods
    "publish": _Teller._publish,  # noqa: SLF001
    "stored": _Teller._stored,  # noqa: SLF001
    "received": _Teller._received,  # noqa: SLF001
    "commit": _Teller._commit,  # noqa: SLF001
    "DeadLetter": _Teller._dead,  # noqa: SLF001
    "cut short": _Teller._cut_short,  # noqa: SLF001
    "known": _Teller._known,  # noqa: SLF001
    "confirmed": _Teller._confirmed,  # noqa: SLF001
    "settles": _Teller._settles,  # noqa: SLF001
    "outside": _Teller._outside,  # noqa: SLF001
    "gone": _Teller._gone,  # noqa: SLF001
    "broken": _Teller._broken,  # noqa: SLF001
    NETWORK: _Teller._network,  # noqa: SLF001
}
