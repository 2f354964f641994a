"""Start, find, stop, kill and resume brokers; each has a folder with its state.

Invariant: what touches one broker holds its lock, so two commands at once start it once. Ports are chosen once and
kept as long as the folder is.
Read next: processes.py.
"""

import json
import re
import shutil
import signal
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.brokers import processes
from scripts.brokers.errors import BrokerError
from scripts.brokers.kafka import Kafka
from scripts.brokers.kind import HOST, Broker, Kind, Node
from scripts.brokers.nats import Nats
from scripts.brokers.packages import locked
from scripts.brokers.postgres import Postgres
from scripts.brokers.rabbitmq import RabbitMQ
from scripts.brokers.redis import Redis

KINDS: dict[str, Kind] = {kind.name: kind for kind in (RabbitMQ(), Redis(), Nats(), Postgres(), Kafka())}
NAME = re.compile(r"(?P<kind>[a-z]+)(?P<nodes>\d?)(:(?P<variants>[a-z,]+))?(@(?P<label>[a-z0-9-]+))?")

# Above 32767 the system hands ports to outgoing connections: RabbitMQ lost its own to one.
FIRST_PORT, PORTS = 20_000, 12_000
READY_TIMEOUT_S = 90
STOP_TIMEOUT_S = 20
POLL_S = 0.03
LOG_TAIL_BYTES = 2000


@dataclass(frozen=True)
class Name:
    """A broker's name, `kind[nodes][:variant,…][@label]`: redis, kafka3, redis:tls, nats@mine.

    Each name is a server of its own. A label only sets it apart, for a test that kills or fills it.
    """

    text: str
    kind: Kind
    nodes: int
    variants: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> "Name":
        """Raises: BrokerError if it names no kind, variant or number of nodes that there is."""
        match = NAME.fullmatch(text)
        kind = KINDS.get(match["kind"]) if match else None
        if match is None or kind is None:
            raise BrokerError(f"no broker {text!r} (have: {', '.join(KINDS)}; form: kind[nodes][:variant,…][@label])")
        variants = frozenset((match["variants"] or "").split(",")) - {""}
        if unknown := variants - kind.variants:
            raise BrokerError(f"{kind.name} has no variant {', '.join(unknown)} (have: {', '.join(kind.variants)})")
        nodes = int(match["nodes"] or 1)
        if nodes < 1 or (nodes > 1 and not kind.clusters):
            raise BrokerError(f"{text!r}: {kind.name} runs with one node only")
        return cls(text, kind, nodes, variants)

    @property
    def folder(self) -> str:
        """The name as a folder's: no sign that a class path or a configuration could take for its own."""
        return re.sub(r"[:,@]", "-", self.text)


@dataclass(frozen=True)
class Status:
    """What `status` says of one broker."""

    name: str
    state: str
    url: str
    pid: int | None
    version: str


class Brokers:
    """The brokers whose state is in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def start(self, text: str, settings: Mapping[str, str] | None = None, *, install: bool = True) -> str:
        """Start a broker unless it runs, wait until it answers, and return its URL."""
        name = Name.parse(text)
        name.kind.install(allowed=install)
        with self._locked(name):
            record = self._read(name) or self._plan(name)
            if settings is not None and settings != record["settings"]:
                if any(_alive(node) for node in record["nodes"]):
                    raise BrokerError(f"{text} runs with the settings {record['settings']}; run: stop {text}")
                record["settings"] = dict(settings)
            self._bring_up(name, record)
        return str(record["url"])

    def resume(self, text: str) -> str:
        """Start again what was stopped or killed (`NAME/2`: one node), on its ports and data."""
        name, number = self._existing(text)
        with self._locked(name):
            record = self._load(name)
            self._bring_up(name, record, number)
        return str(record["url"])

    def stop(self, text: str, *, wipe: bool = False) -> bool:
        """End a broker cleanly, by force after STOP_TIMEOUT_S; `wipe` removes its data and ports as well.

        Returns: whether anything of it ran.
        """
        name, number = self._existing(text)
        with self._locked(name):
            ran = self._end(name, number, name.kind.stop_signal)
            if wipe and number is None:
                shutil.rmtree(self.folder / name.folder)
        return ran

    def kill(self, text: str) -> None:
        """End a broker or one node by SIGKILL; its data stays as it is."""
        name, number = self._existing(text)
        with self._locked(name):
            self._end(name, number, signal.SIGKILL)

    def url(self, text: str) -> str:
        """Return the URL of a broker that was started. Raises: BrokerError if it does not run now."""
        name, _ = self._existing(text)
        record = self._load(name)
        if not all(_alive(node) for node in record["nodes"]):
            raise BrokerError(f"{text} does not run; run: start {text}")
        return str(record["url"])

    def names(self) -> list[str]:
        """Return the names of all brokers that have a folder here."""
        return [json.loads(file.read_text())["name"] for file in sorted(self.folder.glob("*/server.json"))]

    def status(self) -> list[Status]:
        """Return what all brokers do at the moment."""
        found = []
        for text in self.names():
            name = Name.parse(text)
            record = self._load(name)
            broker = self._broker(name, record)
            alive = [_alive(node) for node in record["nodes"]]
            if all(alive):
                state = "running" if all(_answers(name.kind, broker, node) for node in broker.nodes) else "silent"
            else:
                state = f"{sum(alive)} of {len(alive)} nodes" if any(alive) else "stopped"
            found.append(Status(text, state, record["url"], record["pid"], record["version"]))
        return found

    # ------------------------------------------------------------ the state in the folder

    @contextmanager
    def _locked(self, name: Name) -> Iterator[None]:
        with locked(self.folder / f"{name.folder}.lock"):
            yield

    def _file(self, name: Name) -> Path:
        return self.folder / name.folder / "server.json"

    def _read(self, name: Name) -> dict[str, Any] | None:
        file = self._file(name)
        return json.loads(file.read_text()) if file.exists() else None

    def _load(self, name: Name) -> dict[str, Any]:
        record = self._read(name)
        if record is None:
            raise BrokerError(f"{name.text} was never started here ({self.folder}); run: start {name.text}")
        return record

    def _existing(self, text: str) -> tuple[Name, int | None]:
        """Read `NAME` or `NAME/NODE` of a broker that has a folder."""
        text, _, number = text.partition("/")
        name = Name.parse(text)
        nodes = [node["number"] for node in self._load(name)["nodes"]]
        if number and number not in map(str, nodes):
            raise BrokerError(f"{text} has no node {number} (have: {', '.join(map(str, nodes))})")
        return name, int(number) if number else None

    def _write(self, name: Name, record: dict[str, Any]) -> None:
        first = record["nodes"][0]
        record["pid"] = first["pid"]
        record["port"] = next(iter(first["ports"].values()))
        file = self._file(name)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(record, indent=2) + "\n")
        part.rename(file)

    def _plan(self, name: Name) -> dict[str, Any]:
        """Choose ports and write the first record."""
        nodes: list[dict[str, Any]] = []
        record: dict[str, Any] = {"name": name.text, "url": "", "version": "", "settings": {}, "certificate": None}
        record["nodes"] = nodes
        (self.folder / name.folder).mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "ports.lock"):
            taken = {port for text in self.names() for port in _ports(self._load(Name.parse(text)))}
            free = _free_ports(f"{self.folder}/{name.text}", taken)
            for number in range(1, name.nodes + 1):
                ports = {port: next(free) for port in name.kind.ports}
                nodes.append({"number": number, "pid": None, "born": None, "ports": ports, "argv": []})
            self._write(name, record)
        return record

    def _broker(self, name: Name, record: dict[str, Any]) -> Broker:
        folder = self.folder / name.folder
        nodes = tuple(
            Node(node["number"], folder if name.nodes == 1 else folder / str(node["number"]), node["ports"])
            for node in record["nodes"]
        )
        return Broker(name.text, folder, name.variants, record["settings"], nodes)

    # ------------------------------------------------------------ processes

    def _bring_up(self, name: Name, record: dict[str, Any], number: int | None = None) -> None:
        """Start the nodes that do not run and wait until all asked for answer."""
        broker = self._broker(name, record)
        record["version"], record["url"] = name.kind.version(), name.kind.url(broker)
        chosen = [pair for pair in zip(record["nodes"], broker.nodes, strict=True) if number in {None, pair[1].number}]
        down = [(state, node) for state, node in chosen if not _alive(state)]
        with ThreadPoolExecutor(len(chosen)) as pool:
            list(pool.map(lambda pair: _spawn(name.kind, broker, *pair), down))
        record["certificate"] = str(broker.certificate) if broker.certificate.exists() else None
        self._write(name, record)
        try:
            for state, node in chosen:
                _wait_until_ready(name.kind, broker, node, state)
        except BrokerError:
            for state, _ in down:
                _end(state, signal.SIGKILL)
            self._write(name, record)
            raise

    def _end(self, name: Name, number: int | None, by: signal.Signals) -> bool:
        """End the nodes that run; return whether any did."""
        record = self._load(name)
        chosen = [state for state in record["nodes"] if number in {None, state["number"]}]
        ran = any(map(_alive, chosen))
        with ThreadPoolExecutor(len(chosen)) as pool:
            list(pool.map(lambda state: _end(state, by), chosen))
        self._write(name, record)
        return ran


def _spawn(kind: Kind, broker: Broker, state: dict[str, Any], node: Node) -> None:
    node.data.mkdir(parents=True, exist_ok=True)
    launch = kind.launch(broker, node)
    process = processes.spawn(launch, node.folder / "log", node.folder)
    state.update(pid=process.pid, born=processes.birth(process.pid), argv=list(launch.argv))
    process.returncode = 0  # it is to outlive this command: no warning about that


def _alive(state: dict[str, Any]) -> bool:
    return state["pid"] is not None and state["born"] is not None and processes.is_alive(state["pid"], state["born"])


def _end(state: dict[str, Any], by: signal.Signals) -> None:
    if _alive(state):
        processes.end(state["pid"], state["born"], by, STOP_TIMEOUT_S)
    state.update(pid=None, born=None)


def _answers(kind: Kind, broker: Broker, node: Node) -> bool:
    try:
        return kind.answers(broker, node)
    except (OSError, ValueError):  # nothing listens yet, or what it says is cut off
        return False


def _wait_until_ready(kind: Kind, broker: Broker, node: Node, state: dict[str, Any]) -> None:
    until = time.monotonic() + READY_TIMEOUT_S
    while not _answers(kind, broker, node):
        if not _alive(state):
            raise BrokerError(f"{broker.name} ended while it started; {_log_tail(node)}")
        if time.monotonic() > until:
            raise BrokerError(f"{broker.name} does not answer after {READY_TIMEOUT_S} s; {_log_tail(node)}")
        time.sleep(POLL_S)


def _log_tail(node: Node) -> str:
    log = node.folder / "log"
    text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if log.exists() else ""
    return f"its log, {log}, ends with:\n{text}"


def _ports(record: dict[str, Any]) -> set[int]:
    return {port for node in record["nodes"] for port in node["ports"].values()}


def _free_ports(seed: str, taken: set[int]) -> Iterator[int]:
    """Yield ports that nobody listens on; different folders begin at different places."""
    start = zlib.crc32(seed.encode())
    for offset in range(PORTS):
        port = FIRST_PORT + (start + offset) % PORTS
        if port not in taken and _is_free(port):
            yield port
    raise BrokerError(f"no free port between {FIRST_PORT} and {FIRST_PORT + PORTS}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
