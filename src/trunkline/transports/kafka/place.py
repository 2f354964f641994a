"""How far a group has read a partition, and what it notes beside each offset that it commits.

Invariant: an offset counts for the topic that it was committed for, not for one that was made anew under its name.
Never does: I/O. Read next: reader.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from confluent_kafka import OFFSET_BEGINNING, OFFSET_INVALID, OFFSET_STORED, KafkaError, TopicPartition

CLEAN, OPEN = "trunkline clean", "trunkline open"
"""Metadata of a committed offset: nothing was under way behind it, or something may have been."""
FIRST, STORED = OFFSET_BEGINNING, OFFSET_STORED
"""In place of an offset: the first record, or what is committed, which the client looks up."""
_TOPIC = " in "


class Place:
    """A partition as the thread sees it.

    Attributes:
        suspects: so many of the next records are suspects.
        until: from this offset on none is.
        committed: up to where is committed, negative if nothing is known.
    """

    __slots__ = ("committed", "suspects", "until")

    def __init__(self, committed: int, suspects: int, until: int) -> None:
        self.committed = committed
        self.suspects = suspects
        self.until = until


def answered(places: Mapping[int, Place], error: KafkaError | None, asked: Sequence[TopicPartition]) -> None:
    """Have committed again what a group has refused, as it does while it rebalances.

    Nothing else would, before more of the partition is settled.
    """
    for one in asked:
        place = places.get(one.partition)
        if (error or one.error) and place is not None and place.committed == one.offset:
            place.committed = one.offset - 1


def metadata(how: str, topic_id: str) -> str:
    """Return what is noted beside an offset.

    Args:
        how: CLEAN or OPEN.
        topic_id: which topic of its name it is for, or nothing where that is not known.

    >>> is_clean(metadata(CLEAN, "x")), is_clean(metadata(OPEN, "x"))
    (True, False)
    """
    return f"{how}{_TOPIC}{topic_id}" if topic_id else how


def is_clean(noted: str | None) -> bool:
    """Return whether nothing was under way behind an offset."""
    return (noted or "").partition(_TOPIC)[0] == CLEAN


def begin_of(committed: TopicPartition, topic_id: str) -> int:
    """Return where to begin: where was committed, or FIRST if nothing was, or for another topic of this name."""
    noted = (committed.metadata or "").partition(_TOPIC)[2]
    if committed.offset == OFFSET_INVALID or (noted and topic_id and noted != topic_id):
        return FIRST
    return committed.offset
