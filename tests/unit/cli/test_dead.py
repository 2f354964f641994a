"""Dead letters from the command line, with services running and without."""

import json
import shlex
import sqlite3
import sys
import time
from contextlib import closing

import pytest

from tests.unit.cli.conftest import wait_until
from trunkline.cli.dead_edit import Change, difference, edited
from trunkline.errors import DeadLetterError, PublishError
from trunkline.message import Message, pack, read_packed
from trunkline.store import DeadLetterRow

pytestmark = pytest.mark.timeout(120)


def row(raw, key=None):
    return DeadLetterRow(1, "a@b", "b", "", "", key, "E400", "why", "", 1, 0.0, False, 0, raw)


def paid(project):
    with closing(sqlite3.connect(project.folder / "trunkline.db")) as connection:
        return connection.execute("SELECT order_id, amount FROM paid ORDER BY n").fetchall()


def numbers(project, *filters):
    return [item["number"] for item in project.json("dead", "list", *filters)]


def test_list_says_who_why_how_often_and_how_many_wait_behind(buried):
    shown = buried.cli("dead", "list").out
    assert "payment@orders" in shown
    assert "ValueError: amount -3 is below zero" in shown
    assert buried.dead()[2] == buried.dead()[2] | {
        "key": "c", "code": "handler", "attempts": 1, "holds_key": True, "waiting_behind": 2, "type": "order.placed",
    }  # fmt: skip


def test_list_is_narrowed_by_subscription_and_type(buried):
    assert numbers(buried, "--subscription", "payment") == [1, 2, 3]
    assert numbers(buried, "--subscription", "payment@orders", "--limit", "2") == [1, 2]
    assert numbers(buried, "--subscription", "pay") == []
    assert numbers(buried, "--type", "order.paid") == []
    assert buried.cli("dead", "list", "--type", "order.paid").out == "no dead letters\n"


def test_list_says_the_code_of_a_reason_once(buried_copy):
    with buried_copy.running("shop:system"):
        buried_copy.cli("dead", "edit", "1", "--data", '{"order_id": "a", "amount": "many"}', "--redrive")
        wait_until(lambda: numbers(buried_copy) == [2, 3, 4], "it is set aside again")
    (row,) = (row for row in buried_copy.dead() if row["number"] == 4)
    assert (row["code"], row["reason"][:37]) == ("E412", "payload is not a valid order.placed: ")
    shown = buried_copy.cli("dead", "list", COLUMNS="300").out.splitlines()[-1]
    assert "   E412: payload is not a valid order.placed: Expected `int`, got `str` - at `$.amount`   " in shown
    assert "set aside order.placed" in buried_copy.log()
    assert "E412 payload is not" in buried_copy.log()
    assert "E412 DecodeError" not in buried_copy.log()


def test_list_on_a_narrow_terminal_cuts_no_word(buried):
    for width in ("76", "80"):
        shown = buried.cli("dead", "list", COLUMNS=width).out.splitlines()
        assert max(map(len, shown)) <= int(width)
        assert shown[3] == "    ValueError: amount -1 is below zero"
    whole = buried.cli("dead", "list", COLUMNS="120").out.splitlines()
    assert len(whole) == 5
    assert "ValueError: amount -1 is below zero" in whole[2]


def test_show_has_envelope_payload_traceback_and_what_waits(buried):
    shown = buried.cli("dead", "show", "3").out
    for text in ("2 of its key wait behind it", "partitionkey    c", '"amount": -3', "raise ValueError", "dead edit 3"):
        assert text in shown
    found = buried.json("dead", "show", "3")
    assert found["payload"] == {"order_id": "c", "amount": -3}
    assert found["envelope"]["type"] == "order.placed"


def test_an_absent_number_is_an_error(buried):
    for act in ("show", "redrive", "edit"):
        more = ["--data", "{}"] if act == "edit" else []
        assert buried.cli("dead", act, "99", *more, code=1).err.startswith("E601 no dead letter 99")


def test_what_is_edited_and_redriven_is_handled_and_its_successors_follow_in_order(buried_copy):
    with buried_copy.running("shop:system"):
        shown = buried_copy.cli("dead", "edit", "3", "--data", '{"order_id": "c", "amount": 3}').out
        assert shown == "3: data.amount: -3 -> 3\n3: saved; give it back with: trunkline dead redrive 3\n"
        assert len(numbers(buried_copy)) == 3  # saved, and still set aside
        assert buried_copy.cli("dead", "redrive", "3").out == "1 given back\n"
        wait_until(lambda: len(paid(buried_copy)) == 3, "the order and its successors are paid")
    assert paid(buried_copy) == [("c", 3), ("c", 4), ("c", 5)]
    assert numbers(buried_copy) == [1, 2]


def test_edit_with_redrive_is_one_step_and_keeps_the_id(buried_copy):
    before = buried_copy.json("dead", "show", "1")["id"]
    buried_copy.cli("dead", "edit", "1", "--data", '{"order_id": "a", "amount": 8}', "--redrive")
    with buried_copy.running("shop:system"):
        wait_until(lambda: paid(buried_copy) == [("a", 8)], "it is paid")
    published = [
        json.loads(line) for line in buried_copy.cli("tail", "orders", "--no-follow", "--json").out.splitlines()
    ]
    assert before in {message.get("causationid") for message in published}


def test_what_still_fails_is_set_aside_again_under_a_new_number(buried_copy):
    with buried_copy.running("shop:system"):
        buried_copy.cli("dead", "redrive", "--all", "--subscription", "payment")
        wait_until(lambda: sorted(numbers(buried_copy)) == [4, 5, 6], "all failed again")


def test_redriving_keeps_to_its_rate(buried_copy):
    before = time.monotonic()
    assert buried_copy.cli("dead", "redrive", "--all", "--rate", "4").out == "3 given back\n"
    assert time.monotonic() - before >= 2 / 4
    assert numbers(buried_copy) == []


def test_one_absent_number_among_several_leaves_all_as_they_are(buried_copy):
    assert "nothing was done" in buried_copy.cli("dead", "redrive", "1", "99", code=1).err
    assert numbers(buried_copy) == [1, 2, 3]


def test_acting_on_everything_must_be_said(buried):
    assert "--all" in buried.cli("dead", "redrive", code=2).err
    assert "--all" in buried.cli("dead", "discard", "1", "--all", "--yes", code=2).err


def test_discard_asks_unless_told_not_to(buried_copy):
    assert "--yes" in buried_copy.cli("dead", "discard", "1", code=2).err
    assert numbers(buried_copy) == [1, 2, 3]
    assert buried_copy.cli("dead", "discard", "1", "3", "--yes").out == "2 dropped\n"
    assert numbers(buried_copy) == [2]
    with buried_copy.running("shop:system"):
        wait_until(lambda: paid(buried_copy) == [("c", 4), ("c", 5)], "what waited behind goes on")


def test_a_payload_that_is_no_json_changes_nothing(buried_copy):
    assert buried_copy.cli("dead", "edit", "1", "--data", "{", code=1).err.startswith("E602")
    assert buried_copy.json("dead", "show", "1")["payload"] == {"order_id": "a", "amount": -1}


def test_a_payload_that_does_not_fit_its_type_is_refused_where_the_type_is_known(buried_copy):
    arguments = ["--data", '{"order_id": "a", "amount": "many"}', "--redrive"]
    for named in (["shop:system"], []):
        shown = buried_copy.cli("dead", "edit", "1", *named, *arguments, code=1).err.splitlines()
        assert shown[0].startswith("E412 dead letter 1: payload is not a valid order.placed: Expected `int`, got `str`")
        assert shown[1] == "     fields: order_id: str, amount: int"
        assert buried_copy.json("dead", "show", "1")["payload"] == {"order_id": "a", "amount": -1}
        (buried_copy.folder / "trunkline.toml").write_text('app = "shop:system"\n')
    assert numbers(buried_copy) == [1, 2, 3]


def test_another_type_is_checked_with_the_payload_that_is_there(buried_copy):
    assert (
        "not a valid headline" in buried_copy.cli("dead", "edit", "1", "shop:system", "--type", "headline", code=1).err
    )


def test_a_payload_that_fits_its_type_is_saved_without_a_remark(buried_copy):
    done = buried_copy.cli("dead", "edit", "1", "shop:system", "--data", '{"order_id": "a", "amount": 1}')
    assert done.err == ""
    assert buried_copy.json("dead", "show", "1")["payload"] == {"order_id": "a", "amount": 1}


def test_where_the_type_is_not_known_an_edit_says_that_it_was_not_checked(buried_copy):
    remark = "1: not checked whether the payload fits its type: "
    done = buried_copy.cli("dead", "edit", "1", "--data", '{"amount": "many"}')
    assert done.err == f"{remark}no MODULE:OBJECT is named\n"
    done = buried_copy.cli("dead", "edit", "1", "shop:system", "--type", "order.sold")
    assert done.err == f"{remark}shop:system declares no type 'order.sold'\n"
    assert buried_copy.cli("dead", "edit", "1", "--key", "other").err == ""


def test_edit_without_a_change_and_without_a_terminal_is_a_usage_error(buried):
    assert "--data" in buried.cli("dead", "edit", "1", code=2).err


def test_the_same_payload_is_no_change(buried_copy):
    assert (
        buried_copy.cli("dead", "edit", "1", "--data", '{ "order_id":"a","amount":-1 }').out == "1: nothing changed\n"
    )


def test_an_unreadable_envelope_is_shown_as_bytes_and_gets_a_new_one(buried_copy):
    with closing(sqlite3.connect(buried_copy.folder / "trunkline.db")) as connection:
        connection.execute(
            "UPDATE trunkline_dead_letter SET event = ?, id = '', type = '' WHERE seq = 1", (b"\xff\x00junk",)
        )
        connection.commit()
    assert "0000  ff 00 6a 75 6e 6b" in buried_copy.cli("dead", "show", "1").out
    assert "(unreadable)" in buried_copy.cli("dead", "list").out
    assert buried_copy.json("dead", "show", "1")["payload"] == {"hex": "ff006a756e6b"}
    assert buried_copy.cli("dead", "edit", "1", "--data", "{}", code=1).err.startswith("E603")
    arguments = ["--type", "order.placed", "--data", '{"order_id": "a", "amount": 1}', "--redrive"]
    assert "new envelope of type order.placed" in buried_copy.cli("dead", "edit", "1", *arguments).out
    with buried_copy.running("shop:system"):
        wait_until(lambda: paid(buried_copy) == [("a", 1)], "it is paid")


def test_an_editor_changes_the_payload(buried_copy, monkeypatch):
    from trunkline.cli.dead_edit import editor_text

    script = "import sys, pathlib as p; f = p.Path(sys.argv[1]); f.write_text(f.read_text().replace('-1', '9'))"
    monkeypatch.setenv("VISUAL", f"{sys.executable} -c {shlex.quote(script)}")
    message = Message("i", "t", "s", b'{"amount":-1}', 0.0)
    assert json.loads(editor_text(row(pack(message)))) == {"amount": 9}


def test_an_edit_keeps_everything_else_of_the_envelope():
    message = Message("i", "t", "s", b'{"a":1}', 5.0, "k", correlationid="c", extensions={"x": "y"})
    raw, changes = edited(row(pack(message)), Change(b'{ "a": 2 }', "u", schema_version=2))
    new = read_packed(raw)
    assert changes == ["type: t -> u", "schemaversion: 1 -> 2", "data.a: 1 -> 2"]
    assert new == Message(
        "i", "u", "s", b'{"a":2}', 5.0, "k", correlationid="c", schemaversion=2, extensions={"x": "y"}
    )


def test_a_new_envelope_needs_type_and_data():
    with pytest.raises(DeadLetterError, match="E603"):
        edited(row(b"junk"), Change(b"{}"))


@pytest.mark.parametrize("raw", [b"junk", pack(Message("i", "t", "s", b"{}", 0.0))], ids=["new", "edited"])
def test_an_envelope_without_a_type_is_refused(raw):
    with pytest.raises(PublishError, match=r"E307 .*type is empty"):
        edited(row(raw), Change(b"{}", ""))


def test_json_that_is_nested_too_deeply_is_shown_as_it_is():
    from trunkline.cli.dead_view import _shown

    assert _shown(b"[" * 2000 + b"]" * 2000).strip().startswith("[[[[")


def test_a_difference_of_kind_is_a_difference():
    assert difference({"a": True}, {"a": 1}) == ["data.a: true -> 1"]
    assert difference([1], [1, 2]) == ["data: [1] -> [1,2]"]
