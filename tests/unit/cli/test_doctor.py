"""The doctor on good and bad files."""

import json
import os
import signal

import pytest

from tests.unit.cli.conftest import wait_until
from trunkline.cli.checks import file_system, judge_file_system

pytestmark = pytest.mark.timeout(120)


def statuses(report):
    return {check["name"]: check["status"] for check in report["checks"]}


def test_all_is_well_while_a_service_runs(project):
    with project.running("shop:system"):
        report = project.json("doctor", "shop:system")
    assert set(statuses(report).values()) == {"ok"}
    processes = next(check for check in report["checks"] if check["name"] == "processes")
    assert processes["found"].startswith("1 alive: pid ")


def test_no_line_in_a_pipe_ends_with_blanks(project):
    shown = project.cli("doctor", "shop:system").out
    assert [line for line in shown.splitlines() if line != line.rstrip()] == []


def test_each_link_says_what_is_kept(project):
    report = project.json("doctor", "shop:system")
    links = {(link["sender"], link["channel"], link["receiver"]): link for link in report["links"]}
    link = links["outside", "orders", "payment"]
    assert link["guarantee"] == "effects once: one commit; in order per order_id"
    assert link["limit"] == "one machine, one disk"
    assert "broker" in link["next_step"]
    other = project.json("doctor", "shop:system", "--store", "sqlite:///store.db")["links"][0]
    assert other["guarantee"].startswith("effects once: outbox, inbox")


def test_a_file_that_is_yet_to_be_made_is_a_remark_and_is_not_made(project):
    report = project.json("doctor")
    assert statuses(report)["file"] == "warn"
    assert not (project.folder / "trunkline.db").exists()


def test_a_damaged_file_is_found_and_ends_with_1(buried_copy):
    path = buried_copy.folder / "trunkline.db"
    content = bytearray(path.read_bytes())
    pages = len(content) // 4096
    for page in range(1, pages):
        content[page * 4096 : page * 4096 + 16] = b"\xff" * 16
    path.write_bytes(content)
    report = json.loads(buried_copy.cli("doctor", "--json", code=1).out)
    assert "fail" in statuses(report).values()


def test_a_folder_that_is_not_there_is_wrong(project):
    shown = project.cli("doctor", "--transport", "sqlite:///nowhere/shop.db", code=1).out
    assert "FAIL" in shown
    assert "nowhere does not exist" in shown


def test_a_directory_in_place_of_the_file_is_wrong(project):
    (project.folder / "data").mkdir()
    assert "data is a directory" in project.cli("doctor", "--transport", "sqlite:///data", code=1).out


def test_an_unknown_transport_is_wrong_once_and_not_its_store_and_server_too(project):
    shown = project.cli("doctor", "--transport", "nope://x", code=1).out
    assert "E202 no transport for 'nope'" in shown
    assert "no store for 'nope'" not in shown
    assert "server nope://x" not in shown
    assert shown.endswith("\n1 wrong, 0 to look at\n")


def test_an_unknown_store_is_wrong_beside_a_transport_that_is_not(project):
    shown = project.cli("doctor", "--store", "nope://x", code=1).out
    assert "E202 no store for 'nope'" in shown


def test_declarations_that_cannot_run_are_wrong(project):
    (project.folder / "late.py").write_text(
        "from shop import *\nlate = Service('late')\n"
        "@late.handle(retry=Retry(delays_s=(8 * 24 * 3600.0,)))\nasync def slow(order: OrderPaid) -> None: ...\n"
    )
    report = json.loads(project.cli("doctor", "late:late", "--json", code=1).out)
    assert statuses(report)["inbox window"] == "fail"


def test_a_process_that_died_is_told_from_one_that_lives(project):
    with project.running("shop:system") as process:
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: process.poll() is not None, "it is dead")
        report = project.json("doctor")
    assert statuses(report)["died"] == "warn"
    assert next(check for check in report["checks"] if check["name"] == "processes")["found"] == "0 alive"


MOUNTS = [
    "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw",
    "30 22 0:40 / /mnt/share rw - nfs4 server:/x rw",
    "31 22 0:41 / /mnt/with\\040space rw - tmpfs tmpfs rw",
]


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/srv", "ext4"),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/a/b", "nfs4"),
        ("/mnt/shared", "ext4"),
        ("/mnt/with space", "tmpfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(folder, kind):
    assert file_system(folder, MOUNTS) == kind


@pytest.mark.parametrize(
    ("kind", "status"),
    [("ext4", "ok"), ("overlay", "ok"), ("tmpfs", "warn"), (None, "warn"), ("nfs4", "fail"), ("fuse.sshfs", "fail")],
)
def test_a_network_file_system_is_wrong_and_a_volatile_one_a_remark(kind, status):
    assert judge_file_system(kind)[0] == status
