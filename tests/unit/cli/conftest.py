"""A project folder with a small shop, commands in it, and services that really run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from trunkline.cli import commands

SHOP = """
from trunkline import Context, Queue, Retry, RetryLaterError, Service, Stream, Struct, System, Topic

orders = Stream("orders", key="order_id")
jobs = Queue("jobs", priority=True)
news = Topic("news")


@orders.event
class OrderPlaced(Struct):
    order_id: str
    amount: int


@orders.event
class OrderPaid(Struct):
    order_id: str


@jobs.command
class Ship(Struct):
    order_id: str


@news.event
class Headline(Struct):
    text: str


payment = Service("payment")
payment.schema("CREATE TABLE IF NOT EXISTS paid (n INTEGER PRIMARY KEY, order_id TEXT, amount INTEGER)")


@payment.handle(retry=Retry(immediate=0, delays_s=()))
async def pay(order: OrderPlaced, ctx: Context) -> OrderPaid:
    if order.amount < 0:
        raise ValueError(f"amount {order.amount} is below zero")
    if order.amount == 999:
        raise RetryLaterError(3600, "the bank is closed")
    transaction = await ctx.transaction()
    await transaction.execute("INSERT INTO paid (order_id, amount) VALUES (?, ?)", (order.order_id, order.amount))
    return OrderPaid(order.order_id)


shipping = Service("shipping")


@shipping.handle
async def ship(job: Ship) -> None: ...


@shipping.handle
async def read(news: Headline) -> None: ...


system = System("shop", [payment, shipping])
"""
DEADLINE_S = 30.0


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for something that other processes bring about."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)


class Project:
    """A folder with shop.py, where commands run in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "shop.py").write_text(SHOP)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if "TRUNKLINE" not in name}
        return kept | {"NO_COLOR": "1", "COLUMNS": "120"} | more

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "trunkline.cli", *arguments]

    def cli(self, *arguments: str, stdin: str | None = None, code: int = 0, **environment: str) -> SimpleNamespace:
        """Run one command to its end; its exit code must be `code`.

        Commands that import no module of the project run in this process, which is ten times as fast.
        """
        imports = "shop:system" in arguments or (self.folder / "trunkline.toml").exists()
        looks = {"dead", "parked", "outbox", "backlog", "tail", "new"} & set(arguments[:1])
        run = self._here if looks and not imports else self._apart
        out, err, exit_code = run(arguments, stdin, self.environment(**environment))
        assert exit_code == code, f"{arguments}: {exit_code}\n{out}{err}"
        return SimpleNamespace(out=out, err=err)

    def _apart(
        self, arguments: tuple[str, ...], stdin: str | None, environment: dict[str, str]
    ) -> tuple[str, str, int]:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=environment,
            input=stdin or "",
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        return done.stdout, done.stderr, done.returncode

    def _here(self, arguments: tuple[str, ...], stdin: str | None, environment: dict[str, str]) -> tuple[str, str, int]:
        unset = {name: None for name in os.environ if name not in environment}
        with contextlib.chdir(self.folder):
            done = CliRunner().invoke(commands.app, arguments, input=stdin, env={**unset, **environment})
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout, done.stderr, done.exit_code

    def json(self, *arguments: str, **options: Any) -> Any:
        return json.loads(self.cli(*arguments, "--json", **options).out)

    def publish(self, type_name: str, *payloads: dict[str, Any]) -> list[str]:
        lines = "\n".join(json.dumps(payload) for payload in payloads)
        ids: list[str] = self.cli("publish", "shop:system", type_name, "-", stdin=lines).out.split()
        return ids

    def dead(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.json("dead", "list")
        return found

    def log(self) -> str:
        return (self.folder / "run.log").read_text()

    @contextlib.contextmanager
    def running(self, *arguments: str, started: str = "runs on") -> Iterator[subprocess.Popen[bytes]]:
        """Run `trunkline run` beside the test; ended at the end, whatever happened."""
        with (self.folder / "run.log").open("wb") as log:
            process = subprocess.Popen(
                self.command("run", *arguments),
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: started in self.log() or process.poll() is not None, started)
            assert process.poll() is None, self.log()
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(DEADLINE_S)


def _has_dead(project: Project, number: int) -> bool:
    return len(project.dead()) == number


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="session")
def buried(tmp_path_factory):
    """A project whose file has dead letters: 1 and 2 without anything behind, 3 with two orders behind it."""
    project = Project(tmp_path_factory.mktemp("buried"))
    with project.running("shop:system"):
        for number, order in ((1, "a"), (2, "b")):
            project.publish("OrderPlaced", {"order_id": order, "amount": -number})
            wait_until(partial(_has_dead, project, number), f"dead letter {number}")
        project.publish("OrderPlaced", *({"order_id": "c", "amount": amount} for amount in (-3, 4, 5)))
        wait_until(lambda: len(project.dead()) == 3 and project.dead()[2]["waiting_behind"] == 2, "two behind")
    return project


@pytest.fixture(scope="session")
def parked(tmp_path_factory):
    """A project whose file has parked messages: of order `a` with two behind it, then of order `b`."""
    project = Project(tmp_path_factory.mktemp("parked"))
    with project.running("shop:system"):
        project.publish("OrderPlaced", *({"order_id": "a", "amount": amount} for amount in (999, 4, 5)))
        wait_until(lambda: _counts(project)["parked"] == 3, "one parked and two behind it")
        project.publish("OrderPlaced", {"order_id": "b", "amount": 999})
        wait_until(lambda: _counts(project)["parked"] == 4, "another one parked")
    return project


def _counts(project: Project) -> dict[str, Any]:
    return next(row for row in project.json("backlog") if row["subscription"] == "payment@orders")


@pytest.fixture(scope="session")
def used_once(tmp_path_factory):
    """A project whose file exists and is empty; nothing runs."""
    project = Project(tmp_path_factory.mktemp("used"))
    with project.running("shop:system"):
        pass
    return project


@pytest.fixture
def used(used_once, tmp_path):
    """A copy of `used_once` to change."""
    return copied(used_once, tmp_path)


@pytest.fixture
def buried_copy(buried, tmp_path):
    """A copy of `buried` to change."""
    return copied(buried, tmp_path)


def copied(project: Project, folder: Path) -> Project:
    """Return a project with a copy of the file of another one, to change."""
    for path in project.folder.glob("trunkline.db*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return Project(folder)
