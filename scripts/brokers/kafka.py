"""Apache Kafka in KRaft mode: each node is broker and controller."""

import os
import socket
import struct
import subprocess
from pathlib import Path
from typing import ClassVar

from scripts.brokers.errors import BrokerError
from scripts.brokers.kind import HOST, PASSWORD, USER, Broker, Kind, Launch, Node, connect, receive, run
from scripts.brokers.packages import apt_install, cache, download_jars, find, locked_jars, need

LOCK = Path(__file__).with_name("kafka.lock")
CLUSTER_ID = "dHJ1bmtsaW5lLWthZmthMQ"  # 16 bytes in base64
HEAP = ("-Xms256m", "-Xmx512m")
QUICK = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
"""For a JVM that lives for minutes: it starts with 4 s of CPU in place of 7, and is slower later."""
API_VERSIONS, METADATA = 18, 3
ADVERTISED = "broker.test"
"""Of the variant `named`: a name that nobody knows; who connects has to see that it is resolved."""

LOGGING = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="WARN">
  <Appenders>
    <Console name="out"><PatternLayout pattern="%d{ISO8601} %p %m (%c)%n"/></Console>
  </Appenders>
  <Loggers><Root level="WARN"><AppenderRef ref="out"/></Root></Loggers>
</Configuration>
"""


class Kafka(Kind):
    """Variants: sasl (SCRAM-SHA-256), named (tells ADVERTISED), lasting (the JVM as Kafka itself starts it).

    The only kind with several nodes: `kafka3`.
    """

    name = "kafka"
    ports = ("client", "internal", "controller")
    variants: ClassVar[frozenset[str]] = frozenset({"sasl", "named", "lasting"})
    clusters = True

    def _jars(self) -> Path:
        return Path(os.environ.get("TRUNKLINE_KAFKA") or cache() / f"kafka-{self.version()}")

    def install(self, *, allowed: bool) -> None:
        """Install Java and download the jars."""
        if find("java") is None:
            apt_install(["default-jre-headless"], allowed=allowed)
        download_jars(locked_jars(LOCK), self._jars(), allowed=allowed)

    def version(self) -> str:
        """The lock file decides it."""
        return next(path.split("/")[-2] for path in locked_jars(LOCK) if path.startswith("org/apache/kafka/kafka_"))

    def launch(self, broker: Broker, node: Node) -> Launch:
        """Write server.properties and format the storage, once."""
        config = node.folder / "server.properties"
        config.write_text("\n".join([*_properties(broker, node), *broker.lines("="), ""]))
        (node.folder / "log4j2.xml").write_text(LOGGING)
        classpath = ":".join(str(self._jars() / Path(path).name) for path in locked_jars(LOCK))
        java = (need("java", "default-jre-headless"), f"-Dlog4j2.configurationFile={node.folder / 'log4j2.xml'}")
        if not (node.data / "meta.properties").exists():
            user = f"SCRAM-SHA-256=[name={USER},password={PASSWORD}]"
            scram = ["--add-scram", user] if "sasl" in broker.variants else []
            storage = ("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(config), *scram)
            try:
                run(*java, *QUICK, "-cp", classpath, *storage)
            except subprocess.CalledProcessError as error:
                raise BrokerError(f"cannot format Kafka's storage:\n{error.stdout[-2000:]}") from error
        machine = HEAP if "lasting" in broker.variants else (*HEAP, *QUICK)
        return Launch((*java, *machine, "-Djava.awt.headless=true", "-cp", classpath, "kafka.Kafka", str(config)))

    def url(self, broker: Broker) -> str:
        """All nodes, with the user where there is one."""
        secret = f"{USER}:{PASSWORD}@" if "sasl" in broker.variants else ""
        return f"kafka://{secret}" + ",".join(f"{HOST}:{node.ports['client']}" for node in broker.nodes)

    def answers(self, broker: Broker, node: Node) -> bool:
        """ApiVersions, then Metadata must list this node among the live ones."""
        del broker
        with connect(node.ports["internal"]) as peer:
            peer.sendall(request(API_VERSIONS, 0, b""))
            response(peer)
            peer.sendall(request(METADATA, 1, struct.pack(">i", 0)))  # 0 topics
            return node.number in _live_nodes(response(peer))


def _properties(broker: Broker, node: Node) -> list[str]:
    copies = min(3, len(broker.nodes))
    controllers = ",".join(f"{one.number}@{HOST}:{one.ports['controller']}" for one in broker.nodes)
    sasl = "sasl" in broker.variants
    login = "org.apache.kafka.common.security.scram.ScramLoginModule"
    properties = {
        "process.roles": "broker,controller",
        "node.id": node.number,
        "log.dirs": node.data,
        "controller.quorum.voters": controllers,
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "INTERNAL",
        # INTERNAL is for other nodes and for the check of readiness: it needs no password.
        "listeners": ",".join(f"{name.upper()}://{HOST}:{port}" for name, port in node.ports.items()),
        "listener.security.protocol.map": (
            f"CLIENT:{'SASL_PLAINTEXT' if sasl else 'PLAINTEXT'},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT"
        ),
        "auto.create.topics.enable": "false",
        "default.replication.factor": copies,
        "min.insync.replicas": 2 if copies > 1 else 1,
        "group.initial.rebalance.delay.ms": 0,
        "offsets.topic.replication.factor": copies,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": 2 if copies > 1 else 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": copies,
        "share.coordinator.state.topic.min.isr": 2 if copies > 1 else 1,
        "share.coordinator.state.topic.num.partitions": 4,
        # A node that was killed is told from its successor after this time, and so may come back.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
    }
    if "named" in broker.variants:
        told = {name: ADVERTISED if name == "client" else HOST for name in ("client", "internal")}
        properties["advertised.listeners"] = ",".join(
            f"{name.upper()}://{host}:{node.ports[name]}" for name, host in told.items()
        )
    if sasl:
        properties |= {
            "sasl.enabled.mechanisms": "SCRAM-SHA-256",
            "listener.name.client.scram-sha-256.sasl.jaas.config": f"{login} required;",
        }
    return [f"{key}={value}" for key, value in properties.items()]


def request(api: int, version: int, body: bytes) -> bytes:
    """Frame a request with header version 1: api, version, correlation, client."""
    message = struct.pack(">hhih", api, version, 1, len(USER)) + USER.encode() + body
    return struct.pack(">i", len(message)) + message


def response(peer: socket.socket) -> bytes:
    """Return the body of the next response, without its correlation number."""
    (size,) = struct.unpack(">i", receive(peer, 4))
    return receive(peer, size)[4:]


def _live_nodes(body: bytes) -> set[int]:
    """Read the nodes of a Metadata response, version 1: node, host, port, rack of each."""
    (count,) = struct.unpack_from(">i", body)
    nodes, at = set(), 4
    for _ in range(count):
        node, host = struct.unpack_from(">ih", body, at)
        (rack,) = struct.unpack_from(">h", body, at + 6 + host + 4)
        nodes.add(node)
        at += 6 + host + 4 + 2 + max(rack, 0)
    return nodes
