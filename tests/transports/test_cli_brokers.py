"""Every command on a system that runs on a real broker."""

import json
import os

import pytest

from tests.transports.cli_project import on_broker, own_url
from tests.unit.cli.conftest import wait_until

SLOW = pytest.mark.timeout(240)
BROKERS = [
    pytest.param(name, marks=[pytest.mark.xdist_group(name), SLOW])
    for name in ("redis", "nats", "postgres", "rabbitmq", "kafka")
]
LOOKS_INTO_QUEUES = {"redis", "nats", "postgres", "kafka"}


@pytest.fixture(params=BROKERS)
def broker(request):
    return request.param


@pytest.fixture
def project(broker, tmp_path):
    url = own_url(broker, f"c{os.getpid()}{tmp_path.name[-12:].replace('-', '').replace('_', '').lower()}")
    return on_broker(tmp_path, url, store=url if broker == "postgres" else None)


def rows(project):
    return {row["subscription"]: row for row in project.json("backlog")}


def place(project, *amounts, order="a"):
    lines = "\n".join(json.dumps({"order_id": order, "amount": amount}) for amount in amounts)
    return project.cli("publish", "OrderPlaced", "-", stdin=lines).out.split()


def test_the_commands_show_and_repair_what_runs_on_a_broker(project, broker):
    with project.running(started="runs on"):
        ids = place(project, 5, -1, 7)
        wait_until(lambda: len(project.dead()) == 1, "a dead letter")
        place(project, 999, order="b")
        wait_until(lambda: rows(project)["payment@orders"]["parked"] == 2, "one parked, one behind the dead letter")
        held = {row["key"]: row for row in project.json("parked")}
        assert held["a"]["held_by"] == project.dead()[0]["number"]
        assert "the bank is closed" in held["b"]["reason"]

        shown = project.cli("tail", "orders", "--no-follow", "--json").out.splitlines()
        found = [json.loads(line) for line in shown]
        of_a = [event for event in found if event["partitionkey"] == "a"]
        assert [event["id"] for event in of_a if event["type"] == "order.placed"] == ids
        assert {event["type"] for event in found} == {"order.placed", "order.paid"}

        number = str(project.dead()[0]["number"])
        project.cli("dead", "edit", number, "--data", '{"order_id": "a", "amount": 1}')
        assert project.cli("dead", "redrive", number).out == "1 given back\n"
        wait_until(lambda: rows(project)["payment@orders"]["parked"] == 1, "what waited behind it was handled")
        assert project.dead() == []
        project.cli("publish", "Ship", '{"order_id": "b"}', "--at", "+1h")
        (scheduled,) = project.json("outbox", "--type", "ship")
        assert scheduled["channel"] == "jobs"
        report = project.json("doctor")
        assert {link["channel"]: link["kind"] for link in report["links"]}["orders"] == "stream"
        assert report["findings"]
        assert all(check["status"] != "fail" for check in report["checks"])


def test_a_backlog_is_counted_before_anything_runs_and_taken_by_nobody(project, broker):
    with project.running(started="runs on"):
        pass
    project.cli("publish", "Ship", '{"order_id": "a"}')
    project.cli("publish", "Headline", '{"text": "a"}')
    for _ in range(2):
        found = rows(project)
        assert (found["shipping@jobs"]["waiting"], found["shipping@news"]["waiting"]) == (1, 1)
    if broker in LOOKS_INTO_QUEUES:
        assert "ship" in project.cli("tail", "jobs", "--no-follow").out
    else:
        assert "E230" in project.cli("tail", "jobs", code=2).err
    assert rows(project)["shipping@jobs"]["waiting"] == 1
    with project.running(started="runs on"):
        wait_until(lambda: rows(project)["shipping@jobs"]["waiting"] == 0, "handled after all")


def test_looking_makes_nothing_where_nothing_ever_ran(project, broker):
    if broker == "postgres":
        assert "E232" in project.cli("backlog", code=2).err
        assert "E232" in project.cli("dead", "list", code=2).err
    else:
        project.cli("backlog", "--store", "none:")
        assert all(row["waiting"] is None for row in project.json("backlog", "--store", "none:"))
        assert "E233" in project.cli("tail", "orders", code=2).err
    report = project.json("doctor")
    assert all(finding["channel"] == "" for finding in report["findings"])


def test_without_a_store_the_backlog_counts_the_queue_of_dead_letters(broker, tmp_path):
    url = own_url(broker, f"n{os.getpid()}{broker}")
    project = on_broker(tmp_path, url, store="none:")
    shop = tmp_path / "shop.py"
    shop.write_text(shop.read_text().replace("delays_s=()))", 'delays_s=()), after_dead_letter="continue")'))
    with project.running(started="runs on"):
        place(project, -1)
        wait_until(lambda: rows(project).get("payment.dead-letters", {}).get("waiting") == 1, "a dead letter")
    assert rows(project)["shipping.dead-letters"]["waiting"] == 0
    refused = project.cli("dead", "list", code=2).err
    assert '"trunkline backlog" counts them' in refused
    if broker in LOOKS_INTO_QUEUES:
        assert "order.placed" in project.cli("tail", "payment.dead-letters", "--no-follow").out
    else:
        assert '"trunkline backlog" counts it' in project.cli("tail", "payment.dead-letters", code=2).err


@pytest.mark.xdist_group("redis")
@SLOW
def test_several_workers_share_a_broker(tmp_path):
    project = on_broker(tmp_path, own_url("redis", f"w{os.getpid()}"))
    with project.running("--workers", "2", started="worker-2 trunkline.app: shop runs on"):
        for number in range(6):
            place(project, number, order=f"o{number}")
        wait_until(lambda: rows(project)["payment@orders"]["waiting"] == 0, "all are handled")
        paid = project.cli("tail", "orders", "--no-follow").out.count("order.paid")
    assert paid == 6
