"""One subscription at work: stopping in the middle."""

import asyncio

from tests.unit.rig import until
from trunkline import App, Service, Stream, Struct

steps = Stream("consumer-steps", key="lane")


@steps.event
class Step(Struct):
    lane: str
    number: int


async def test_what_is_admitted_while_it_drains_is_left_with_what_waited_before_it(tmp_path):
    url, service, handled, free = f"sqlite:///{tmp_path}/drain.db", Service("stepper"), [], asyncio.Event()

    @service.handle
    async def handle(step: Step) -> None:
        if step.number == 0:
            await free.wait()
        handled.append(step.number)

    app = App(service, url)
    await app.start()
    (consumer,) = app._consumers
    await app.publish_all([Step("a", 0), Step("a", 1)])
    await until(lambda: consumer.lanes.waiting == 1)
    # Received before the stop, and looked up in the store while it begins.
    batch = []
    admit = consumer._admit

    async def admit_late(received):
        batch.extend(received)

    consumer._admit = admit_late
    await app.publish(Step("a", 2))
    await until(lambda: batch)
    stopping = asyncio.create_task(app.stop())
    await until(lambda: consumer._draining)
    await admit(batch)
    free.set()
    await stopping
    assert handled == [0]
    async with App(service, url):
        await until(lambda: len(handled) == 3)
    assert handled == [0, 1, 2]
