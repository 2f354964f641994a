"""What tests on Apache Kafka need: the broker, names of a test's own on it, and an administrator."""

import time

import pytest
from confluent_kafka.admin import AdminClient

from tests.brokers import broker_url


@pytest.fixture
def url():
    return f"{broker_url('kafka')}?timeout_s=30&lease_s=6&prefix=t{time.time_ns()}"


@pytest.fixture
def prefix(url):
    return url.rpartition("=")[2]


@pytest.fixture
def servers(url):
    return url.removeprefix("kafka://").partition("?")[0]


@pytest.fixture
def admin(servers):
    return AdminClient({"bootstrap.servers": servers})
