"""What a `kafka:` URL says, as the client library takes it, and what Kafka's errors mean.

Invariant: the safe settings (idempotence, acks of all replicas, no automatic commits) cannot be switched off by a URL.
Never does: I/O. Read next: transport.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, Producer
from confluent_kafka.admin import AdminClient

from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.link import TIMEOUT_S, Options
from trunkline.partitions import LEASE_S
from trunkline.transport import Address, Credentials
from trunkline.transports.kafka.stranded import STATISTICS_S
from trunkline.wire import MAX_WIRE_BYTES

log = logging.getLogger("trunkline.kafka")


class _ClientLog:
    """What librdkafka says of itself, for debugging: what matters comes to `error_cb` too, and only once."""

    def __init__(self) -> None:
        self._log = logging.getLogger("trunkline.kafka.client")

    def log(self, _level: int, text: str, *values: object) -> None:
        """Log one line."""
        self._log.debug(text, *values)


client_log: Any = _ClientLog()

PORT = 9092
QUEUE_PARTITIONS = 12
"""Partitions of a Queue or Topic that is made: so many processes can share its work."""
MAX_MESSAGE_BYTES = MAX_WIRE_BYTES + 64 * 1024
"""Largest message that is sent: the largest that is read, with Kafka's own fields."""
MOST_S = 3600.0
"""Longest timeout and lease that the client takes."""
MOST_PARTITIONS, MOST_COPIES = 100_000, 10_000
"""Of a topic, for the client."""
POLL_S = 300.0
"""The client leaves a group when nobody has polled for so long, or for a lease if that is longer."""
BATCH_BYTES = 1_000_000
"""Largest batch of several messages."""
LINGER_MS = 0.3
"""How long a message waits for others to join its batch."""
BUFFER_KBYTES = 16 * 1024
"""Most that the client fetches ahead for one subscription."""

_PREFIX = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,60}[A-Za-z0-9])?")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_CREDENTIALS = {KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED}  # noqa: SLF001 - public by use
_PERMISSIONS = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}
_FEATURES = {KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION}  # noqa: SLF001
_PASSING = {
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.COORDINATOR_NOT_AVAILABLE, KafkaError.NOT_COORDINATOR,
    KafkaError.FENCED_LEADER_EPOCH, KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError.UNKNOWN_TOPIC_ID,
    KafkaError._TRANSPORT, KafkaError._WAIT_COORD, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
}  # fmt: skip

END = KafkaError._PARTITION_EOF  # noqa: SLF001
"""Comes in place of a record: a partition was read up to an offset, for now."""
GONE = {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION}  # noqa: SLF001
"""The topic is not there: it is new, or was deleted."""


def _told(error_cb: Callable[[KafkaError], None], stats_cb: Callable[[str], None]) -> dict[str, Any]:
    """Return whom a client tells of itself."""
    return {"error_cb": error_cb, "stats_cb": stats_cb, "statistics.interval.ms": int(STATISTICS_S * 1000)}


class Settings(msgspec.Struct, frozen=True):
    """A URL, read.

    Attributes:
        shown: the URL without secrets.
        timeout_s: how long a start or a publish waits for the broker.
        lease_s: how long the partitions of a silent process stay with it.
        prefix: what the names of topics and groups begin with.
        queue_partitions: of a Queue or Topic that is made.
        replication: copies of a topic that is made; 0: three, or as many as there are brokers.
        credentials: read anew for each client.
        lasting: what every client of this URL is configured with beside these.
    """

    shown: str
    timeout_s: float
    lease_s: float
    prefix: str
    queue_partitions: int
    replication: int
    credentials: Credentials
    lasting: dict[str, Any]

    @property
    def client(self) -> dict[str, Any]:
        """Return what a client is configured with now.

        Raises: ConfigurationError E249 for a variable that is not set any more, E241 for one that is empty.
        """
        user, password = self.credentials.user, self.credentials.password
        if user is None:
            return self.lasting
        if not (user and password):
            missing = "password" if user else "name"
            raise ConfigurationError(
                "E241", f"{self.shown} has a user without a {missing}", "write kafka://user:password@…"
            )
        return self.lasting | {"sasl.username": user, "sasl.password": password}

    def topic(self, channel: str) -> str:
        """Return the name of a channel's topic."""
        return f"{self.prefix}.{channel}"

    def group(self, subscription: str, channel: str) -> str:
        """Return the name of a subscription's group."""
        return f"{self.prefix}.{subscription}.{channel}"

    def producer(self, error_cb: Callable[[KafkaError], None], stats_cb: Callable[[str], None]) -> dict[str, Any]:
        """Return how a producer is configured."""
        return self.client | {
            **_told(error_cb, stats_cb),
            "acks": "all",
            "enable.idempotence": True,
            "linger.ms": LINGER_MS,
            "delivery.timeout.ms": max(1, int(self.timeout_s * 1000)),  # 0 is none
            "message.max.bytes": MAX_MESSAGE_BYTES,
            # By asking for a topic that was deleted a broker would make it, with other partitions and retention.
            "allow.auto.create.topics": False,
            "queue.buffering.max.kbytes": 4 * BUFFER_KBYTES,
        }

    def consumer(
        self, group: str, error_cb: Callable[[KafkaError], None], stats_cb: Callable[[str], None]
    ) -> dict[str, Any]:
        """Return how the consumer of one subscription is configured."""
        return self.client | {
            **_told(error_cb, stats_cb),
            "group.id": group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            # What was kept too short a time is gone; the oldest that is left comes next.
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": int(self.lease_s * 1000),
            "max.poll.interval.ms": int(max(self.lease_s, POLL_S) * 1000),
            "heartbeat.interval.ms": max(100, int(self.lease_s * 100)),
            "queued.max.messages.kbytes": BUFFER_KBYTES,
            # Read on soon after the buffer was full: one second, the default, leaves it empty for long.
            "fetch.queue.backoff.ms": 10,
        }

    def lease_refused(self) -> ConfigurationError:
        """Return the error for a lease that the brokers do not take."""
        return ConfigurationError(
            "E241", f"lease_s={self.lease_s:g} is not accepted by {self.shown}",
            "from 6 to 1800, unless group.min.session.timeout.ms and group.max.session.timeout.ms say otherwise",
        )  # fmt: skip


def read_settings(address: Address) -> Settings:
    """Read a URL.

    Raises: ConfigurationError E206, E240 or E241.
    """
    options = Options(address)
    if address.path.strip("/"):
        raise ConfigurationError(
            "E206", f"{address.shown} has a path", "write kafka://host:port,host:port?prefix=… without one"
        )
    timeout_s = options.seconds("timeout_s", TIMEOUT_S, most=MOST_S)
    lease_s = options.lease(LEASE_S, MOST_S)
    prefix = options.text("prefix", "trunkline") or ""
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            "E241", f"prefix={prefix!r} in the URL of {address.shown}", "letters, digits, '.', '_' and '-', at most 62"
        )
    hosts = address.hosts or (("localhost", None),)
    lasting = {
        "bootstrap.servers": ",".join(_place(name, port) for name, port in hosts),
        "client.id": prefix,
        "reconnect.backoff.ms": 100,
        "reconnect.backoff.max.ms": 2000,
        "socket.keepalive.enable": True,
        "socket.nagle.disable": True,
    }
    settings = Settings(
        address.shown, timeout_s, lease_s, prefix,
        options.number("queue_partitions", QUEUE_PARTITIONS, most=MOST_PARTITIONS),
        options.number("replication", 0, most=MOST_COPIES), address.credentials, lasting | _security(address, options),
    )  # fmt: skip
    options.end()
    return settings


def _place(name: str, port: int | None) -> str:
    return f"[{name}]:{port or PORT}" if ":" in name else f"{name}:{port or PORT}"


def _security(address: Address, options: Options) -> dict[str, Any]:
    tls = address.scheme == "kafka+ssl"
    found: dict[str, Any] = {}
    for name, setting in (("ca", "ssl.ca.location"), ("cert", "ssl.certificate.location"), ("key", "ssl.key.location")):
        path = options.text(name)
        if path is not None:
            found[setting] = path
    if found and not tls:
        raise ConfigurationError(
            "E241", f"{address.shown} has ca, cert or key without TLS", "write kafka+ssl:// in place of kafka://"
        )
    # Without TLS a password must not travel as it is, unless the URL asks for that.
    mechanism = options.choice("sasl", _MECHANISMS, "PLAIN" if tls else "SCRAM-SHA-256")
    if address.user is not None:
        found["sasl.mechanism"] = mechanism
    elif "sasl" in address.options:
        raise ConfigurationError("E241", f"{address.shown} has sasl without a user", "write kafka://user:password@…")
    signed_in = "SASL_" if address.user is not None else ""
    found["security.protocol"] = signed_in + ("SSL" if tls else "PLAINTEXT")
    return found


class SignIn:
    """Has clients that exist sign in with what the URL says now: its variables may have changed."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._known = (credentials.user, credentials.password)
        self._is_told = False

    def renew(self, *clients: Producer | Consumer | AdminClient) -> None:
        """Tell `clients`, always the same ones, what to sign in with at their next connection, where that changed."""
        try:
            user, password = self._credentials.user, self._credentials.password
        except ConfigurationError as error:
            if not self._is_told:
                self._is_told = True
                log.warning("%s; user and password stay as they were", error)
            return
        if (user, password) != self._known and user is not None:
            self._known = (user, password)
            for client in clients:
                client.set_sasl_credentials(user, password or "")


def describe(error: KafkaError) -> str:
    """Return an error in one line."""
    return f"{error.name()}: {error.str()}"


def refusal(error: KafkaError, shown: str) -> ConfigurationError | None:
    """Return an error that somebody has to mend, or None for one that may pass."""
    code = error.code()
    if code in _CREDENTIALS:
        return ConfigurationError(
            "E244", f"{shown} refused the credentials: {error.str()}", "check user, password and sasl= of the URL"
        )
    if code == KafkaError._SSL:  # noqa: SLF001
        return ConfigurationError(
            "E245", f"TLS with {shown} failed: {error.str()}", "check ca, cert and key, and that the port speaks TLS"
        )
    if code in _PERMISSIONS:
        return ConfigurationError(
            "E246", f"{shown} does not permit it: {describe(error)}",
            "allow the user to describe, create, read and write the topics and groups of this prefix",
        )  # fmt: skip
    if code in _FEATURES:
        return ConfigurationError("E248", f"{shown} is too old: {describe(error)}", "Kafka 2.4 or later is needed")
    return None


class ClusterState:
    """What one client says of the cluster: told once when it goes and when it comes back.

    Args:
        who: whose client it is.
    """

    def __init__(self, settings: Settings, who: str) -> None:
        self._shown = settings.shown
        self._who = who
        self.is_down = False
        self.times_up = 0
        self._told: set[int] = set()

    def note(self, error: KafkaError) -> None:
        """Note an error that concerns no single message."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001
            if not self.is_down:
                self.is_down = True
                log.warning("%s: no broker of %s is reached", self._who, self._shown)
        elif error.code() in _PASSING or error.code() in self._told:
            log.debug("%s: %s", self._who, describe(error))
        else:
            self._told.add(error.code())
            log.warning("%s: %s", self._who, refusal(error, self._shown) or describe(error))

    def works(self) -> None:
        """Note that a broker has answered."""
        if self._told:
            self._told.clear()
        if self.is_down:
            self.is_down = False
            self.times_up += 1
            log.warning("%s: %s is reached again", self._who, self._shown)


def passes(error: KafkaError) -> bool:
    """Return whether an error is usual while a topic, a leader or a coordinator is new or moves."""
    return error.retriable() or error.code() in _PASSING or error.code() == KafkaError._TIMED_OUT  # noqa: SLF001


def failure(error: KafkaError, shown: str, what: str) -> TrunklineError:
    """Return an error of Kafka as ours.

    Args:
        what: what was being done.
    """
    return refusal(error, shown) or TransportError(
        "E522", f"{shown}: {what}: {describe(error)}", "see the broker's log; it is tried again"
    )
