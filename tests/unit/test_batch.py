"""Batches: what one message does to the others of its call."""

from tests.unit.rig import until
from trunkline import Batch, Message, Service, Stream, Struct


def reading(key: str, celsius: str) -> Message:
    """Return a message as an older service wrote it."""
    data = f'{{"sensor": "{key}", "celsius": {celsius}}}'.encode()
    return Message(f"m-{key}", "reading", "elsewhere", data, 0.0, partitionkey=key)


async def test_a_message_of_a_batch_whose_upcaster_gives_no_json_is_set_aside_and_the_others_are_handled(rig):
    readings = Stream("batch-readings", key="sensor")
    service, seen = Service("archive"), []

    @readings.event(type="reading", version=2)
    class Reading(Struct):
        sensor: str
        celsius: float

    @readings.upcast(Reading, version=1)
    def _(old: dict) -> dict:
        return {**old, "celsius": object() if old["celsius"] is None else old["celsius"]}

    @service.handle(batch=Batch(size=10))
    async def keep(batch: list[Reading]) -> None:
        seen.extend(one.sensor for one in batch)

    async with rig.run(service):
        await rig.put("archive", reading("a", "1.0"), reading("b", "null"), reading("c", "2.0"))
        (letter,) = await rig.buried()
        await until(lambda: sorted(seen) == ["a", "c"])
        await rig.idle()
    assert (letter.code, letter.key) == ("E414", "b")
    assert "from version 1 failed: TypeError" in letter.reason


async def test_a_message_of_a_batch_whose_own_check_raises_is_set_aside_and_the_others_are_handled(rig):
    readings = Stream("batch-checked", key="sensor")
    service, seen, known = Service("archive"), [], {"a": 1, "c": 3}

    @readings.event(type="reading")
    class Reading(Struct):
        sensor: str

        def __post_init__(self) -> None:
            known[self.sensor]

    @service.handle(batch=Batch(size=10))
    async def keep(batch: list[Reading]) -> None:
        seen.extend(one.sensor for one in batch)

    async with rig.run(service):
        await rig.put("archive", *(reading(key, "1.0") for key in "abc"))
        (letter,) = await rig.buried()
        await until(lambda: sorted(seen) == ["a", "c"])
        await rig.idle()
    assert (letter.code, letter.key) == ("E412", "b")
