"""Redis: every write is on disk before it is answered, unless a variant says otherwise."""

import ssl
from typing import ClassVar

from scripts.brokers.kind import HOST, PASSWORD, Broker, Kind, Launch, Node, connect, run
from scripts.brokers.packages import apt_install, find, need


class Redis(Kind):
    """Variants: password, tls, everysec (flushed once a second), memory (nothing on disk)."""

    name = "redis"
    variants: ClassVar[frozenset[str]] = frozenset({"password", "tls", "everysec", "memory"})

    def install(self, *, allowed: bool) -> None:
        """Install Debian's redis-server."""
        if find("redis-server") is None:
            apt_install(["redis-server"], ["redis-server"], allowed=allowed)

    def version(self) -> str:
        """Read `v=7.0.15` from what the server prints."""
        words = run(need("redis-server", "redis-server"), "--version").split()
        return next(word.removeprefix("v=") for word in words if word.startswith("v="))

    def launch(self, broker: Broker, node: Node) -> Launch:
        """Write redis.conf."""
        port = node.ports["client"]
        lines = [f"bind {HOST}", "daemonize no", f"dir {node.data}", 'save ""']
        lines.append(f"appendonly {'no' if 'memory' in broker.variants else 'yes'}")
        lines.append(f"appendfsync {'everysec' if 'everysec' in broker.variants else 'always'}")
        if "password" in broker.variants:
            lines.append(f"requirepass {PASSWORD}")
        if "tls" in broker.variants:
            broker.make_certificate()
            lines += ["port 0", f"tls-port {port}", "tls-auth-clients no"]
            lines += [f"tls-cert-file {broker.certificate}", f"tls-key-file {broker.key}"]
        else:
            lines.append(f"port {port}")
        config = node.folder / "redis.conf"
        config.write_text("\n".join([*lines, *broker.lines(" "), ""]))
        return Launch((need("redis-server", "redis-server"), str(config)))

    def url(self, broker: Broker) -> str:
        """`redis://`, or `rediss://` where TLS is on."""
        scheme = "rediss" if "tls" in broker.variants else "redis"
        secret = f":{PASSWORD}@" if "password" in broker.variants else ""
        return f"{scheme}://{secret}{HOST}:{broker.nodes[0].ports['client']}/0"

    def answers(self, broker: Broker, node: Node) -> bool:
        """PING; a server that still reads its data says LOADING."""
        with connect(node.ports["client"]) as peer:
            if "tls" in broker.variants:
                peer = ssl.create_default_context(cafile=str(broker.certificate)).wrap_socket(  # noqa: PLW2901
                    peer, server_hostname=HOST
                )
            peer.sendall(b"PING\r\n")
            return peer.recv(64).startswith((b"+PONG", b"-NOAUTH"))
