"""Commands where messages and the state of services are not in one file: what is looked into, what is refused."""

import pytest

from tests.unit.rig import until
from trunkline import App, Retry, Service, Stream, Struct
from trunkline.cli.letters import StoreLetters
from trunkline.errors import ConfigurationError, DeadLetterError

pytestmark = pytest.mark.timeout(120)
NOWHERE = "redis://127.0.0.1:1"


def test_dead_letters_are_looked_for_in_the_store_alone(buried):
    listed = buried.json("dead", "list", "--transport", NOWHERE, "--store", "sqlite:///trunkline.db")
    assert [row["number"] for row in listed] == [1, 2, 3]
    parked = buried.json("parked", "--transport", NOWHERE, "--store", "sqlite:///trunkline.db")
    assert parked[0]["held_by"] == 3


def test_dead_letters_are_given_back_without_the_broker(buried_copy):
    places = ("--transport", NOWHERE, "--store", "sqlite:///trunkline.db")
    buried_copy.cli("dead", "edit", "1", "--data", '{"order_id": "a", "amount": 1}', *places)
    assert buried_copy.cli("dead", "redrive", "1", *places).out == "1 given back\n"
    assert buried_copy.cli("dead", "discard", "2", "--yes", *places).out == "1 dropped\n"
    assert [row["number"] for row in buried_copy.json("dead", "list", *places)] == [3]


@pytest.mark.parametrize("command", [("dead", "list"), ("parked",), ("outbox",), ("dead", "redrive", "1")])
def test_a_broker_without_a_store_says_what_is_missing(project, command):
    shown = project.cli(*command, "--transport", NOWHERE, code=2).err
    assert shown.startswith("E243 redis://127.0.0.1:1 carries messages, but keeps no state of a service")
    assert "postgresql://… for more, or none:" in shown


def test_a_run_without_a_store_says_what_is_missing(project):
    assert "E243" in project.cli("run", "shop:system", "--transport", NOWHERE, code=2).err


@pytest.mark.parametrize(("store", "word"), [("none:", "keeps nothing"), ("memory:", "from outside")])
def test_a_store_that_nobody_else_can_look_into_is_refused(project, store, word):
    shown = project.cli("dead", "list", "--transport", NOWHERE, "--store", store, code=2).err
    assert "E230" in shown
    assert word in shown


def test_none_says_where_dead_letters_are_instead(project):
    assert "tail NAME.dead-letters" in project.cli("dead", "list", "-t", NOWHERE, "-s", "none:", code=2).err


def test_a_message_for_later_needs_a_store(used):
    shown = used.cli(
        "publish", "shop:system", "Headline", '{"text": "a"}', "--at", "+1h", "--store", "none:", code=1
    ).err
    assert "E312" in shown


def test_a_message_for_now_needs_no_store(used):
    used.cli("publish", "shop:system", "Headline", '{"text": "a"}', "--store", "none:")


@pytest.mark.parametrize(
    "command", [("publish", "shop:system", "Headline", '{"text": "a"}'), ("tail", "news", "shop:system")]
)
def test_memory_of_another_process_is_refused(project, command):
    assert "E230" in project.cli(*command, "--transport", "memory:", code=2).err


def test_a_channel_of_a_broker_is_named_by_the_system(project):
    assert "E210" in project.cli("tail", "news", "--transport", NOWHERE, code=2).err
    shown = project.cli("tail", "nope", "shop:system", "--transport", NOWHERE, code=2).err
    assert "E233" in shown
    assert "payment.dead-letters" in shown


def test_the_doctor_says_what_a_transport_cannot_keep(project):
    report = project.cli("doctor", "shop:system", "-t", f"{NOWHERE}?timeout_s=1", "-s", "sqlite:///a.db", code=1).out
    assert "E116" in report


def test_the_doctor_says_what_is_missing_without_a_store(project):
    report = project.cli("doctor", "shop:system", "-t", f"{NOWHERE}?timeout_s=1", "-s", "none:", code=1).out
    assert "E117" in report
    assert "no inbox: a message may have its effects twice" in report
    assert "at least once: effects may happen twice" in report


def test_the_doctor_says_what_waits_in_a_file_that_was_the_transport(project):
    with project.running("shop:system"):
        pass
    project.cli("publish", "shop:system", "Headline", '{"text": "a"}')
    places = ("-t", f"{NOWHERE}?timeout_s=1", "-s", "sqlite:///trunkline.db")
    shown = project.cli("doctor", "shop:system", *places, code=1).out
    assert "trunkline.db still holds 1 message of its own transport: shipping@news 1" in shown
    assert "left over" not in project.cli("doctor", "shop:system").out


orders = Stream("letters-orders", key="order_id")


@orders.event
class Refused(Struct):
    order_id: str


async def test_any_store_is_read_through_its_contract():
    service = Service("letters")

    @service.handle(retry=Retry(immediate=0, delays_s=()))
    async def refuse(order: Refused) -> None:
        raise ValueError(order.order_id)

    async with App(service, "memory:") as app:
        await app.publish_all([Refused("a"), Refused("b")])
        await until(lambda: _both(app))
        letters = StoreLetters(app.store, "memory:")
        numbers = await letters.dead_letter_numbers("letters", "refused")
        assert len(numbers) == 2
        assert (await letters.dead_letter(numbers[0])).number == numbers[0]
        assert await letters.dead_letters("nobody") == []
        assert len(await letters.dead_letters(limit=1)) == 1
        assert (await letters.set_aside())["letters@letters-orders"].dead == 2
        with pytest.raises(DeadLetterError, match="E601"):
            await letters.dead_letter(99)
        with pytest.raises(ConfigurationError, match=r"trunkline\.inspectors"):
            await letters.parked(None, None, 1)
        with pytest.raises(ConfigurationError, match="does not list its outbox"):
            await letters.outbox(None, None, 1)


async def _both(app: App) -> bool:
    return len(await app.store.dead_letters()) == 2
