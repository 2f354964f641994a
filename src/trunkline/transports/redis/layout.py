"""How channels lie in Redis: names of keys, ids of entries, fields of an entry.

Invariant: all keys of a channel share a hash tag, so that one script can touch them.
Read next: scripts.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from trunkline.channel import Channel, Queue, Stream
from trunkline.errors import DecodeError
from trunkline.message import Message
from trunkline.transport import Subscription
from trunkline.wire import Plain, decode, header_text, why_unread

FIELD = b"e"
"""The one field of an entry that Trunkline writes: a CloudEvent in its JSON format."""
BODIES = ("data", "body")
"""Fields of other programs' entries that are taken for the body; else the first field is."""
QUEUE_GROUP = "receivers"
"""The one group of a Queue."""
FREE = "given-back"
"""The consumer that holds what a process gave back unfinished, for any other to take."""

SEQUENCE_BITS = 21
"""An entry's id, milliseconds and a sequence number, as one number of 63 bits: until the year 2109."""
_MAX_SEQUENCE = 1 << SEQUENCE_BITS
_MASK = _MAX_SEQUENCE - 1
MAX_POSITION = (1 << 63) - 1

Fields = Sequence[bytes]
Entry = tuple[bytes, Fields | None]


class Names:
    """The keys of one channel."""

    def __init__(self, prefix: str, channel: Channel) -> None:
        self._base = f"{prefix}:{{{channel.name}}}"
        self.settings = self._key("settings")
        count = channel.partitions if isinstance(channel, Stream) else 0
        self.streams = [self._key(str(number)) for number in range(count)] or [self._key("log")]

    def _key(self, *parts: str) -> bytes:
        return ":".join((self._base, *parts)).encode()

    def members(self, name: str) -> bytes:
        """Return who reads a Stream for a subscription: a sorted set, by the end of their lease."""
        return self._key("members", name)

    def owners(self, name: str) -> bytes:
        """Return who reads which partition for a subscription: end of the lease and process."""
        return self._key("owners", name)

    def bounds(self, name: str) -> bytes:
        """Return up to where messages of each partition were handed out."""
        return self._key("bounds", name)


def group_of(subscription: Subscription) -> str:
    """Return the group that keeps how far a subscription is."""
    return QUEUE_GROUP if isinstance(subscription.channel, Queue) else subscription.name


def before_ms(moment_ms: int) -> str:
    """Return the last id that an entry of the millisecond before a moment may have."""
    return f"{moment_ms - 1}-{_MAX_SEQUENCE - 1}"


def position_of(entry_id: bytes) -> int:
    """Return the id of an entry as one number; of ids that do not fit several may share one."""
    ms, _, sequence = entry_id.partition(b"-")
    return ((int(ms) << SEQUENCE_BITS) + int(sequence)) & MAX_POSITION


class Positions:
    """The entries of one partition as rising numbers, and back.

    An id that does not fit, which only other programs or a clock set back by hours can make, gets the next free number.
    """

    def __init__(self) -> None:
        self._odd: dict[int, bytes] = {}
        self._last = -1

    def of(self, entry_id: bytes) -> int:
        """Return the position of the next entry; they are asked for in their order."""
        ms, _, sequence = entry_id.partition(b"-")
        number = int(sequence)
        position = (int(ms) << SEQUENCE_BITS) + number
        if number >= _MAX_SEQUENCE or not self._last < position <= MAX_POSITION:
            position = self._last + 1
            self._odd[position] = entry_id
        self._last = position
        return position

    def id_of(self, position: int) -> bytes:
        """Return the id of the entry at `position`."""
        return self._odd.get(position) or b"%d-%d" % (position >> SEQUENCE_BITS, position & _MASK)


def read_entry(
    stream: bytes, entry_id: bytes, fields: Fields, plain: str | None
) -> tuple[Message | None, bytes | None, tuple[str, str] | None]:
    """Return the message of an entry, or None, its bytes and why it is none that this channel takes.

    Args:
        plain: CloudEvents type of entries that are no events, or None.
    """
    if len(fields) == 2 and fields[0] == FIELD:  # noqa: PLR2004 - a name and a value
        body = fields[1]
        try:
            return decode(body, dict), None, None
        except DecodeError as error:
            return None, body, why_unread(error)
    found = {header_text(name): value for name, value in zip(fields[::2], fields[1::2], strict=False)}
    name = next((name for name in ("e", *BODIES) if name in found), next(iter(found), ""))
    body = found.pop(name, b"")
    ms = int(entry_id.partition(b"-")[0])
    source = stream.decode()
    identity = f"{source}/{entry_id.decode()}"
    taken = None if plain is None else Plain(plain, source, identity, min(ms / 1000, 253402300799.0))
    try:
        return decode(body, partial(_headers, found), taken), None, None
    except DecodeError as error:
        return None, body, why_unread(error)


def _headers(found: Mapping[str, bytes]) -> dict[str, str]:
    return {name: header_text(value) for name, value in found.items()}
