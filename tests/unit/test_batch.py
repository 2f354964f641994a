"""Batches: what one message does to the others of its call."""

from tests.unit.rig import until
from trunkline import Batch, Context, Message, Queue, Retry, Service, Stream, Struct

CHILDREN = (
    "CREATE TABLE IF NOT EXISTS parent (id INTEGER PRIMARY KEY)",
    "CREATE TABLE IF NOT EXISTS child (parent INTEGER REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)",
)
ONCE = Retry(immediate=0, delays_s=())


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


async def test_a_message_that_breaks_a_constraint_at_the_commit_of_its_batch_is_set_aside_alone(rig):
    births = Queue("batch-births")
    service, sizes = Service("registry"), []
    service.schema(*CHILDREN)

    @births.command
    class Birth(Struct):
        parent: int | None

    @service.handle(batch=Batch(size=10, wait_s=3600), retry=ONCE)
    async def enter(batch: list[Birth], ctx: Context) -> None:
        sizes.append(len(batch))
        tx = await ctx.transaction()
        for birth in batch:
            await tx.execute("INSERT INTO child VALUES (?)", (birth.parent,))

    async with rig.run(service) as app:
        await app.publish_all([Birth(99 if number == 5 else None) for number in range(10)])
        await rig.pass_time(lambda: len(sizes) == 11)
        (letter,) = await rig.buried()
        await rig.idle()
        assert "foreign key" in letter.reason.lower()
        assert rig.query("SELECT count(*) FROM child") == [(9,)]
    assert sizes == [10] + [1] * 10


async def test_what_a_commit_breaks_is_tried_again_as_its_own_handler_says(rig):
    births = Queue("own-births")
    service = Service("registry")
    service.schema(*CHILDREN)

    @births.command
    class Wedding(Struct): ...

    @births.command
    class Birth(Struct): ...

    @service.handle(retry=Retry(immediate=0, delays_s=(60.0,)))
    async def marry(wedding: Wedding) -> None: ...

    @service.handle(retry=ONCE)
    async def enter(birth: Birth, ctx: Context) -> None:
        tx = await ctx.transaction()
        await tx.execute("INSERT INTO child VALUES (99)")

    async with rig.run(service) as app:
        await app.publish(Birth())
        (letter,) = await rig.buried()
        assert "foreign key" in letter.reason.lower()


async def test_a_batch_that_runs_while_the_commit_before_it_fails_stays_behind_it(rig):
    births = Stream("batch-order", key="mother")
    service = Service("registry")
    service.schema(*CHILDREN, "CREATE TABLE IF NOT EXISTS effect (place INTEGER, number INTEGER)")

    @births.event
    class Birth(Struct):
        mother: str
        number: int

    @service.handle(batch=Batch(size=2), retry=Retry(immediate=0, delays_s=(1.0,), jitter=0))
    async def enter(batch: list[Birth], ctx: Context) -> None:
        tx = await ctx.transaction()
        for birth in batch:
            await tx.execute("INSERT INTO effect VALUES ((SELECT count(*) FROM effect), ?)", (birth.number,))
            if birth.number == ctx.attempt == 0:
                await tx.execute("INSERT INTO child VALUES (99)")

    async with rig.run(service) as app:
        await app.publish_all([Birth("a", number) for number in range(6)])
        await rig.pass_time(lambda: rig.query("SELECT count(*) FROM effect") == [(6,)])
        assert rig.query("SELECT number FROM effect ORDER BY place") == [(number,) for number in range(6)]
