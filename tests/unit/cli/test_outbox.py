"""The outbox from the command line."""

import json
from datetime import UTC, datetime

import apsw
import pytest

from tests.unit.cli.conftest import copied

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def scheduled(used_once, tmp_path_factory):
    """A project with three messages scheduled; nothing runs, so none leaves."""
    project = copied(used_once, tmp_path_factory.mktemp("scheduled"))
    for type_name, data, at in (
        ("OrderPlaced", {"order_id": "a", "amount": 1}, "+2h"),
        ("Ship", {"order_id": "b"}, "+1h"),
        ("Headline", {"text": "x"}, "+3d"),
    ):
        project.cli("publish", "shop:system", type_name, json.dumps(data), "--at", at)
    return project


def test_the_outbox_lists_what_is_scheduled_and_what_is_due_first_comes_first(scheduled):
    rows = scheduled.json("outbox")
    assert [(row["channel"], row["key"]) for row in rows] == [("jobs", None), ("orders", "a"), ("news", None)]
    assert rows[1]["type"] == "order.placed"
    due, made = (datetime.fromisoformat(rows[1][name]) for name in ("due", "time"))
    assert round((due - made).total_seconds() / 3600, 1) == 2.0
    assert due > datetime.now(UTC)


def test_the_outbox_is_one_line_each_where_nothing_limits_the_width(scheduled):
    header, _, first, second, third = scheduled.cli("outbox", COLUMNS="300").out.splitlines()
    assert header.split() == ["Channel", "Type", "Key", "Age", "Leaves", "Id"]
    assert [" in 60 min " in first, " in 120 min " in second, " in 3 d " in third] == [True] * 3
    assert scheduled.json("outbox")[0]["id"] in first


@pytest.mark.parametrize(
    ("filters", "channels"),
    [
        (["--channel", "orders"], ["orders"]),
        (["--channel", "order"], []),
        (["--type", "order.placed"], ["orders"]),
        (["--limit", "1"], ["jobs"]),
    ],
)
def test_the_outbox_is_narrowed_by_channel_type_and_number(scheduled, filters, channels):
    assert [row["channel"] for row in scheduled.json("outbox", *filters)] == channels


def test_the_outbox_says_how_many_it_did_not_show(scheduled):
    assert scheduled.cli("outbox", "--limit", "1").err == "2 more; --limit shows them\n"
    assert scheduled.cli("outbox").err == ""


def test_an_empty_outbox_is_said_to_be_empty_and_one_that_cannot_be_read_is_listed(buried_copy):
    assert buried_copy.cli("outbox").out == "nothing waits to be sent\n"
    with apsw.Connection(str(buried_copy.folder / "trunkline.db")) as file:
        file.execute("INSERT INTO trunkline_outbox (due, channel, event) VALUES (0, 'orders', x'00')")
    assert buried_copy.json("outbox") == [
        {"channel": "orders", "id": None, "type": None, "key": None, "time": None, "due": None}
    ]
    assert "(unreadable)" in buried_copy.cli("outbox").out
