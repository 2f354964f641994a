"""The servers that all other tests with servers rest on: scripts/brokers.

Each kind goes through one life, because some take seconds to start; the tests look at what it left behind.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass

import pytest

from scripts.brokers.errors import BrokerError
from scripts.brokers.lifecycle import KINDS, Name
from scripts.brokers.packages import download_jars, locked
from tests import brokers
from tests.faults.broker_wire import WIRES
from tests.faults.processes import until

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")

pytestmark = pytest.mark.timeout(300)
each_kind = pytest.mark.parametrize("kind", WIRES)


@dataclass
class Life:
    """What was seen of a broker that was started, started again, killed, resumed and stopped."""

    url: str
    url_again: str
    url_resumed: str
    pid: int
    pid_again: int
    data_was_there: bool
    ports_in_use: list[int]
    ports_after_kill: list[int]
    ports_after_stop: list[int]
    left_after_stop: list[int]


@pytest.fixture
def life(kind, tmp_path_factory):
    """The life of this kind, lived by the first test of all workers that asks."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder if WORKER == "alone" else folder.parent) / f"life-{kind}.json"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            file.write_text(json.dumps(asdict(live(kind))))
    return Life(**json.loads(file.read_text()))


def live(kind) -> Life:
    name, wire = f"{kind}@life", WIRES[kind]
    forget(name)
    try:
        url = brokers.broker_url(name)
        first = brokers.record(name)
        brokers.broker_url.cache_clear()
        url_again = brokers.broker_url(name)
        pid_again = brokers.record(name)["pid"]
        wire.write(url)
        until(lambda: wire.is_written(brokers.folder(name) / "data"), "what was confirmed in the files")
        in_use = listening(first)
        brokers.kill(name)
        after_kill = listening(first)
        url_resumed = brokers.resume(name)
        there = wire.is_there(url)
        pids = [first["pid"], brokers.record(name)["pid"]]
        brokers.stop(name)
        left = [pid for pid in pids if is_running(pid)]
        return Life(
            *(url, url_again, url_resumed, first["pid"], pid_again),
            *(there, in_use, after_kill, listening(first), left),
        )
    finally:
        forget(name)


def forget(name):
    if (brokers.folder(name) / "server.json").exists():
        brokers.stop(name, wipe=True)


def listening(record):
    def answers(port):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return [port for node in record["nodes"] for port in node["ports"].values() if answers(port)]


def is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE, text=True, check=False).stdout
    return bool(state) and not state.startswith("Z")


@pytest.fixture
def name():
    name = f"redis@one-{WORKER}"
    forget(name)
    yield name
    forget(name)


def test_every_kind_of_broker_lives_here():
    assert set(KINDS) == set(WIRES)


@each_kind
def test_a_started_broker_listens_on_all_its_ports_below_the_ephemeral_range(kind, life):
    assert len(life.ports_in_use) == len(KINDS[kind].ports)
    assert max(life.ports_in_use) < 32_768


@each_kind
def test_a_second_start_finds_the_one_that_runs(kind, life):
    assert (life.url_again, life.pid_again) == (life.url, life.pid)


@each_kind
def test_kill_leaves_nothing_that_listens(kind, life):
    assert life.ports_after_kill == []


@each_kind
def test_after_kill_and_resume_the_url_is_the_same_and_what_was_written_is_there(kind, life):
    assert life.url_resumed == life.url
    assert life.data_was_there


@each_kind
def test_stop_leaves_no_process_and_no_port(kind, life):
    assert life.ports_after_stop == []
    assert life.left_after_stop == []


def test_two_starts_at_once_start_one_server(name):
    brokers.broker_url(name)  # so that nothing is left to install
    brokers.stop(name, wipe=True)
    start = [sys.executable, "-m", "scripts.brokers", "start", name]
    both = [subprocess.Popen(start, cwd=brokers.ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    urls = {process.communicate()[0] for process in both}
    assert len(urls) == 1
    assert [process.returncode for process in both] == [0, 0]
    servers = subprocess.run(["ps", "-A", "-o", "args="], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert servers.count(f"redis-server 127.0.0.1:{brokers.record(name)['port']}") == 1


def test_a_server_that_cannot_start_is_told_with_its_log_and_leaves_nothing(name):
    with pytest.raises(RuntimeError, match=r"(?s)ended while it started.*nonsense"):
        brokers.broker_url(name, "nonsense=1")
    assert brokers.record(name)["pid"] is None


def test_other_settings_for_one_that_runs_are_refused(name):
    brokers.broker_url(name, "maxmemory=64mb")
    with pytest.raises(RuntimeError, match="maxmemory"):
        brokers.broker_url(name, "maxmemory=32mb")


def test_stop_names_each_broker_that_it_stopped(name):
    brokers.broker_url(name)
    assert brokers.command("stop", name) == f"{name}\tstopped\n"
    assert brokers.command("stop", name) == "nothing ran\n"


def test_stop_leaves_a_stranger_alone_who_got_the_number_of_a_server_that_is_gone(name):
    brokers.broker_url(name)
    brokers.kill(name)
    record = brokers.record(name)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        record["nodes"][0].update(pid=stranger.pid, born="1")
        (brokers.folder(name) / "server.json").write_text(json.dumps(record))
        brokers.stop(name)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.parametrize("text", ["mysql", "redis:cluster", "redis3", "kafka0", "redis/1", "redis@A/../b"])
def test_a_name_that_means_nothing_is_refused(text):
    with pytest.raises(BrokerError):
        Name.parse(text)


def test_a_jar_that_is_not_the_locked_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUNKLINE_CACHE", str(tmp_path))
    monkeypatch.setenv("MAVEN_REPOSITORY", tmp_path.as_uri())
    (tmp_path / "a.jar").write_bytes(b"changed on the way")
    with pytest.raises(BrokerError, match="SHA-256"):
        download_jars({"a.jar": hashlib.sha256(b"as locked").hexdigest()}, tmp_path / "jars", allowed=True)
    assert list((tmp_path / "jars").iterdir()) == []


def test_nothing_is_installed_where_that_is_not_allowed(tmp_path):
    with pytest.raises(BrokerError, match="make brokers"):
        download_jars({"a.jar": ""}, tmp_path / "jars", allowed=False)
