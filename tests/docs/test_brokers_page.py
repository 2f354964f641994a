"""The page about brokers says which options their URLs have."""

import re
from pathlib import Path

import pytest

from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError
from trunkline.transport import load_adapter

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
