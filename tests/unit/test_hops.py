"""The hop budget: a reader can follow one delivery in few frames, files and folders."""

import asyncio
import sys
from pathlib import Path

import trunkline
from trunkline import App, Service, Stream, Struct
from trunkline.handler import make_message

PACKAGE = Path(trunkline.__file__).parent
FRAMES, FILES, FOLDERS = 6, 14, 5

orders = Stream("hop-orders", key="key")


@orders.event
class HopOrder(Struct):
    key: str


@orders.event
class HopDone(Struct):
    key: str


async def test_one_delivery_stays_within_the_hop_budget(tmp_path):
    service, depths, ended = Service("hops"), [], asyncio.Event()

    @service.handle
    async def work(order: HopOrder) -> HopDone:
        frame, own = sys._getframe(1), 0
        while frame is not None:
            own += Path(frame.f_code.co_filename).is_relative_to(PACKAGE)
            frame = frame.f_back
        depths.append(own)
        return HopDone(order.key)

    @service.handle
    async def end(done: HopDone) -> None:
        ended.set()

    files = set()

    def note(frame, event, _argument):
        if event == "call":
            name = Path(frame.f_code.co_filename)
            if name.is_relative_to(PACKAGE):
                files.add(name.relative_to(PACKAGE))

    async with App(service, f"sqlite:///{tmp_path}/hops.db") as app:
        await app.publish(HopOrder("warm"))
        async with asyncio.timeout(10):
            await ended.wait()
        ended.clear()
        # Made outside: what is counted begins at the transport.
        staged = make_message(HopOrder("counted"), app.clock, "test", None, None, None, {})
        sys.setprofile(note)
        try:
            await app.transport.send([staged])
            async with asyncio.timeout(10):
                await ended.wait()
        finally:
            sys.setprofile(None)
    listed = ", ".join(sorted(map(str, files)))
    assert max(depths) <= FRAMES, depths
    assert len(files) <= FILES, listed
    assert len({name.parent for name in files}) <= FOLDERS, listed
    assert {Path("delivery.py"), Path("engine.py"), Path("lanes.py")} <= files, "it did follow the delivery"
