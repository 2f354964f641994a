"""A system's types as data and as drawings."""

import itertools
import re
from xml.etree import ElementTree as ET

import pytest

from trunkline import App, Message, Queue, Service, Stream, Struct, System
from trunkline.cli.drawing import to_svg
from trunkline.errors import DefinitionError, PublishError
from trunkline.topology import EVERY, Topology, describe, to_mermaid

orders = Stream("topology-orders", key="order_id")
jobs = Queue("topology-jobs")


@orders.event
class Placed(Struct):
    order_id: str


@orders.event
class Paid(Struct):
    order_id: str


@jobs.command
class Pack(Struct):
    order_id: str


@jobs.command
class Label(Struct):
    order_id: str


@pytest.fixture
def topology() -> Topology:
    payment, packing, audit = Service("payment"), Service("packing"), Service("audit")

    @payment.handle
    async def charge(order: Placed) -> Paid | Pack:
        raise AssertionError("a drawing runs no handler")

    @packing.handle(subscription="packers")
    async def pack(job: Pack) -> None: ...

    @audit.handle(from_=orders)
    async def note(message: Message) -> None: ...

    @audit.background
    async def site(running) -> None: ...

    return describe(System("shop", [payment, packing, audit]))


def test_it_knows_who_publishes_and_who_handles_each_type(topology):
    assert topology.ends("topology-orders", "paid") == (["payment"], ["audit"])
    assert topology.ends("topology-orders", "placed") == ([], ["payment", "audit"])
    assert topology.ends("topology-jobs", "pack") == (["payment"], ["packing"])


def test_it_knows_channels_subscriptions_and_background_tasks(topology):
    assert [(channel.name, channel.kind, channel.key) for channel in topology.channels] == [
        ("topology-orders", "stream", "order_id"),
        ("topology-jobs", "queue", None),
    ]
    assert {(link.service, link.subscription, link.message) for link in topology.handles} == {
        ("payment", "payment", "placed"),
        ("packing", "packers", "pack"),
        ("audit", "audit", EVERY),
    }
    assert [service.background[0].rpartition(".")[2] for service in topology.services if service.background] == ["site"]


@pytest.fixture
def site() -> Service:
    """A service whose background function publishes in both ways, what it declares and what not."""
    site = Service("site")

    @site.background(publishes=(Placed,))
    async def serve(running) -> None:
        await running.publish(Placed("1"))
        with pytest.raises(PublishError, match=r"E304 .*serve publishes Paid, .*background\(publishes=\(Paid,\)\)"):
            await running.publish(Paid("1"))
        async with running.unit_of_work() as ctx:
            ctx.publish(Placed("2"))
            with pytest.raises(PublishError, match=r"E304 .*background\(publishes=\(Paid,\)\)"):
                ctx.publish(Paid("2"))
        running.app._ended.set_result(None)

    return site


def test_what_a_background_task_declares_is_shown_in_every_format(site):
    packing = Service("packing")

    @packing.handle
    async def pack(order: Placed) -> None: ...

    found = describe(System("shop", [site, packing]))
    assert found.ends("topology-orders", "placed") == (["site"], ["packing"])
    assert '    s0 -- "placed" --> c0' in to_mermaid(found)
    drawn = to_svg(found)
    assert "(outside)" not in drawn
    assert ">site</text>" in drawn


async def test_a_background_task_that_says_what_it_publishes_may_publish_nothing_else(site):
    async with App(site, "memory:") as app:
        await app.ended()


async def test_a_background_task_that_says_nothing_may_publish_anything():
    site = Service("site")

    @site.background
    async def serve(running) -> None:
        await running.publish(Paid("1"))
        running.app._ended.set_result(None)

    async with App(site, "memory:") as app:
        await app.ended()


def test_a_background_task_cannot_declare_what_no_channel_knows():
    class Undeclared(Struct):
        name: str

    with pytest.raises(DefinitionError, match=r"E102 .*serve publishes Undeclared"):

        @Service("site").background(publishes=(Undeclared,))
        async def serve(running) -> None: ...


async def test_a_background_task_cannot_publish_to_a_second_channel_of_one_name():
    again = Stream("topology-orders")

    @again.event
    class Other(Struct):
        name: str

    site = Service("site")

    @site.handle
    async def charge(order: Placed) -> None: ...

    @site.background(publishes=(Other,))
    async def serve(running) -> None: ...

    with pytest.raises(DefinitionError, match="E109"):
        await App(site, "memory:").start()


def test_a_function_that_is_declared_several_times_publishes_each_type_once():
    mixed = Service("mixed")

    @mixed.handle(from_=orders, publishes=(Label,))
    @mixed.handle(from_=jobs, publishes=(Label,))
    async def note(message: Message) -> None: ...

    assert [link.message for link in describe(System("shop", [mixed])).publishes] == ["label"]


def test_mermaid_has_a_node_per_service_and_channel_and_messages_on_the_arrows(topology):
    drawn = to_mermaid(topology)
    assert drawn.startswith("flowchart LR\n")
    assert '    s0["payment"]' in drawn
    assert '    c1[["topology-jobs<br/><i>queue</i>"]]' in drawn
    assert '    s0 -- "paid" --> c0' in drawn
    assert '    c0 -- "every message" --> s2' in drawn


def test_the_svg_is_well_formed_self_contained_and_always_the_same(topology):
    drawn = to_svg(topology)
    assert drawn == to_svg(topology)
    root = ET.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"href|<script|url\((?!#)", drawn)


def test_no_label_of_the_svg_covers_another_or_leaves_the_sheet(topology):
    root = ET.fromstring(to_svg(topology))
    places = []
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        width = len(text.text or "") * 7.3
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        left = x - width / 2 if text.get("text-anchor") == "middle" else x
        places.append((left, y - 10, left + width, y + 3))
    for one, other in itertools.combinations(places, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)
    assert max(place[2] for place in places) <= float(root.attrib["width"])
    assert max(place[3] for place in places) <= float(root.attrib["height"])


def test_the_svg_shows_what_comes_from_outside(topology):
    assert "(outside)" in to_svg(topology)


def test_a_system_without_handlers_can_be_drawn():
    empty = describe(System("empty", [Service("idle")]))
    ET.fromstring(to_svg(empty))
    assert to_mermaid(empty) == 'flowchart LR\n    s0["idle"]\n'
