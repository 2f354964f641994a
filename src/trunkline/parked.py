"""Parked messages in the memory of one process, for stores that keep nothing on disk.

Invariant: of a key only its first message is handed out, the oldest position first.
Read next: parking.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from trunkline.transport import Delivery, Subscription


class _Parked(msgspec.Struct):
    number: int
    delivery: Delivery
    due: float
    taken: object = None


class ParkedMessages:
    """The parked messages of several subscriptions.

    Args:
        number: gives the next row number.
    """

    def __init__(self, number: Callable[[], int]) -> None:
        self._number = number
        self._rows: dict[str, dict[int, _Parked]] = {}

    def add_subscription(self, subscription: Subscription) -> None:
        """Begin with an empty list, unless there is one."""
        self._rows.setdefault(subscription.label, {})

    def park(self, delivery: Delivery, due: float) -> None:
        """Keep a copy of `delivery` until `due`."""
        number = self._number()
        copy = Delivery(
            delivery.subscription, delivery.message, delivery.raw, delivery.key, delivery.position, delivery.partition,
            delivery.attempt, number,
        )  # fmt: skip
        self._rows[delivery.subscription.label][number] = _Parked(number, copy, due)

    def remove(self, delivery: Delivery) -> None:
        """Forget a parked delivery that has come to its end."""
        self._rows[delivery.subscription.label].pop(delivery.row, None)

    def give_back(self, taker: object) -> None:
        """Let what was handed to `taker` run again: it is gone."""
        for rows in self._rows.values():
            for item in rows.values():
                if item.taken is taker:
                    item.taken = None

    def of(self, label: str) -> Iterator[Delivery]:
        """Return the parked deliveries of one subscription."""
        return (item.delivery for item in self._rows[label].values())

    def count(self) -> int:
        """Return how many are parked."""
        return sum(map(len, self._rows.values()))

    def forget_lost(self, label: str, owns: Callable[[int], bool]) -> None:
        """Forget what another process is responsible for now."""
        rows = self._rows[label]
        for number in [n for n, item in rows.items() if item.delivery.partition >= 0]:
            if not owns(rows[number].delivery.partition):
                del rows[number]

    def due(
        self, label: str, now: float, limit: int, blocked: Callable[[Delivery], bool], taker: object = ""
    ) -> tuple[list[Delivery], float | None]:
        """Return what may run now and when the next is due.

        Args:
            blocked: whether the key of a delivery is held, being run, or another process's.
            taker: to whom they are handed; see `give_back`.
        """
        heads: dict[Any, _Parked] = {}
        for item in self._rows[label].values():
            delivery = item.delivery
            if delivery.partition < 0 or delivery.key is None:
                if item.taken is None:
                    heads[item.number] = item
                continue
            if blocked(delivery):
                continue
            first = heads.get(delivery.key)
            if first is None or (delivery.position, item.number) < (first.delivery.position, first.number):
                heads[delivery.key] = item
        ready = sorted((item for item in heads.values() if item.due <= now), key=lambda item: item.due)[:limit]
        for item in ready:
            item.taken = taker
        waiting = [item.due for item in heads.values() if item not in ready]
        return [item.delivery for item in ready], min(waiting, default=None)
