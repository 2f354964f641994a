"""What a run promised and what came of it, noted outside of the system that is simulated.

Invariant: nothing here is read from an inbox or an outbox: those are what is checked. Source of the checks: Jepsen's
total-queue and kafka checkers. Read next: world.py.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from trunkline.app import plans_of
from trunkline.channel import Channel, Stream, Topic, message_type
from trunkline.message import Message
from trunkline.outcome import ACK, DeadLetter, Discard
from trunkline.service import System
from trunkline.store import Unit


class Violation(msgspec.Struct, frozen=True):
    """A promise that was not kept.

    Attributes:
        promise: which: `nothing lost`, `effects once`, `order per key`, …, or the name of the user's own check.
        text: what happened instead.
        subject: id of the message that it happened to, if it is one.
    """

    promise: str
    text: str
    subject: str = ""


def name_of(message: Message | None, message_id: str) -> str:
    """Return a message for people: type, key, and a short number that tells it from others of that key.

    >>> name_of(None, "018bcfe5-6800-7000-8000-00000000001f")
    'a message #31'
    """
    try:
        number = f"#{int(message_id[-12:], 16)}"  # of a simulated clock: in the order in which they were made
    except ValueError:
        number = f"#{message_id[-12:]}"
    if message is None:
        return f"a message {number}"
    return (
        f"{message.type} {number}"
        if message.partitionkey is None
        else f"{message.type} {message.partitionkey} {number}"
    )


def subject(message: Message) -> str:
    """Return what two copies of one message have in common and no other message has; its id, but for foreign ones."""
    identity = message.identity
    if message.tenantid is None and identity is message.id:
        return identity
    return f"{message.tenantid or ''} {identity}".replace("\n", " ").strip()


class Expected(msgspec.Struct, frozen=True):
    """What the subscriptions of a system are to come to an end with.

    Attributes:
        readers: channel → labels of its subscriptions.
        types: label → types that it handles.
        late: labels of those that get only what is published once they are there.
        holding: labels of those whose dead letters keep the later messages of their key waiting.
    """

    readers: dict[str, list[str]] = {}
    types: dict[str, set[str]] = {}
    late: set[str] = set()
    holding: set[str] = set()


def expected_of(system: System) -> Expected:
    """Return what is expected of a system."""
    expected = Expected()
    for _, subscription, handlers in plans_of(system):
        label = subscription.label
        expected.readers.setdefault(subscription.channel.name, []).append(label)
        expected.types[label] = {message_type(cls).name for h in handlers for cls in h.takes}  # type: ignore[union-attr]
        if isinstance(subscription.channel, Topic) or subscription.start != "earliest":
            expected.late.add(label)
        if handlers[0].options.after_dead_letter == "hold":
            expected.holding.add(label)
    return expected


class Account:
    """The messages of one run, each by its `subject`."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self.stored: dict[str, list[Channel]] = {}
        self.messages: dict[str, Message] = {}
        self.confirmed: set[str] = set()
        self.dead: list[tuple[str, str, str]] = []
        self.violations: list[Violation] = []
        self._staged: set[str] = set()
        self._ended: dict[tuple[str, str], str] = {}
        self._heard: dict[str, set[str]] = {}
        self._overtaken: set[tuple[str, str]] = set()
        self._positions: dict[tuple[str, str], tuple[int, str]] = {}

    def name(self, message_id: str) -> str:
        """Return a message for people."""
        return name_of(self.messages.get(message_id), message_id)

    def named(self, message: Message) -> str:
        """Return a message for people."""
        return self.name(subject(message))

    def offered(self, message: Message) -> None:
        """Note a message that somebody tries to publish who is no unit of work."""
        what = subject(message)
        self._staged.add(what)
        self.messages[what] = message

    def was_stored(self, channel: Channel, message: Message, heard_by: Collection[str]) -> None:
        """Note a message on the broker.

        Args:
            heard_by: labels of the subscriptions that were there at that moment.
        """
        what = subject(message)
        self.messages[what] = message
        self.stored.setdefault(what, []).append(channel)
        self._heard.setdefault(what, set()).update(heard_by)

    def committed(self, unit: Unit) -> None:
        """Note a commit: what it had handled, and what it publishes."""
        if unit.duplicate:
            return  # whatever it staged is not to leave
        for staged in unit.staged:
            what = subject(staged.message)
            self._staged.add(what)
            self.confirmed.add(what)
            self.messages[what] = staged.message
        for delivery in unit.deliveries:
            message, label = delivery.message, delivery.subscription.label
            if message is None:
                continue
            if unit.outcome is ACK:
                self._effect(
                    label, message, delivery.position, ordered=isinstance(delivery.subscription.channel, Stream)
                )
            elif isinstance(unit.outcome, DeadLetter):
                self.dead.append((label, subject(message), unit.outcome.reason))
                self._ended.setdefault((label, subject(message)), "set aside")
                if label not in self._expected.holding:
                    self._overtaken.add((label, subject(message)))
            elif isinstance(unit.outcome, Discard):
                self._ended.setdefault((label, subject(message)), "dropped")

    def _effect(self, label: str, message: Message, position: int, *, ordered: bool) -> None:
        what = subject(message)
        place = label, what
        if self._ended.get(place) == "handled":
            self._violated("effects once", f"{label} handled {self.name(what)} twice", what)
        self._ended[place] = "handled"
        if ordered and message.partitionkey is not None and place not in self._overtaken:
            key = label, message.partitionkey
            last, before = self._positions.get(key, (0, ""))
            if position < last:
                self._violated(
                    "order per key",
                    f"{label} handled {self.name(what)} of key {message.partitionkey!r}"
                    f" after {self.name(before)}, which was published later",
                    what,
                )
            self._positions[key] = max(last, position), what

    def _violated(self, promise: str, text: str, subject: str = "") -> None:
        self.violations.append(Violation(promise, text, subject))

    def close(self, unsent: set[str], *, allow_dead: bool) -> None:
        """Draw up the account at the end.

        Args:
            unsent: ids that an outbox still holds.
        """
        expected = self._expected
        for message_id in sorted(self.confirmed - unsent):
            channels = self.stored.get(message_id)
            if not channels:
                self._violated("nothing lost", f"{self.name(message_id)} was confirmed and never stored", message_id)
                continue
            for label in expected.readers.get(channels[0].name, []):
                if label in expected.late and label not in self._heard[message_id]:
                    continue
                if self.messages[message_id].type in expected.types[label] and (label, message_id) not in self._ended:
                    self._violated(
                        "nothing lost", f"{label} never came to an end with {self.name(message_id)}", message_id
                    )
        for message_id in sorted(unsent):
            self._violated("outbox empty", f"{self.name(message_id)} is still in an outbox", message_id)
        for message_id in sorted(set(self.stored) - self._staged):
            self._violated(
                "nothing invented", f"{self.name(message_id)} left, and what published it did not commit", message_id
            )
        if not allow_dead:
            for label, message_id, reason in self.dead:
                self._violated("no dead letters", f"{label} set {self.name(message_id)} aside: {reason}", message_id)

    def summary(self) -> dict[str, Any]:
        """Return figures for people."""
        ends = list(self._ended.values())
        return {"stored": sum(map(len, self.stored.values())), "handled": ends.count("handled"), "dead": len(self.dead)}
