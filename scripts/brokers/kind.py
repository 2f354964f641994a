"""What a kind of broker must say of itself, and the facts it is given.

Invariant: a kind writes only into the folders it is handed, and starts nothing that outlives its launch.
Read next: redis.py (the shortest kind).
"""

import signal
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

HOST = "127.0.0.1"
USER = "trunkline"
PASSWORD = "secret"  # noqa: S105 - of servers on loopback, for tests
PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Node:
    """One process of a broker: its number from 1, its folder, the ports it listens on."""

    number: int
    folder: Path
    ports: Mapping[str, int]

    @property
    def data(self) -> Path:
        """Where the node keeps what must survive a restart."""
        return self.folder / "data"


@dataclass(frozen=True)
class Broker:
    """One broker as it was asked for."""

    name: str
    folder: Path
    variants: frozenset[str]
    settings: Mapping[str, str]
    nodes: tuple[Node, ...]

    @property
    def certificate(self) -> Path:
        """The certificate of a TLS variant; it signed itself, so a client takes it as its CA file."""
        return self.folder / "tls" / "server.crt"

    @property
    def key(self) -> Path:
        """The private key of `certificate`."""
        return self.folder / "tls" / "server.key"

    def lines(self, separator: str) -> list[str]:
        """The settings asked for, as lines of a configuration file."""
        return [f"{key}{separator}{value}" for key, value in self.settings.items()]

    def make_certificate(self) -> None:
        """Make `certificate` and `key` unless they exist."""
        if self.certificate.exists():
            return
        self.key.parent.mkdir(parents=True, exist_ok=True)
        names = f"subjectAltName=DNS:localhost,IP:{HOST}"
        usage = "keyUsage=critical,digitalSignature,keyCertSign"
        run(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "3650", "-subj", "/CN=localhost", "-addext", names, "-addext", usage),
            *("-keyout", str(self.key), "-out", str(self.certificate)),
        )


@dataclass(frozen=True)
class Launch:
    """How to start one node; `user` is None where it runs as who asks."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None


class Kind(ABC):
    """One kind of broker."""

    name: ClassVar[str]
    ports: ClassVar[tuple[str, ...]] = ("client",)
    """The ports of a node; the first is the one clients connect to."""
    variants: ClassVar[frozenset[str]] = frozenset()
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    clusters: ClassVar[bool] = False

    @abstractmethod
    def install(self, *, allowed: bool) -> None:
        """Install what is missing. Raises: MissingError if that is not allowed or not possible."""

    @abstractmethod
    def version(self) -> str:
        """Return the version that `install` has left."""

    @abstractmethod
    def launch(self, broker: Broker, node: Node) -> Launch:
        """Write the node's configuration, its first data if it has none, and return how to start it."""

    @abstractmethod
    def url(self, broker: Broker) -> str:
        """Return the URL that clients are given."""

    @abstractmethod
    def answers(self, broker: Broker, node: Node) -> bool:
        """Say whether the node serves clients now, by its own protocol. Raises: OSError if nothing listens."""


def connect(port: int) -> socket.socket:
    """Connect to a node's port; every answer must come within PROBE_TIMEOUT_S."""
    return socket.create_connection((HOST, port), timeout=PROBE_TIMEOUT_S)


def receive(peer: socket.socket, size_bytes: int) -> bytes:
    """Return exactly `size_bytes`. Raises: ConnectionError if the peer closes before."""
    data = b""
    while len(data) < size_bytes:
        chunk = peer.recv(size_bytes - len(data))
        if not chunk:
            raise ConnectionError(f"closed after {len(data)} of {size_bytes} bytes")
        data += chunk
    return data


def run(*argv: str, user: str | None = None, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command to its end and return what it printed. Raises: subprocess.CalledProcessError with all output."""
    done = subprocess.run(
        argv,
        user=user,
        group=None if user is None else group_of(user),
        extra_groups=None if user is None else [],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


def group_of(user: str) -> int:
    """Return the number of a user's own group."""
    import pwd

    return pwd.getpwnam(user).pw_gid
