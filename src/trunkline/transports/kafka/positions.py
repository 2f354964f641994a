"""Positions of deliveries: which partition they are in, and for which of the topics that had one name they stand.

Never does: I/O. Read next: reader.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trunkline.transport import Delivery

SHIFT = 40
"""Bits of the offset in the position of a Queue's or Topic's delivery; the partition stands above them."""


def number_of(delivery: Delivery) -> int:
    """Return the number of the partition of a delivery, of whatever channel."""
    return delivery.position >> SHIFT if delivery.partition < 0 else delivery.partition


def by_partition(deliveries: Sequence[Delivery]) -> list[tuple[int, list[int]]]:
    """Return (partition, positions) of runs of deliveries of one partition."""
    runs: list[tuple[int, list[int]]] = []
    last = -1
    positions: list[int] = []
    for delivery in deliveries:
        position, number = delivery.position, delivery.partition
        if number < 0:
            number = position >> SHIFT
        if number != last:
            last, positions = number, []
            runs.append((number, positions))
        positions.append(position)
    return runs


class Late:
    """What was under way when its topic was made anew: settled, it stands for no record of the new one at its place."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Delivery | None] = {}

    def __bool__(self) -> bool:
        """Return whether there is any."""
        return bool(self._known)

    def add(self, partition: int, positions: Iterable[int]) -> None:
        """Note the places of what is under way; `partition` as of its deliveries."""
        self._known |= {(partition, position): None for position in positions}

    def taken(self, deliveries: Iterable[Delivery]) -> None:
        """Note what is handed out: at a place that is known it is of the new topic."""
        for delivery in deliveries:
            place = delivery.partition, delivery.position
            if place in self._known:
                self._known[place] = delivery

    def without(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Return those of `deliveries`, now settled, that are not late."""
        found = []
        for delivery in deliveries:
            place = delivery.partition, delivery.position
            if self._known.get(place, delivery) is delivery:
                self._known.pop(place, None)
                found.append(delivery)
        return found
