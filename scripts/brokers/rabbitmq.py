"""RabbitMQ, with its own Erlang port mapper, apart from any other RabbitMQ on the machine."""

import ssl
from pathlib import Path
from typing import ClassVar

from scripts.brokers.kind import HOST, Broker, Kind, Launch, Node, connect, receive, run
from scripts.brokers.packages import apt_install, find, need

# Debian's command on PATH runs as root or rabbitmq only; this is the script beneath it.
FOLDERS = ("/usr/lib/rabbitmq/bin",)
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
CONNECTION_START = b"\x00\x0a\x00\x0a"
FRAME_HEADER_BYTES = 7

# The port mapper is started first, in the foreground: otherwise Erlang starts one that outlives the broker.
START = 'epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 >/dev/null 2>&1 & exec "$0"'
# Schedulers that wait do not spin: other servers share the cores.
ERLANG = "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"


class RabbitMQ(Kind):
    """Variants: tls. No plugins."""

    name = "rabbitmq"
    ports = ("client", "distribution", "mapper")
    variants: ClassVar[frozenset[str]] = frozenset({"tls"})

    def install(self, *, allowed: bool) -> None:
        """Install Debian's rabbitmq-server."""
        if find("rabbitmq-server", *FOLDERS) is None:
            apt_install(["rabbitmq-server"], ["rabbitmq-server", "epmd.socket", "epmd"], allowed=allowed)

    def _server(self) -> str:
        return need("rabbitmq-server", "rabbitmq-server", *FOLDERS)

    def version(self) -> str:
        """Read it from the installation's folder, `rabbitmq_server-3.10.8`: asking would start an Erlang machine."""
        home = Path(self._server()).resolve().parents[1]
        _, _, version = home.name.partition("-")
        return version or run("rabbitmqctl", "version").strip()

    def launch(self, broker: Broker, node: Node) -> Launch:
        """Write rabbitmq.conf."""
        client = f"{HOST}:{node.ports['client']}"
        lines = ["log.console = true", "log.console.level = warning", "log.file = false"]
        if "tls" in broker.variants:
            broker.make_certificate()
            lines += ["listeners.tcp = none", f"listeners.ssl.1 = {client}"]
            lines += [f"ssl_options.certfile = {broker.certificate}", f"ssl_options.keyfile = {broker.key}"]
        else:
            lines.append(f"listeners.tcp.1 = {client}")
        config = node.folder / "rabbitmq.conf"
        config.write_text("\n".join([*lines, *broker.lines(" = "), ""]))
        (node.folder / "plugins").write_text("[].\n")
        (node.folder / "env.conf").touch()
        env = {
            "HOME": str(node.folder),  # of the Erlang cookie
            "ERL_EPMD_PORT": str(node.ports["mapper"]),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_NODENAME": f"trunkline{node.number}@localhost",
            "RABBITMQ_CONF_ENV_FILE": str(node.folder / "env.conf"),
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(node.folder / "plugins"),
            "RABBITMQ_DIST_PORT": str(node.ports["distribution"]),
            "RABBITMQ_MNESIA_BASE": str(node.data),
            "RABBITMQ_LOG_BASE": str(node.folder),
            "RABBITMQ_PID_FILE": str(node.folder / "rabbitmq.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG,
            "RUNNING_UNDER_SYSTEMD": "1",  # the script becomes the server instead of its parent
        }
        return Launch(("/bin/sh", "-c", START, self._server()), env)

    def url(self, broker: Broker) -> str:
        """The virtual host `/`."""
        scheme = "amqps" if "tls" in broker.variants else "amqp"
        return f"{scheme}://guest:guest@{HOST}:{broker.nodes[0].ports['client']}/"

    def answers(self, broker: Broker, node: Node) -> bool:
        """The protocol header must be answered by connection.start (AMQP 0-9-1, 2.2.4)."""
        with connect(node.ports["client"]) as peer:
            if "tls" in broker.variants:
                peer = ssl.create_default_context(cafile=str(broker.certificate)).wrap_socket(  # noqa: PLW2901
                    peer, server_hostname=HOST
                )
            peer.sendall(PROTOCOL_HEADER)
            return receive(peer, FRAME_HEADER_BYTES + 4)[FRAME_HEADER_BYTES:] == CONNECTION_START
