"""The connection to a broker: made, watched, made again."""

import asyncio
import re

import pytest

from trunkline.errors import ConfigurationError, TransportError
from trunkline.link import Link, Options
from trunkline.transport import parse_address


class Broker:
    """Refuses as often as it is told to."""

    def __init__(self) -> None:
        self.answers: list[Exception] = []
        self.connections = 0

    async def connect(self) -> None:
        if self.answers:
            raise self.answers.pop(0)
        self.connections += 1


DOWN = TransportError("E520", "connection refused")


async def test_it_tries_again_until_the_broker_answers(clock):
    broker = Broker()
    broker.answers = [DOWN, DOWN]
    starting = asyncio.create_task((link := Link("x://host", clock, broker.connect)).start(30))
    await asyncio.sleep(0)
    assert not link.is_up
    await clock.advance(1)
    await starting
    assert link.is_up
    await link.stop()


async def test_a_refusal_at_start_is_told_at_once(clock):
    broker = Broker()
    broker.answers = [ConfigurationError("E244", "wrong password")]
    with pytest.raises(ConfigurationError, match="E244"):
        await Link("x://host", clock, broker.connect).start(30)


async def test_a_limit_of_time_that_ended_the_connection_is_told_as_such(clock, caplog):
    link = Link("x://host", clock, Broker().connect)
    await link.start(30)
    link.lost(TimeoutError())
    assert "x://host: connection lost: no answer in time" in caplog.text
    await link.stop()


async def test_an_attempt_that_hears_nothing_is_given_up_and_made_anew(clock, monkeypatch):
    monkeypatch.setattr("trunkline.link.ATTEMPT_S", 0.02)
    attempts = []

    async def connect():
        attempts.append(1)
        if len(attempts) == 2:
            await asyncio.Event().wait()  # it stands and carries nothing

    link = Link("x://host", clock, connect)
    await link.start(1)
    link.lost(None)
    async with asyncio.timeout(10):
        while not link.is_up:
            await asyncio.sleep(0.01)
            await clock.advance(1)
    assert len(attempts) == 3
    await link.stop()


async def test_a_refusal_later_may_pass_by(clock):
    broker = Broker()
    link = Link("x://host", clock, broker.connect)
    await link.start(1)
    broker.answers = [ConfigurationError("E244", "the password is being changed")]
    link.lost(None)
    assert not link.is_up
    await asyncio.sleep(0)
    await clock.advance(1)
    assert link.is_up
    assert broker.connections == 2
    await link.stop()


async def test_an_unexpected_error_later_is_told_and_does_not_end_the_attempts(clock, caplog):
    broker = Broker()
    link = Link("x://host", clock, broker.connect)
    await link.start(30)
    broker.answers = [KeyError("an answer without it")]
    link.lost(None)
    await asyncio.sleep(0)
    assert "an answer without it" in caplog.text
    assert "Traceback" in caplog.text
    await clock.advance(1)
    assert link.is_up
    await link.stop()


async def test_an_unexpected_error_at_start_ends_it(clock):
    broker = Broker()
    broker.answers = [KeyError("an answer without it")]
    with pytest.raises(KeyError):
        await Link("x://host", clock, broker.connect).start(30)


async def test_it_says_once_that_it_is_connected_again_and_after_how_long(clock, caplog):
    broker = Broker()
    link = Link("x://host", clock, broker.connect)
    await link.start(1)
    assert caplog.records == []
    broker.answers = [DOWN] * 4
    link.lost(None)
    await asyncio.sleep(0)
    await clock.advance(8)
    said = [record.getMessage() for record in caplog.records if "again after" in record.getMessage()]
    assert len(said) == 1
    assert re.fullmatch(r"x://host: connected again after [1-8] s", said[0])
    await link.stop()


async def test_who_needs_it_waits_up_to_a_time_and_is_told_why(clock):
    broker = Broker()
    link = Link("x://host", clock, broker.connect)
    await link.start(1)
    broker.answers = [DOWN] * 50
    link.lost(ConnectionResetError("reset by peer"))
    await asyncio.sleep(0)
    with pytest.raises(TransportError, match=r"E520 x://host was not reached within 0\.01 s: .*connection refused"):
        await link.up(0.01)
    await link.stop()


async def test_who_waits_for_it_is_told_when_it_stops(clock):
    broker = Broker()
    link = Link("x://host", clock, broker.connect)
    await link.start(1)
    broker.answers = [DOWN]
    link.lost(None)
    waiting = asyncio.create_task(link.up(1000))
    await asyncio.sleep(0)
    await link.stop()
    with pytest.raises(TransportError, match=r"E520 .*has stopped"):
        await waiting
    with pytest.raises(TransportError, match=r"E520 .*has stopped"):
        await link.up(1000)
    assert not link.is_up


async def test_it_is_not_made_again_after_stop(clock):
    broker = Broker()
    link = Link("x://host", clock, broker.connect)
    await link.start(1)
    await link.stop()
    link.lost(None)
    await clock.advance(10)
    assert broker.connections == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "x://h?lease=3",
            "E240 unknown option 'lease' in the URL of x://h; options are: lease_s, mode, number, prefix",
        ),
        ("x://h?lease_s=soon", "E241 lease_s='soon' in the URL of x://h; a number of seconds above 0"),
        ("x://h?lease_s=0", "E241"),
        ("x://h?number=-1", "E241"),
        ("x://h?number=10", "E241 number='10' in the URL of x://h; a whole number from 1 to 9"),
        ("x://h?mode=fast", "E241 mode='fast' in the URL of x://h; one of safe, safer"),
    ],
)
def test_options_that_are_wrong_are_refused(url, message):
    options = Options(parse_address(url))
    with pytest.raises(ConfigurationError, match=message):
        read(options)


def read(options: Options) -> tuple[object, ...]:
    found = (
        options.text("prefix", "trunkline"), options.seconds("lease_s", 10), options.number("number", 2, most=9),
        options.choice("mode", ("safe", "safer"), "safe"),
    )  # fmt: skip
    options.end()
    return found


def test_options_have_defaults_and_are_read():
    assert read(Options(parse_address("x://h"))) == ("trunkline", 10, 2, "safe")
    url = "x://h?prefix=a&lease_s=2.5&number=7&mode=safer"
    assert read(Options(parse_address(url))) == ("a", 2.5, 7, "safer")


def test_a_broker_url_has_hosts_and_credentials(monkeypatch):
    monkeypatch.setenv("BROKER_PASSWORD", "p%40ss/word")
    address = parse_address("amqp://user%40home:${BROKER_PASSWORD}@one:5672,[::1]:5673,two/shop?prefix=a")
    assert address.hosts == (("one", 5672), ("::1", 5673), ("two", None))
    assert (address.user, address.password) == ("user@home", "p%40ss/word")
    assert (address.path, address.options) == ("/shop", {"prefix": "a"})
    assert address.shown == "amqp://one:5672,[::1]:5673,two/shop"


def test_user_and_password_are_read_from_the_environment_each_time(monkeypatch):
    monkeypatch.setenv("BROKER_USER", "shop")
    monkeypatch.setenv("BROKER_PASSWORD", "old")
    address = parse_address("amqp://${BROKER_USER}:${BROKER_PASSWORD}@host")
    assert (address.user, address.password) == ("shop", "old")
    monkeypatch.setenv("BROKER_USER", "shop-2")
    monkeypatch.setenv("BROKER_PASSWORD", "new")
    assert (address.user, address.password) == ("shop-2", "new")
    monkeypatch.delenv("BROKER_PASSWORD")
    with pytest.raises(ConfigurationError, match=r"E249 .* BROKER_PASSWORD, which is not set"):
        _ = address.password
    assert "new" not in repr(address)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("BROKER_PASSWORD", raising=False)
    with pytest.raises(ConfigurationError, match=r"E249 .* BROKER_PASSWORD, which is not set"):
        parse_address("amqp://user:${BROKER_PASSWORD}@host")


@pytest.mark.parametrize("port", ["0", "65536", "amqp", "-1"])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ConfigurationError, match="E201"):
        parse_address(f"amqp://host:{port}")
