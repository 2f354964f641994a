"""The conformance suite finds what is wrong with a transport, and says what does not apply."""

import asyncio
import itertools

import msgspec
import pytest

from trunkline import App, Service
from trunkline.testing import Entry, Kind
from trunkline.testing.conformance import Bench, Controls, cases, result_of
from trunkline.testing.conformance import __main__ as command_line
from trunkline.testing.conformance import registry as registry_module
from trunkline.testing.conformance.secret import Secret
from trunkline.testing.effects import EffectTable
from trunkline.transport import Backlog, Staged, parse_address
from trunkline.transports.memory import MemoryTransport, Reader

CASES = {case.name: case for case in cases()}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr("trunkline.testing.conformance.bench.DEADLINE_S", 0.4)


async def outcome(name, tmp_path):
    return await result_of(CASES[name], Bench("memory:", folder=tmp_path, lease_s=0.05))


async def test_a_good_transport_passes(tmp_path):
    assert (await outcome("pub_confirm_then_visible", tmp_path)).outcome == "passed"


def spoil(monkeypatch, change):
    """Have the transport carry what `change(self, batch)` makes of each batch."""
    carry = MemoryTransport.send

    def send(self, batch):
        return carry(self, change(self, list(batch)))

    monkeypatch.setattr(MemoryTransport, "send", send)
    monkeypatch.setattr(MemoryTransport, "place", send)


def drop_every_seventh(monkeypatch):
    count = itertools.count(1)
    spoil(monkeypatch, lambda _self, batch: [one for one in batch if next(count) % 7])


def send_backwards(monkeypatch):
    spoil(monkeypatch, lambda _self, batch: batch[::-1])


def mix_channels(monkeypatch):
    def everywhere(self, batch):
        channels = {reader.subscription.channel.name: reader.subscription.channel for reader in self.readers.values()}
        return [Staged(channel, staged.message) for staged in batch for channel in channels.values()]

    spoil(monkeypatch, everywhere)


def renamed(staged):
    return Staged(staged.channel, msgspec.structs.replace(staged.message, id=f"{staged.message.id}-2"))


def deliver_twice(monkeypatch):
    # Under a new id, so that no inbox absorbs it.
    spoil(monkeypatch, lambda _self, batch: [*batch, *map(renamed, batch)])


def forget_priority(monkeypatch):
    monkeypatch.setattr("trunkline.transports.memory.PriorityReader", Reader)


def lose_attributes(monkeypatch):
    def plain(_self, batch):
        return [Staged(one.channel, msgspec.structs.replace(one.message, extensions=None)) for one in batch]

    spoil(monkeypatch, plain)


async def still_one():
    return Backlog(1)


def never_settle(monkeypatch):
    monkeypatch.setattr(MemoryTransport, "backlog", lambda _self, _subscription: still_one())


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (drop_every_seventh, ["pub_confirm_then_visible"]),
        (drop_every_seventh, ["pub_batch_whole", "topic_isolated", "key_order_one_consumer"]),
        (send_backwards, ["key_order_one_consumer", "key_order_after_nack"]),
        (deliver_twice, ["pub_batch_whole", "fanout_each_subscription_once", "concurrent_publishers_none_missing"]),
        (mix_channels, ["topic_isolated", "pub_many_channels"]),
        (forget_priority, ["priority_order"]),
        (lose_attributes, ["headers_bytes_unicode_roundtrip"]),
        (never_settle, ["ack_removes", "nack_requeues", "ttl_expires"]),
    ],
)
async def test_a_fault_is_found(fault, names, tmp_path, monkeypatch):
    fault(monkeypatch)
    results = await asyncio.gather(*(outcome(name, tmp_path) for name in names))
    assert [result.outcome for result in results] == ["failed"] * len(results), results
    assert all(result.note for result in results)


async def test_what_does_not_apply_says_why(tmp_path):
    result = await outcome("crash_before_effect", tmp_path)
    assert result.outcome == "n/a"
    assert result.note == "durable: the transport keeps nothing beyond the process"


@pytest.mark.parametrize(
    ("url", "given", "able"),
    [
        ("amqp://u:p@host", {}, {"name"}),
        ("kafka://u:p@host", {}, set()),
        ("kafka://host", {"name": "broker.test", "rotate": print}, {"name"}),
        ("kafka://u:p@host", {"rotate": print}, {"rotate"}),
    ],
)
def test_names_and_passwords_change_where_the_bench_was_told_how(url, given, able, tmp_path):
    bench = Bench(url, "memory:", folder=tmp_path, controls=Controls(**given))
    assert {need for need in ("name", "rotate") if bench.can(need)} == able


async def test_a_secret_is_in_no_url_and_the_broker_takes_the_first_one_again_at_the_end():
    taken = []

    async def rotate(password):
        taken.append(password)

    secret = Secret("amqp://shop:first%21@host:1/v?prefix=a", rotate, "c1")
    assert secret.url == "amqp://shop:${TRUNKLINE_C1}@host:1/v?prefix=a"
    address = parse_address(secret.url)
    passwords = [address.password]
    await secret.change()
    passwords.append(address.password)
    await secret.tell()
    passwords.append(address.password)
    await secret.change()
    await secret.restore()
    await secret.end()
    assert passwords == ["first!", "first!", "first!-1"]
    assert taken == ["first!-1", "first!-2", "first!-1", "first!"]


def test_every_case_says_what_it_shows_and_only_needs_what_is_explained():
    for case in cases():
        assert case.guarantee.endswith("."), case.name
        assert case.group in {"core", "order", "failure", "load"}
        assert set(case.needs) <= set(registry_module.NEEDS)


@pytest.mark.parametrize("columns", ["20", "80"])
def test_the_list_has_every_name_whole_however_narrow_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.argv", ["conformance", "memory:", "--list"])
    assert command_line.main() == 0
    assert set(CASES) <= set(capsys.readouterr().out.split())


def test_a_need_that_nobody_explains_is_refused():
    with pytest.raises(ValueError, match="a case cannot need luck"):
        registry_module.Group("core").case("luck")


def test_two_cases_of_one_name_are_refused():
    async def ack_removes(_bench):
        """Be in the way."""

    with pytest.raises(ValueError, match="two cases are called ack_removes"):
        registry_module.Group("core").case()(ack_removes)


async def test_types_of_a_case_are_forgotten_at_its_end(tmp_path):
    from trunkline.channel import message_types

    before = message_types()
    async with Bench("memory:", folder=tmp_path) as bench:
        bench.line("topic")
        assert len(message_types()) == len(before) + 1
    assert message_types() == before


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("memory:", "memory:"),
        ("amqp://u:p@host:1/v", "amqp://u:p@host:1/v?prefix=TAG"),
        ("nats://host?lease_s=2&prefix=a", "nats://host?lease_s=2&prefix=aTAG"),
    ],
)
def test_each_bench_has_a_place_of_its_own(url, wanted, tmp_path):
    bench = Bench("memory:", folder=tmp_path)
    assert bench._isolated(url) == wanted.replace("TAG", bench.tag)


async def test_effects_are_read_from_a_file_named_relatively_or_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite:///here.db", f"sqlite:///{tmp_path}/there.db"):
        table = EffectTable(url, "effect_x")
        assert await table.read() == []
        service = Service("writer")
        service.schema(table.schema)
        async with App(service, url) as app, app.running(service).unit_of_work() as ctx:
            await table.add(await ctx.transaction(), "p", "a", 1, 7)
        assert await table.read() == [Entry(Kind.EFFECT, "p", "a", 1)]
