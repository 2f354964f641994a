"""publish, tail, backlog, topology: messages in and messages seen."""

import json
import sqlite3
import subprocess
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from tests.unit.cli.conftest import wait_until
from trunkline.cli import commands
from trunkline.cli.publish import due
from trunkline.errors import PublishError

pytestmark = pytest.mark.timeout(120)


def lines(project, *arguments):
    return project.cli("tail", *arguments, "--no-follow").out.splitlines()


def test_publish_prints_the_id_of_each_message(used):
    ids = used.publish("OrderPlaced", {"order_id": "1", "amount": 1}, {"order_id": "2", "amount": 2})
    shown = [json.loads(line) for line in lines(used, "orders", "--json")]
    assert [message["id"] for message in shown] == ids
    assert [message["partitionkey"] for message in shown] == ["1", "2"]
    assert shown[0]["type"] == "order.placed"


def test_publish_takes_a_name_or_a_class_and_files(used):
    (used.folder / "one.json").write_text('{\n "order_id": "1",\n "amount": 1\n}\n')
    (used.folder / "many.jsonl").write_text('{"order_id": "2", "amount": 1}\n\n{"order_id": "3", "amount": 1}\n')
    used.cli("publish", "shop:system", "order.placed", "@one.json")
    used.cli("publish", "shop:system", "OrderPlaced", "@many.jsonl", "--key", "k")
    assert [line.split("  ")[2] for line in lines(used, "orders")] == ["1", "k", "k"]


def test_the_app_of_the_settings_file_can_be_left_out(used):
    (used.folder / "trunkline.toml").write_text('app = "shop:system"\n')
    assert used.json("publish", "Ship", '{"order_id": "1"}')["channel"] == "jobs"
    assert "payment" in used.cli("topology").out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["OrderPlaced", '{"order_id": "1"}'], "E412", "fields: order_id: str, amount: int"),
        (["OrderPlaced", "{"], "E412", "DATA: payload is not a valid order.placed"),
        (["OrderPlaced", "@absent.json"], "E311", "absent.json cannot be read"),
        (["Nope", "{}"], "E309", "\n     declared are: headline, order.paid, order.placed, ship\n"),
        (["OrderPlace", "{}"], "E309", "\n     did you mean 'OrderPlaced'? declared are: headline"),
        (["order.place", "{}"], "E309", "\n     did you mean 'order.placed'? declared are: headline"),
        (["OrderPlaced", '{"order_id": "1", "amount": 1}', "--priority", "3"], "E308", "Queue(priority=True)"),
        (["OrderPlaced", '{"order_id": "1", "amount": 1}', "--at", "tomorrow"], "E306", "+30s"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_published(used, arguments, code, text):
    status = 1 if code == "E412" else 2  # the payload may be mended where it comes from; the command is wrong
    shown = used.cli("publish", "shop:system", *arguments, code=status).err
    assert shown.startswith(code)
    assert text in shown
    assert lines(used, "orders") == []


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "TYPE and DATA are missing"),
        (["shop:system"], "TYPE and DATA are missing"),
        (["OrderPlaced"], "DATA is missing"),
        (["shop:system", "OrderPlaced"], "DATA is missing"),
        (["shop:system", "order.placed"], "DATA is missing"),
    ],
    ids=str,
)
def test_a_missing_argument_of_publish_is_named_with_the_form(arguments, missing):
    shown = CliRunner().invoke(commands.app, ["publish", *arguments, "--transport", "sqlite:///nothing.db"])
    assert shown.exit_code == 2
    assert f"{missing}; the form is trunkline publish [MODULE:OBJECT] TYPE DATA, such as" in shown.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["publish", "shop:system", "Headline", '{"text": "\udcff"}'],
        ["publish", "shop:system", "Headline", '{"text": "a"}', "--key", "\udcff"],
        ["dead", "edit", "1", "--data", '"\udcff"'],
        ["dead", "edit", "1", "--key", "\udcff"],
        ["dead", "list", "--type", "\udcff"],
        ["parked", "--subscription", "\udcff"],
        ["outbox", "--channel", "\udcff"],
    ],
    ids=lambda arguments: " ".join(arguments[:2] + arguments[-2:-1]),
)
def test_an_argument_that_is_not_utf_8_is_refused(buried_copy, arguments):
    shown = buried_copy.cli(*arguments, code=2).err
    assert shown.startswith("E226")
    assert "\\xff" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["dead", "show", "1" * 30],
        ["dead", "redrive", "1", "1" * 30],
        ["dead", "edit", "1", "--schema-version", "1" * 30],
        ["dead", "list", "--limit", "1" * 30],
        ["outbox", "--limit", "1" * 30],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_number_that_no_file_can_hold_is_refused(buried_copy, arguments):
    assert "is too large; the most is 9007199254740992" in buried_copy.cli(*arguments, code=2).err


def test_a_wait_that_no_date_can_hold_is_refused(used):
    arguments = ["Headline", '{"text": "a"}', "--at", "+99999999999d"]
    assert used.cli("publish", "shop:system", *arguments, code=2).err.startswith("E306 --at '+99999999999d' is too far")


@pytest.mark.parametrize("command", [["backlog"], ["tail", "orders", "--no-follow"], ["dead", "list"]])
def test_a_name_that_is_too_long_for_a_file_is_refused(project, command):
    assert project.cli(*command, "--transport", f"sqlite:///{'x' * 300}", code=2).err.startswith("E225")


def test_the_doctor_says_so_of_a_name_that_is_too_long(project):
    assert "too long" in project.cli("doctor", "--transport", f"sqlite:///{'x' * 300}", code=1).out


@pytest.mark.parametrize(("option", "code"), [("foo=1", "E227"), ("vfs=nope", "E228")])
def test_an_option_that_a_url_does_not_have_is_refused_by_commands_that_look_too(used, option, code):
    assert used.cli("backlog", "--transport", f"sqlite:///trunkline.db?{option}", code=2).err.startswith(code)


def test_one_wrong_line_publishes_none(used):
    text = '{"order_id": "1", "amount": 1}\n{"order_id": 2, "amount": 1}\n'
    assert "line 2" in used.cli("publish", "shop:system", "OrderPlaced", "-", stdin=text, code=1).err
    assert lines(used, "orders") == []


def test_a_priority_lets_a_message_overtake_and_tail_shows_what_waits(used):
    used.publish("Ship", {"order_id": "1"})
    used.cli("publish", "shop:system", "Ship", '{"order_id": "2"}', "--priority", "9")
    assert [json.loads(line).get("priority") for line in lines(used, "jobs", "--json")] == [None, 9]
    (row,) = [row for row in used.json("backlog") if row["channel"] == "jobs"]
    assert (row["waiting"], row["in_flight"]) == (2, 0)
    assert row["oldest_s"] >= 0


def test_a_scheduled_message_comes_when_it_is_due(project):
    with project.running("shop:system"):
        project.cli("publish", "shop:system", "OrderPlaced", '{"order_id": "1", "amount": 1}', "--at", "+300ms")
        wait_until(lambda: len(lines(project, "orders")) == 2, "it was published and paid")


def test_tail_follows_until_its_limit(used):
    with subprocess.Popen(
        used.command("tail", "orders", "--from-start", "--limit", "2"),
        cwd=used.folder,
        env=used.environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        used.publish(
            "OrderPlaced",
            {"order_id": "a", "amount": 1},
            {"order_id": "b", "amount": 1},
            {"order_id": "c", "amount": 1},
        )
        out, _ = process.communicate(timeout=30)
    assert [line.split("  ")[1:3] for line in out.splitlines()] == [["order.placed", "a"], ["order.placed", "b"]]
    assert process.returncode == 0


def test_a_topic_message_with_several_subscriptions_is_shown_once(used):
    (used.folder / "more.py").write_text(
        "from shop import *\nother = Service('other')\n@other.handle\nasync def read(news: Headline) -> None: ...\n"
        "system = System('more', [shipping, other])\n"
    )
    with used.running("more:system"):
        pass
    used.publish("Headline", {"text": "x"})
    assert len(lines(used, "news")) == 1


@pytest.mark.parametrize(
    "command", [["tail", "orders"], ["backlog"], ["parked"], ["outbox"], ["dead", "list"], ["dead", "redrive", "--all"]]
)
def test_a_file_that_does_not_exist_is_an_error_and_is_not_made(project, command):
    said = project.cli(*command, code=2).err.replace("\n", " ")
    assert f"E231 there is no trunkline.db in {project.folder} (named by the default)" in said
    variable = project.cli(*command, code=2, TRUNKLINE_TRANSPORT="sqlite:///other.db").err.replace("\n", " ")
    assert f"E231 there is no other.db in {project.folder} (named by TRUNKLINE_TRANSPORT)" in variable
    assert [path.name for path in project.folder.iterdir()] == ["shop.py"]


def test_publishing_to_a_file_that_does_not_exist_is_refused(project):
    assert "E231" in project.cli("publish", "shop:system", "Ship", '{"order_id": "1"}', code=2).err
    assert not (project.folder / "trunkline.db").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"not a database, but long enough to be looked at" * 20, "E203 trunkline.db is not a SQLite database"),
        (b"", "E232 trunkline.db is empty"),
    ],
)
def test_a_file_of_something_else_is_refused(project, content, text):
    (project.folder / "trunkline.db").write_bytes(content)
    assert project.cli("backlog", code=2).err.splitlines()[0] == text
    assert (project.folder / "trunkline.db").read_bytes() == content


@pytest.mark.parametrize(
    ("option", "url", "text"),
    [
        ("--transport", "memory:", "E230 memory: cannot be looked into from outside"),
        ("--transport", "postgres://shop", "E202 no transport for 'postgres'"),
        ("--store", "postgres://shop", "E202 no store for 'postgres'"),
        ("--transport", "sqlite:", "E206 sqlite: without a file"),
        ("--transport", "sqlite://shop.db", "E206 sqlite://shop.db has 2 slashes before the file"),
        ("--transport", "sqlite:///.", "E225 . is a directory"),
    ],
)
def test_what_is_no_file_cannot_be_looked_into(used, option, url, text):
    assert used.cli("backlog", option, url, code=2).err.startswith(text)


@pytest.mark.parametrize(
    ("url", "meant"),
    [("postgres://h/db", "postgresql://"), ("rabbitmq://h", "amqp://"), ("postgresql+asyncpg://h/db", "postgresql://"),
     ("rediss+x://h", "rediss://"), ("sqlit:///a.db", "sqlite:")],
)  # fmt: skip
def test_a_scheme_that_is_called_otherwise_is_named(project, url, meant):
    assert f"did you mean {meant}? installed are: " in project.cli("backlog", "-t", url, code=2).err


def test_a_scheme_that_nothing_is_near_to_is_not_guessed(project):
    assert "did you mean" not in project.cli("backlog", "-t", "mongodb://h", code=2).err


def test_a_file_that_is_missing_is_not_taken_for_a_name_of_ours(project):
    assert "name the right file: --transport sqlite:///FILE" in project.cli("backlog", code=2).err


def test_an_unknown_channel_names_those_there_are(used):
    assert "jobs, news, orders" in used.cli("tail", "nope", code=2).err


def test_tables_fit_80_columns(buried):
    for command in (
        ["backlog"],
        ["parked"],
        ["outbox"],
        ["dead", "list"],
        ["topology", "shop:system"],
        ["doctor", "shop:system"],
    ):
        shown = buried.cli(*command, COLUMNS="80").out
        assert max(map(len, shown.splitlines())) <= 80, command


def test_a_backlog_on_a_narrow_terminal_breaks_names_before_the_channel(used):
    with closing(sqlite3.connect(used.folder / "trunkline.db")) as connection:
        connection.execute("UPDATE trunkline_subscription SET name = 'notification-by-letter' WHERE name = 'payment'")
        connection.commit()
    assert "notification-by-letter@orders   stream " in used.cli("backlog", COLUMNS="120").out
    shown = used.cli("backlog", COLUMNS="80").out.splitlines()
    at = next(number for number, line in enumerate(shown) if line.startswith("notification-by-letter   stream "))
    assert shown[at + 1].split() == ["@orders"]


def test_a_wait_or_a_time_with_zone_is_understood():
    assert due("+2h") == timedelta(hours=2)
    assert due("90s") == timedelta(seconds=90)
    assert due("2026-01-31T12:00:00Z") == datetime(2026, 1, 31, 12, tzinfo=UTC)
    with pytest.raises(PublishError, match="E306"):
        due("2026-01-31T12:00:00")


@pytest.mark.parametrize("form", ["mermaid", "svg"])
def test_topology_is_written_as_mermaid_and_svg(project, form):
    drawn = project.cli("topology", "shop:system", "--format", form).out
    assert drawn.startswith({"mermaid": "flowchart LR", "svg": "<svg "}[form])
    assert "payment" in drawn
    assert project.json("topology", "shop:system")["system"] == "shop"


WIDE = """
from shop import *
from trunkline import Message

audit = Service("audit")


@audit.handle(from_=orders)
@audit.handle(from_=jobs, subscription="audit-jobs")
async def note(message: Message) -> None: ...


site = Service("site")


@site.background(publishes=(OrderPlaced, Headline))
async def serve(running) -> None: ...


system = System("wide", [audit, site])
"""


def test_topology_shows_each_subscription_of_a_function_that_reads_several_channels(project):
    (project.folder / "wide.py").write_text(WIDE)
    shown = project.cli("topology", "wide:system").out
    assert "every message  from stream orders  note()" in shown
    assert "every message  from queue jobs as audit-jobs  note()" in shown


def test_topology_and_doctor_name_a_background_task_that_says_what_it_publishes(project):
    (project.folder / "wide.py").write_text(WIDE)
    shown = project.cli("topology", "wide:system").out.splitlines()
    at = next(number for number, line in enumerate(shown) if "serve()  in the background" in line)
    assert "→ order.placed  to stream orders" in shown[at + 1]
    assert "→ headline  to topic news" in shown[at + 2]
    assert any("order.placed  site → audit" in line for line in shown)
    (link,) = [
        link
        for link in project.json("doctor", "wide:system")["links"]
        if (link["channel"], link["sender"]) == ("orders", "site")
    ]
    assert link["receiver"] == "audit"
