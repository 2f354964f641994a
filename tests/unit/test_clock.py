"""Ids are UUIDv7 that rise, also many in one millisecond, and from several threads."""

import uuid
from concurrent.futures import ThreadPoolExecutor

from trunkline.clock import Clock, ManualClock


def test_ids_of_one_millisecond_rise_and_are_uuids_of_version_7():
    for _ in range(20):  # each begins elsewhere in the table of last digits
        clock = ManualClock()
        ids = [clock.new_id() for _ in range(1000)]
        numbers = [uuid.UUID(text) for text in ids]
        assert [str(number) for number in numbers] == ids
        assert all(number.version == 7 and number.variant == uuid.RFC_4122 for number in numbers)
        first = numbers[0].int
        assert [number.int - first for number in numbers] == list(range(1000))


def test_threads_never_get_the_same_id():
    clock = Clock()
    with ThreadPoolExecutor(4) as threads:
        taken = list(threads.map(lambda _: [clock.new_id() for _ in range(5000)], range(4)))
    assert all(ids == sorted(ids) for ids in taken)
    assert len({text for ids in taken for text in ids}) == 20_000
