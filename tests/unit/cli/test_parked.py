"""Parked messages from the command line."""

import json

import pytest

pytestmark = pytest.mark.timeout(120)


def test_parked_lists_what_is_tried_next_with_what_waits_behind(parked):
    first, second = parked.json("parked")
    assert first == first | {
        "subscription": "payment@orders", "channel": "orders", "type": "order.placed", "key": "a", "attempts": 1,
        "reason": "RetryLaterError: the bank is closed", "held_by": None, "waiting_behind": 2,
    }  # fmt: skip
    assert (second["key"], second["waiting_behind"]) == ("b", 0)
    published = [json.loads(line) for line in parked.cli("tail", "orders", "--no-follow", "--json").out.splitlines()]
    assert first["id"] == published[0]["id"]
    assert published[0]["time"] < first["next_try"] < second["next_try"]


def test_parked_is_one_line_each_where_nothing_limits_the_width(parked):
    header, _, first, second = parked.cli("parked", COLUMNS="300").out.splitlines()
    assert header.split() == ["Subscription", "Type", "Key", "Tries", "Next", "try", "Behind", "Reason", "Id"]
    assert "RetryLaterError: the bank is closed" in first
    assert parked.json("parked")[1]["id"] in second
    assert " in " in first


def test_parked_on_a_narrow_terminal_has_reason_and_id_below(parked):
    shown = parked.cli("parked", COLUMNS="80").out.splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[3] == "    RetryLaterError: the bank is closed"
    assert shown[4].strip() == parked.json("parked")[0]["id"]


@pytest.mark.parametrize(
    ("filters", "keys"),
    [
        (["--subscription", "payment"], ["a", "b"]),
        (["--subscription", "payment@orders", "--type", "order.placed"], ["a", "b"]),
        (["--subscription", "pay"], []),
        (["--type", "order.paid"], []),
        (["--limit", "1"], ["a"]),
    ],
)
def test_parked_is_narrowed_by_subscription_type_and_number(parked, filters, keys):
    assert [row["key"] for row in parked.json("parked", *filters)] == keys


def test_parked_says_how_many_it_did_not_show(parked, used):
    assert parked.cli("parked", "--limit", "1").err == "1 more; --limit shows them\n"
    assert parked.cli("parked").err == ""
    assert used.cli("parked").out == "nothing is parked\n"


def test_what_waits_behind_a_dead_letter_is_parked_too(buried):
    (row,) = buried.json("parked")
    assert row == row | {"key": "c", "held_by": 3, "next_try": None, "waiting_behind": 1}
    assert "after dead letter 3" in buried.cli("parked").out


def test_a_redriven_message_is_tried_at_once(buried_copy):
    buried_copy.cli("dead", "redrive", "1")
    assert buried_copy.json("parked")[0] == buried_copy.json("parked")[0] | {"key": "a", "next_try": None}
    assert " now " in buried_copy.cli("parked").out.splitlines()[2]


def test_the_oldest_of_a_backlog_counts_what_is_parked(parked):
    (row,) = (row for row in parked.json("backlog") if row["subscription"] == "payment@orders")
    assert (row["waiting"], row["parked"]) == (0, 4)
    assert row["oldest_s"] > 0


def test_the_doctor_says_that_messages_are_parked_and_that_this_is_not_wrong(parked):
    (check,) = (check for check in parked.json("doctor")["checks"] if check["name"] == "parked")
    assert (check["status"], check["advice"]) == ("warn", "trunkline parked")
    assert check["found"].startswith("4 ")
