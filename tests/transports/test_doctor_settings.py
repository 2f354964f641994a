"""The doctor says what the settings of live servers are worth: what is lost, in which failure, what to change."""

import json
import time

import pytest

from tests.transports.cli_project import on_broker, own_url

pytestmark = pytest.mark.timeout(180)


def own(name, *settings):
    return own_url(name, f"d{time.time_ns()}", *settings)


def report(folder, url, code=0, store=None):
    project = on_broker(folder, url, store)
    return json.loads(project.cli("doctor", "--json", code=code).out)


def finding(found, setting):
    return next(one for one in found["findings"] if one["setting"] == setting)


def limit(found, channel="orders"):
    return next(link["limit"] for link in found["links"] if link["channel"] == channel)


@pytest.mark.xdist_group("redis")
class TestRedis:
    def test_a_server_that_writes_always_keeps_what_is_confirmed(self, tmp_path):
        found = report(tmp_path, own("redis"))
        assert finding(found, "appendfsync")["verdict"] == "kept"
        assert limit(found) == "can be lost: everything, when the disk of the server is lost"

    def test_once_a_second_loses_a_second_when_the_machine_fails(self, tmp_path):
        found = report(tmp_path, own("redis:everysec"))
        told = finding(found, "appendfsync")
        assert (told["verdict"], told["change"]) == ("weak", "appendfsync always")
        assert "up to a second of confirmed messages, when the machine fails" in limit(found)

    def test_a_server_that_keeps_nothing_is_wrong(self, tmp_path):
        found = report(tmp_path, own("redis:memory"), code=1)
        assert finding(found, "appendonly")["verdict"] == "broken"
        assert "what was confirmed, when the server ends" in limit(found)

    def test_a_server_that_evicts_is_wrong(self, tmp_path):
        url = own("redis@evicts", "maxmemory=100mb", "maxmemory-policy=allkeys-lru")
        assert finding(report(tmp_path, url, code=1), "maxmemory-policy")["verdict"] == "broken"

    def test_replicas_that_are_not_there_are_wrong(self, tmp_path):
        url = f"{own('redis')}&replicas=1"
        assert "nothing can be published" in finding(report(tmp_path, url, code=1), "replicas")["meaning"]

    def test_a_channel_that_exists_otherwise_is_wrong(self, tmp_path):
        url = own("redis")
        project = on_broker(tmp_path, url)
        project.cli("publish", "OrderPlaced", '{"order_id": "a", "amount": 1}')
        shop = tmp_path / "shop.py"
        shop.write_text(shop.read_text().replace("partitions=4", "partitions=12"))
        told = json.loads(project.cli("doctor", "--json", code=1).out)
        assert finding(told, "declared as")["value"] == "stream, 4 partitions"


@pytest.mark.xdist_group("nats")
class TestNats:
    def test_what_the_server_does_not_tell_is_said_to_be_unknown(self, tmp_path):
        found = report(tmp_path, own("nats"))
        assert finding(found, "sync_interval")["verdict"] == "unknown"
        assert "unless sync_interval is always" in limit(found)

    def test_a_server_without_jetstream_is_wrong(self, tmp_path):
        found = report(tmp_path, own("nats:nojetstream"), code=1)
        assert finding(found, "jetstream")["verdict"] == "broken"


@pytest.mark.xdist_group("postgres")
class TestPostgres:
    def test_a_server_as_installed_keeps_what_is_committed(self, tmp_path):
        url = own("postgres")
        found = report(tmp_path, url, store=url)
        assert finding(found, "fsync")["verdict"] == "kept"
        assert {link["guarantee"].partition(";")[0] for link in found["links"]} == {"effects once: one commit"}

    def test_a_server_that_does_not_wait_for_the_disk_is_wrong(self, tmp_path):
        url = own("postgres@loose", "fsync=off", "synchronous_commit=off", "max_connections=12")
        found = report(tmp_path, url, code=1, store=url)
        assert finding(found, "fsync")["verdict"] == "broken"
        assert "600 ms of confirmed messages and effects" in finding(found, "synchronous_commit")["loses"]
        assert finding(found, "max_connections")["verdict"] == "weak"


@pytest.mark.xdist_group("rabbitmq")
class TestRabbitmq:
    def test_an_alarm_of_the_broker_is_seen(self, tmp_path):
        url = own("rabbitmq@full", "disk_free_limit.absolute=900000GB")
        found = report(tmp_path, url, code=1)
        assert finding(found, "alarms")["verdict"] == "broken"

    def test_what_amqp_does_not_tell_is_said_to_be_unknown(self, tmp_path):
        found = report(tmp_path, own("rabbitmq"))
        assert finding(found, "cluster size")["verdict"] == "unknown"


@pytest.mark.xdist_group("kafka")
def test_one_broker_of_kafka_is_no_cluster(tmp_path):
    found = report(tmp_path, own("kafka"))
    assert finding(found, "brokers")["verdict"] == "weak"
    assert "the disk of the broker" in limit(found)


@pytest.mark.parametrize("name", ["redis", "nats", "postgresql", "amqp", "kafka"])
def test_a_server_that_is_not_there_is_one_line_and_ends_with_1(tmp_path, name):
    project = on_broker(
        tmp_path, f"{name}://127.0.0.1:1/x?timeout_s=3" if name == "postgresql" else f"{name}://127.0.0.1:1?timeout_s=3"
    )
    shown = project.cli("doctor", code=1).out
    assert "E520" in shown
    assert "Traceback" not in shown
