"""A channel with one type, whose messages a ledger can follow.

Invariant: two processes that make a Line of the same Spec can send each other messages. Read next: worker.py.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from trunkline.channel import Channel, Queue, Stream, Topic, declared_types


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a channel is, as text that can be given to another process.

    Attributes:
        partitions: of a Stream.
        priority: of a Queue.
        plain: see Channel.
    """

    kind: Literal["queue", "topic", "stream"]
    name: str
    partitions: int = 4
    priority: bool = False
    plain: str | None = None

    def channel(self) -> Channel:
        """Return a new channel."""
        if self.kind == "queue":
            return Queue(self.name, plain=self.plain, priority=self.priority)
        if self.kind == "topic":
            return Topic(self.name, plain=self.plain)
        return Stream(self.name, key="key", plain=self.plain, partitions=self.partitions)


_FIELDS: list[Any] = [("producer", str), ("key", str), ("seq", int), ("text", str, "")]


class Line:
    """A channel and the type declared on it: producer, key and number, as in the ledger, and some text.

    Args:
        type: CloudEvents type.
    """

    def __init__(self, spec: Spec, type: str = "numbered") -> None:  # noqa: A002 - the CloudEvents attribute's name
        self.spec = spec
        self.name = spec.name
        self.channel = spec.channel()
        self.type: Any = msgspec.defstruct("Numbered", _FIELDS, frozen=True)
        declare = self.channel.command if isinstance(self.channel, Queue) else self.channel.event  # type: ignore[attr-defined]
        declare(type=type)(self.type)

    def message(self, seq: int, key: str = "a", *, producer: str = "p", text: str = "") -> Any:
        """Return a payload."""
        return self.type(producer, key, seq, text)

    def messages(self, count: int, keys: int = 1, *, producer: str = "p", text: str = "") -> list[Any]:
        """Return `count` payloads, numbered from 1 in each of `keys` keys, the keys in turn."""
        return [
            self.message(number // keys + 1, f"key{number % keys}", producer=producer, text=text)
            for number in range(count)
        ]

    def forget(self) -> None:
        """Take the declaration back, so that Apps started later do not declare the channel."""
        declared_types.pop(self.type, None)
