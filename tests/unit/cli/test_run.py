"""`trunkline run` as an operator uses it: real processes, signals, deaths."""

import os
import re
import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest

from tests.unit.cli.conftest import DEADLINE_S, wait_until
from trunkline.cli.supervisor import HEALTHY_S, LONGEST_DELAY_S, restart_delay

pytestmark = pytest.mark.timeout(120)


def pids(project):
    """Return worker number → pid of its latest start."""
    return {int(n): int(pid) for n, pid in re.findall(r"worker (\d) started, pid (\d+)", project.log())}


def paid(project):
    with closing(sqlite3.connect(project.folder / "trunkline.db")) as connection:
        return connection.execute("SELECT order_id, amount FROM paid ORDER BY n").fetchall()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_handles_messages_and_a_signal_ends_it_with_0(project):
    with project.running("shop:system") as process:
        project.publish("OrderPlaced", {"order_id": "7", "amount": 3})
        wait_until(lambda: paid(project) == [("7", 3)], "the order is paid")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert "Traceback" not in project.log()


def test_sigterm_ends_a_start_that_waits_for_its_broker(project):
    url = "amqp://127.0.0.1:1/?timeout_s=3600"
    arguments = ("shop:system", "--transport", url, "--store", "sqlite:///own.db")
    with project.running(*arguments, started="no connection") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


def test_only_runs_the_named_service(project):
    with project.running("shop:system", "--only", "shipping"):
        assert {row["subscription"] for row in project.json("backlog")} == {"shipping@jobs", "shipping@news"}
    assert "shop runs on sqlite:///trunkline.db: shipping\n" in project.log()


def test_an_unknown_service_is_refused_with_those_there_are(project):
    shown = project.cli("run", "shop:system", "--only", "nope", code=2).err
    assert "E112 no service 'nope'" in shown
    assert "payment, shipping" in shown


def test_an_app_brings_its_own_transport(project):
    (project.folder / "own.py").write_text(
        "from trunkline import App\nfrom shop import system\napp = App(system, 'sqlite:///own.db')\n"
    )
    with project.running("own:app"):
        assert (project.folder / "own.db").exists()
    assert not (project.folder / "trunkline.db").exists()
    assert "E215" in project.cli("run", "own:app", "--transport", "sqlite:///x.db", code=2).err


def test_a_start_names_the_store_that_is_not_the_transports_own(project):
    with project.running("shop:system", "--store", "sqlite:///state.db", started="runs on"):
        pass
    assert "shop runs on sqlite:///trunkline.db with the store sqlite:///state.db: payment, shipping\n" in project.log()


@pytest.mark.parametrize("more", [[], ["--reload"], ["--transport", "sqlite:///a.db", "--store", "memory:"]])
def test_memory_is_not_shared_by_several_workers(project, more):
    places = more if "--store" in more else ["--transport", "memory:", *more]
    assert (
        "E251 memory: is the memory of one process; each of 2"
        in project.cli("run", "shop:system", "--workers", "2", *places, code=2).err
    )


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_wrong_transport_ends_with_2(project, workers):
    assert "E202" in project.cli("run", "shop:system", "--transport", "nope://x", *workers, code=2).err


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("nowhere/shop.db", "nowhere of shop.db does not exist"),
        ("shop.py/shop.db", "shop.py is no folder for shop.db"),
        ("__pycache__", "__pycache__ is a directory"),
    ],
)
def test_a_place_where_no_file_can_be_ends_with_2_so_that_nobody_tries_it_for_ever(project, place, text):
    (project.folder / "__pycache__").mkdir()
    shown = project.cli("run", "shop:system", "--transport", f"sqlite:///{place}", code=2).err.splitlines()
    (line,) = [line for line in shown if line.startswith("E225 ")]
    assert line.endswith(text)


def test_declarations_that_cannot_run_end_with_2(project):
    (project.folder / "endless.py").write_text(
        "from shop import *\nround = Service('round')\n"
        "@round.handle\nasync def again(order: OrderPaid) -> OrderPaid: ...\n"
    )
    assert "E105" in project.cli("run", "endless:round", code=2).err
    shown = project.cli("topology", "endless:round")
    assert shown.err.startswith("warning: this cannot run: E105 a cycle without end: OrderPaid")
    assert "order.paid  from stream orders  again()" in shown.out


def test_a_schema_that_the_database_refuses_ends_with_2(project):
    (project.folder / "wrong.py").write_text("from shop import *\npayment.schema('CREATE TABEL x (n)')\n")
    said = project.cli("run", "wrong:payment", code=2).err.replace("\n", " ")
    assert "E121 the schema of service 'payment' is refused: SQLError: near \"TABEL\": syntax error" in said
    assert "mend the statement in payment.schema(...)" in said


def test_a_system_that_has_nothing_to_do_says_so(project):
    (project.folder / "idle.py").write_text("from trunkline import Service\nmail = Service('mail')\n")
    with project.running("idle:mail"):
        wait_until(lambda: "mail has nothing to do, no handler is declared" in project.log(), "the warning")


def test_a_background_task_that_fails_ends_with_1_and_its_traceback_in_the_log(project):
    (project.folder / "failing.py").write_text(
        "from shop import payment\n@payment.background\nasync def web(running):\n    raise OSError('port is taken')\n"
    )
    shown = project.cli("run", "failing:payment", code=1).err
    assert shown.rstrip().splitlines()[-1] == "payment failed: OSError: port is taken; its traceback is in the log"
    assert 'failing.py", line 4' in shown


def test_a_killed_worker_is_started_again_and_the_work_goes_on(project):
    with project.running("shop:system", "--workers", "2") as process:
        wait_until(lambda: project.log().count("runs on") == 2, "both workers are up")
        first = pids(project)
        os.kill(first[1], signal.SIGKILL)
        wait_until(lambda: "worker 1 was killed by SIGKILL; starting again in 0.5 s" in project.log(), "it is noticed")
        wait_until(lambda: project.log().count("runs on") == 3, "it is up again")
        assert pids(project)[2] == first[2]
        project.publish("OrderPlaced", *({"order_id": str(n), "amount": n} for n in range(20)))
        wait_until(lambda: len(paid(project)) == 20, "all orders are paid")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert all(gone(pid) for pid in pids(project).values())
    assert sorted(amount for _, amount in paid(project)) == list(range(20))


def test_workers_stop_when_their_supervisor_is_killed(project):
    with project.running("shop:system", "--workers", "2") as process:
        wait_until(lambda: project.log().count("runs on") == 2, "both workers are up")
        process.kill()
        process.wait(DEADLINE_S)
        wait_until(lambda: all(gone(pid) for pid in pids(project).values()), "the workers are gone")
    assert project.log().count("the supervisor is gone; stopping") == 2


def test_ctrl_c_reaches_each_worker_once_so_that_it_drains(project):
    with (project.folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            project.command("run", "shop:system", "--workers", "2"),
            cwd=project.folder,
            env=project.environment(),
            stderr=log,
            start_new_session=True,
        )
    wait_until(lambda: project.log().count("runs on") == 2, "both workers are up")
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.wait(DEADLINE_S) == 0
    assert project.log().count("ended with exit code 0") == 2


def test_a_worker_that_keeps_dying_is_started_ever_more_slowly(project):
    (project.folder / "dying.py").write_text(
        "from shop import payment\n@payment.background\nasync def die(running):\n    raise SystemExit(3)\n"
    )
    with project.running("dying:payment", "--workers", "2", started="starting again in 1.0 s"):
        log = project.log()
        assert log.index("starting again in 0.5 s") < log.index("starting again in 1.0 s")


def test_the_wait_before_a_restart_doubles_up_to_its_longest():
    waits = [restart_delay(failures) for failures in range(1, 200)]
    assert waits == sorted(waits)
    assert waits[0] == 0.5
    assert waits[-1] == LONGEST_DELAY_S < HEALTHY_S


def test_reload_restarts_when_a_source_changes(project):
    with project.running("shop:system", "--reload"):
        source = (project.folder / "shop.py").read_text()
        (project.folder / "shop.py").write_text(source.replace("is below zero", "is too low"))
        wait_until(lambda: project.log().count("runs on") == 2, "it is up again")
        assert "changed: shop.py; restarting" in project.log()
        project.publish("OrderPlaced", {"order_id": "7", "amount": -1})
        wait_until(
            lambda: [row["reason"] for row in project.dead()] == ["ValueError: amount -1 is too low"], "new code runs"
        )


def test_reload_waits_for_the_correction_of_a_source_that_does_not_import(project):
    source = (project.folder / "shop.py").read_text()
    (project.folder / "shop.py").write_text("1 / 0\n" + source)
    with project.running("shop:system", "--reload", started="starting again when a source changes"):
        (project.folder / "shop.py").write_text(source)
        wait_until(lambda: "runs on" in project.log(), "it is up")
