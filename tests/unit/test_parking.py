"""Parked keys as a process keeps them."""

from tests.unit.rig import until
from trunkline import Retry, Service, Stream, Struct

ONCE = Retry(immediate=0, delays_s=())


async def test_many_redriven_at_once_do_not_have_all_keys_loaded_again_for_each(rig, clock):
    orders = Stream("parking-orders", key="number")
    service, done, away, loaded = Service("worker"), [], True, []

    @orders.event
    class Order(Struct):
        number: int

    @service.handle(retry=ONCE)
    async def work(order: Order) -> None:
        if away:
            raise ConnectionError("away")
        done.append(order.number)

    async with rig.run(service) as app:
        await app.publish_all([Order(number) for number in range(30)])
        letters = await rig.buried(30)
        await rig.idle()
        away, load = False, app.store.load_parked

        async def slowly(*given):
            loaded.append(clock.now())
            await load(*given)
            await clock.advance(0.05)

        app.store.load_parked = slowly
        for letter in letters[:20]:
            await app.store.redrive(letter.number)
        await until(lambda: len(done) == 20)
        await app.store.discard_dead_letter(letters[20].number)
        await rig.idle()
        assert len(loaded) == 1
        await clock.advance(0.5)
        await until(lambda: len(loaded) == 2)
