"""PostgreSQL, with its flushes on as they are by default."""

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

from scripts.brokers.errors import BrokerError
from scripts.brokers.kind import HOST, PASSWORD, Broker, Kind, Launch, Node, run
from scripts.brokers.packages import apt_install, find, need

FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")


class Postgres(Kind):
    """Variants: password (SCRAM-SHA-256 instead of trust)."""

    name = "postgres"
    variants: ClassVar[frozenset[str]] = frozenset({"password"})
    stop_signal = signal.SIGINT  # "fast": it does not wait for clients to leave

    def install(self, *, allowed: bool) -> None:
        """Install Debian's postgresql."""
        if find("initdb", *FOLDERS) is None:
            apt_install(["postgresql"], ["postgresql"], allowed=allowed)

    def version(self) -> str:
        """Read `postgres (PostgreSQL) 15.18 (Debian …)`."""
        return run(self._program("postgres"), "--version").split()[2]

    def _program(self, name: str) -> str:
        return need(name, "postgresql", *FOLDERS)

    def launch(self, broker: Broker, node: Node) -> Launch:
        """Make the database cluster, once; it refuses to run as root, so root hands it to another user."""
        user = _user()
        if not (node.data / "PG_VERSION").exists():
            self._initialise(broker, node, user)
        # It is known not to run. After a kill its number may still be held by a zombie, which PostgreSQL believes.
        (node.data / "postmaster.pid").unlink(missing_ok=True)
        settings = {
            "listen_addresses": HOST,
            "port": str(node.ports["client"]),
            "unix_socket_directories": "",  # a socket's path may have 107 characters only
            "max_connections": "200",
            **broker.settings,
        }
        options = [f"--{key}={value}" for key, value in settings.items()]
        return Launch((self._program("postgres"), "-D", str(node.data), *options), user=user)

    def _initialise(self, broker: Broker, node: Node, user: str | None) -> None:
        shutil.rmtree(node.data, ignore_errors=True)  # what an interrupted initdb left
        node.data.mkdir(mode=0o700)
        secret = node.folder / "password"
        secret.write_text(PASSWORD)
        if user is not None:
            shutil.chown(node.data, user)
            _check_reach(node.data, user)
        method = "scram-sha-256" if "password" in broker.variants else "trust"
        try:
            run(
                *(self._program("initdb"), "-D", str(node.data), "-U", "postgres", "-A", method, "-E", "UTF8"),
                *("--no-instructions", "--locale=C", "--pwfile", str(secret)),
                user=user,
                cwd=Path("/"),
            )
        except subprocess.CalledProcessError as error:
            raise BrokerError(f"initdb failed:\n{error.stdout[-2000:]}") from error

    def url(self, broker: Broker) -> str:
        """The database `postgres` as the superuser `postgres`."""
        secret = f":{PASSWORD}" if "password" in broker.variants else ""
        return f"postgresql://postgres{secret}@{HOST}:{broker.nodes[0].ports['client']}/postgres"

    def answers(self, broker: Broker, node: Node) -> bool:
        """pg_isready; it speaks the protocol up to the password."""
        del broker
        address = ("-h", HOST, "-p", str(node.ports["client"]), "-U", "postgres", "-d", "postgres")
        return subprocess.run((self._program("pg_isready"), "-q", "-t", "2", *address), check=False).returncode == 0


def _user() -> str | None:
    """Return whom the server runs as, None for who asks."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _check_reach(folder: Path, user: str) -> None:
    """Raise BrokerError if a user cannot get at its own folder, because of one above it."""
    try:
        run("test", "-w", str(folder), user=user, cwd=Path("/"))
    except subprocess.CalledProcessError as error:
        raise BrokerError(
            f"PostgreSQL does not run as root, and {user} cannot reach {folder};"
            " name a folder that everyone can enter: TRUNKLINE_BROKERS=/var/tmp/brokers"
        ) from error
