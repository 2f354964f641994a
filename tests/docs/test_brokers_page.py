"""The page about brokers says which options their URLs have."""

import re
from pathlib import Path

import pytest

from trunkline import Queue, Stream, Topic
from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError
from trunkline.postgres import schema
from trunkline.store import dead_letter_queue
from trunkline.stores.postgres import tables as store
from trunkline.transport import Subscription, load_adapter, parse_address
from trunkline.transports.kafka.settings import read_settings
from trunkline.transports.nats import layout as nats
from trunkline.transports.postgres import tables as postgres
from trunkline.transports.rabbitmq import names as rabbitmq
from trunkline.transports.redis import layout as redis

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "brokers.md").read_text(encoding="utf-8")
BROKERS = {
    "RabbitMQ": "amqps://host/",
    "Kafka": "kafka+ssl://user:secret@host",
    "NATS": "tls://host",
    "Redis": "rediss://host",
    "PostgreSQL": "postgresql://host/db",
}


def options_of(url: str) -> set[str]:
    with pytest.raises(ConfigurationError, match="E240") as caught:
        load_adapter("trunkline.transports", f"{url}?nonsense=1", system_clock)
    return set(caught.value.hint.removeprefix("options are: ").split(", "))


def documented(broker: str) -> set[str]:
    found = set()
    for names, whose in re.findall(r"^\| (`[^|]+`) \| [^|]* \| ([^|]*) \|", PAGE, re.MULTILINE):
        if broker in whose or whose.startswith("all"):
            found.update(re.findall(r"`([a-z_]+)`", names))
    return found


@pytest.mark.parametrize("broker", BROKERS)
def test_every_option_of_a_broker_is_on_the_page_and_no_other(broker):
    assert documented(broker) == options_of(BROKERS[broker])


def test_secrets_are_in_no_error():
    for url in BROKERS.values():
        secret = url.replace("://", "://canary:hunter2@").replace("user:secret@", "")
        with pytest.raises(ConfigurationError) as caught:
            load_adapter("trunkline.transports", f"{secret}?nonsense=1", system_clock)
        assert "hunter2" not in str(caught.value)


QUEUE, TOPIC, STREAM = Queue("jobs"), Topic("news"), Stream("orders", partitions=2)


def names_of(broker: str) -> set[str]:
    """What things are called, as the adapters call them, with N for the number of a partition."""
    found: set[str] = set()
    if broker == "RabbitMQ":
        names = rabbitmq.Names("trunkline")
        found |= {names.channel(channel.name) for channel in (QUEUE, TOPIC, STREAM)}
        found |= {names.subscription(Subscription("shop", TOPIC)), names.partition("orders", "N")}
        found |= {names.subscription(Subscription("shop", STREAM), part) for part in ("N", "members")}
    if broker == "Kafka":
        settings = read_settings(parse_address("kafka://host"))
        for channel in (QUEUE, TOPIC, STREAM):
            found |= {settings.topic(channel.name), settings.group("shop", channel.name)}
    if broker == "NATS":
        names = nats.Names("trunkline")
        found |= {names.stream(channel) for channel in (QUEUE, TOPIC, STREAM, dead_letter_queue("shop"))}
        found |= {names.subject(QUEUE), names.subject(TOPIC), f"{names.subject(STREAM)}.N", names.bucket}
        found |= {f"{names.cursors(Subscription('shop', STREAM))}.>", nats.durable(Subscription("shop", QUEUE))}
    if broker == "Redis":
        names = redis.Names("trunkline", STREAM)
        found |= {redis.Names("trunkline", channel).streams[0].decode() for channel in (QUEUE, TOPIC)}
        found |= {names.streams[0].decode()[:-1] + "N", names.members("shop").decode(), redis.QUEUE_GROUP}
    if broker == "PostgreSQL":
        made = re.findall(r"CREATE TABLE @(\w+)", schema.PROCESSES + postgres.TABLES + store.TABLES)
        assert len(made) > 15
        found |= set(made)
    return found


@pytest.mark.parametrize("broker", BROKERS)
def test_every_name_on_a_broker_is_on_the_page(broker):
    section = PAGE.partition("## Names on the broker")[2].partition("### Permissions")[0]
    assert {name for name in names_of(broker) if f"`{name}`" not in section} == set()
