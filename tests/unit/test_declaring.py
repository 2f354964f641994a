"""Channels are declared where they are used: at start those of the App, others at their first message."""

import asyncio

import pytest

from trunkline import App, Queue, Service, Stream, Struct, Topic
from trunkline.clock import system_clock
from trunkline.declaring import Declaring
from trunkline.errors import ConfigurationError, TransportError
from trunkline.handler import make_message

mine = Queue("declaring-mine")
given = Topic("declaring-given")
imported = Stream("declaring-imported")


@mine.command
class Mine(Struct):
    number: int


@given.event
class Given(Struct):
    number: int


@imported.event
class Imported(Struct):
    number: int


def staged(number):
    return make_message(Imported(number), system_clock, "test", None, None, None, {})


async def test_an_app_declares_at_start_what_its_handlers_read_and_publish_and_nothing_else(monkeypatch):
    service = Service("declares")

    @service.handle
    async def on_mine(message: Mine) -> Given:
        return Given(message.number)

    app = App(service, "memory:")
    declared = []
    start = app.transport.start

    async def noted(channels, subscriptions):
        declared.extend(channel.name for channel in channels)
        await start(channels, subscriptions)

    monkeypatch.setattr(app.transport, "start", noted)
    async with app:
        await app.publish(Imported(1))
    assert sorted(declared) == ["declaring-given", "declaring-mine"]


class Broker:
    """Declares when it is let, sends at once."""

    def __init__(self):
        self.open = asyncio.Event()
        self.declared, self.sent = [], []
        self.error = None
        self.declaring = Declaring(self.declare, self.send)

    async def declare(self, channels):
        await self.open.wait()
        if self.error is not None:
            raise self.error
        self.declared += [channel.name for channel in channels]

    def send(self, batch):
        self.sent += [staged.message.data for staged in batch]
        return asyncio.sleep(0)


async def test_messages_leave_in_the_order_given_while_a_channel_is_declared():
    broker = Broker()
    wanted = [staged(number) for number in range(4)]
    sends = [asyncio.ensure_future(broker.declaring.send([one])) for one in wanted[:3]]
    await asyncio.sleep(0)
    assert not broker.sent
    broker.open.set()
    while not broker.declared:
        await asyncio.sleep(0)
    sends.append(asyncio.ensure_future(broker.declaring.send([wanted[3]])))
    await asyncio.gather(*sends)
    assert broker.sent == [one.message.data for one in wanted]
    assert broker.declared == ["declaring-imported"]


async def test_a_send_that_is_given_up_holds_nobody_back():
    broker = Broker()
    first = broker.declaring.send([staged(1)])
    first.cancel()
    second = asyncio.ensure_future(broker.declaring.send([staged(2)]))
    broker.open.set()
    await second
    assert len(broker.sent) == 1
    third = broker.declaring.send([staged(3)])
    assert len(broker.sent) == 2, "nothing is declared any more: it is sent at once"
    await third


async def test_what_waits_for_its_channel_is_refused_when_the_connection_ends():
    broker = Broker()
    sends = [asyncio.ensure_future(broker.declaring.send([staged(number)])) for number in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    broker.declaring.stop()
    ends = await asyncio.gather(*sends, return_exceptions=True)
    assert [end.code for end in ends] == ["E520", "E520"]
    assert [len(end.unsent) for end in ends] == [1, 1]
    broker.declaring.start([imported])
    await broker.declaring.send([staged(3)])
    assert len(broker.sent) == 1


async def test_what_comes_after_the_end_is_refused_at_once():
    broker = Broker()
    broker.declaring.start([imported])
    late = staged(1)
    broker.declaring.stop()
    with pytest.raises(TransportError, match=r"E520 .*after the stop") as caught:
        await broker.declaring.send([late])
    assert caught.value.unsent == [late]
    assert not broker.sent


@pytest.mark.parametrize(
    "error", [TransportError("E520", "away", "wait"), ConfigurationError("E207", "other", "rename")]
)
async def test_what_cannot_be_declared_is_not_sent_and_tried_again_with_the_next(error):
    broker = Broker()
    broker.open.set()
    broker.error = error
    one = staged(1)
    with pytest.raises(type(error)) as refused:
        await broker.declaring.send([one])
    if isinstance(error, TransportError):
        assert refused.value.unsent == [one]
    broker.error = None
    await broker.declaring.send([staged(2)])
    assert len(broker.sent) == 1
