"""The cluster as an administrator sees it: reach it, make topics, look how far groups are.

Every method blocks and is called in a worker thread. Invariant: what exists is never changed.
Read next: transport.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]

from trunkline.channel import Channel, Stream
from trunkline.clock import Clock, block
from trunkline.errors import ConfigurationError, TransportError
from trunkline.transports.kafka.settings import (
    MAX_MESSAGE_BYTES,
    Settings,
    client_log,
    describe,
    failure,
    passes,
    refusal,
)

log = logging.getLogger("trunkline.kafka")
T = TypeVar("T")

COPIES = 3
"""Replicas of a topic where there are as many brokers."""
TRY_S = 5.0
"""How long one try to reach the cluster takes at most."""
LOOK_S = 0.1
_MISMATCHES = ("connecting to a PLAINTEXT broker listener", "connecting to a SSL listener")
"""What the client says where one side speaks TLS and the other does not; it has no code of its own for that."""


class Cluster:
    """Administers one cluster for one App."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._errors: list[KafkaError] = []
        self._admin: AdminClient | None = None
        self._deleted: dict[tuple[str, int], int] = {}

    def connect(self) -> None:
        """Reach one broker.

        Raises: ConfigurationError E244, E245 or E246 if it refuses; TransportError if none answers.
        """
        self.close()
        self._errors.clear()
        self._admin = admin = AdminClient(self._settings.client | {"error_cb": self._errors.append}, logger=client_log)
        until = self._clock.monotonic() + min(TRY_S, self._settings.timeout_s / 2)
        while True:
            try:
                admin.list_topics(timeout=min(0.5, self._settings.timeout_s / 4))
            except KafkaException as error:
                last: KafkaError = error.args[0]
            else:
                return
            admin.poll(0)
            for known in (*self._errors, last):
                if (refused := refusal(known, self._settings.shown)) is not None:
                    raise refused
            if self._clock.monotonic() > until:
                raise self._unreachable(last)

    def _unreachable(self, last: KafkaError) -> TransportError | ConfigurationError:
        """Return why no broker answers, in the words that say most."""
        told = [error for error in self._errors if error.code() != KafkaError._ALL_BROKERS_DOWN]  # noqa: SLF001
        reasons = [error.str() for error in told]
        mismatch = next((text for text in reasons if any(words in text for words in _MISMATCHES)), None)
        if mismatch is not None:
            return ConfigurationError(
                "E245", f"{self._settings.shown} does not speak as asked: {mismatch}",
                "kafka+ssl:// where the port speaks TLS, kafka:// where it does not, user and password where it asks",
            )  # fmt: skip
        return TransportError("E522", describe(told[0] if told else last))

    def close(self) -> None:
        """Let the connections go."""
        if self._admin is not None:
            self._admin.poll(0)
            self._admin = None

    # --- topics ---

    def declare(self, channels: Iterable[Channel]) -> dict[str, int]:
        """Make the topics that are missing; return how many partitions the topic of each channel has.

        Raises: ConfigurationError E207 if one exists with other partitions than its Stream has.
        """
        wanted = {self._settings.topic(channel.name): channel for channel in channels}
        found = self._partitions(wanted)
        missing = {topic: channel for topic, channel in wanted.items() if topic not in found}
        if missing:
            self._create(missing)
            found |= self._await(missing)
        for topic, channel in wanted.items():
            if isinstance(channel, Stream) and found[topic] != channel.partitions:
                raise ConfigurationError(
                    "E207",
                    f"stream {channel.name!r} with {channel.partitions} partitions exists as topic {topic}"
                    f" with {found[topic]}",
                    "declare it as it exists, or use another name",
                )
        return {channel.name: found[topic] for topic, channel in wanted.items()}

    def _partitions(self, topics: Iterable[str]) -> dict[str, int]:
        """Return how many partitions each of `topics` has that exists and can be used."""
        found = {}
        names = list(topics)
        if not names:
            return {}
        for name, future in self._client.describe_topics(
            TopicCollection(names), request_timeout=self._settings.timeout_s
        ).items():
            try:
                described = future.result()
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise failure(error.args[0], self._settings.shown, f"looking at topic {name}") from error
            else:
                if all(partition.leader is not None for partition in described.partitions):
                    found[name] = len(described.partitions)
        return found

    def _create(self, missing: Mapping[str, Channel]) -> None:
        brokers = len(self._client.list_topics(timeout=self._settings.timeout_s).brokers)
        copies = self._settings.replication or min(COPIES, brokers)
        new = [self._new_topic(topic, channel, copies) for topic, channel in missing.items()]
        for name, future in self._client.create_topics(new, request_timeout=self._settings.timeout_s).items():
            try:
                future.result()
            except KafkaException as error:
                known: KafkaError = error.args[0]
                if known.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                    continue  # another process was faster
                if known.code() in (KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.TOPIC_EXCEPTION):
                    raise ConfigurationError(
                        "E207", f"topic {name} cannot be made on {self._settings.shown}: {known.str()}",
                        "another replication= or prefix=, or another name of the channel",
                    ) from error  # fmt: skip
                raise failure(known, self._settings.shown, f"making topic {name}") from error

    def _new_topic(self, name: str, channel: Channel, copies: int) -> NewTopic:
        partitions, retention_s = self._settings.queue_partitions, None
        if isinstance(channel, Stream):
            partitions, retention_s = channel.partitions, channel.retention_s
        config = {
            "cleanup.policy": "delete",
            "retention.ms": "-1" if retention_s is None else str(max(1, int(retention_s * 1000))),
            "retention.bytes": "-1",
            # An acknowledged message is on two brokers at least, where there are three.
            "min.insync.replicas": "2" if copies >= COPIES else "1",
            "max.message.bytes": str(MAX_MESSAGE_BYTES),
            # The moment of the append, so that retention does not depend on the clocks of producers.
            "message.timestamp.type": "LogAppendTime",
        }
        return NewTopic(name, num_partitions=partitions, replication_factor=copies, config=config)

    def _await(self, topics: Iterable[str]) -> dict[str, int]:
        """Wait until each of `topics` can be used: its partitions have leaders."""
        names = list(topics)
        until = self._clock.monotonic() + self._settings.timeout_s
        while True:
            found = self._partitions(names)
            if len(found) == len(names):
                return found
            if self._clock.monotonic() > until:
                missing = ", ".join(sorted(set(names) - set(found)))
                raise TransportError(
                    "E522", f"{self._settings.shown}: topics were made and are not ready: {missing}",
                    "see the broker's log",
                )  # fmt: skip
            block(LOOK_S)

    # --- offsets ---

    def ends(self, topic: str, partitions: int, *, earliest: bool = False) -> dict[int, int]:
        """Return the offset after the newest message of each partition, or that of the oldest."""
        spec = OffsetSpec.earliest() if earliest else OffsetSpec.latest()  # type: ignore[no-untyped-call]
        asked = {TopicPartition(topic, number): spec for number in range(partitions)}

        def look() -> dict[int, int]:
            futures = self._client.list_offsets(asked, request_timeout=self._settings.timeout_s)
            return {place.partition: future.result().offset for place, future in futures.items()}

        return self.patiently(look, f"looking at offsets of topic {topic}")

    def committed(self, group: str, topic: str, partitions: int) -> dict[int, int]:
        """Return the committed offset of each partition that has one."""
        asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, number) for number in range(partitions)])

        def look() -> dict[int, int]:
            futures = self._client.list_consumer_group_offsets([asked], request_timeout=self._settings.timeout_s)
            places = futures[group].result().topic_partitions
            return {place.partition: place.offset for place in places if place.offset >= 0}

        return self.patiently(look, f"looking at offsets of group {group}")

    def delete_handled(self, channel: str, partitions: int) -> None:
        """Delete the messages of a Queue or Topic that all its groups have handled."""
        topic = self._settings.topic(channel)
        lows: dict[int, int] = {}
        for group in self._groups(channel):
            known = self.committed(group, topic, partitions)
            if known:  # else the group is of another channel, with a name that ends as this one
                lows = {n: min(known.get(n, 0), lows.get(n, known.get(n, 0))) for n in range(partitions)}
        places = [
            TopicPartition(topic, number, low)
            for number, low in lows.items()
            if low > self._deleted.get((topic, number), 0)
        ]
        if not places:
            return

        def delete() -> None:
            for future in self._client.delete_records(places, request_timeout=self._settings.timeout_s).values():
                future.result()

        self.patiently(delete, f"deleting handled messages of topic {topic}")
        self._deleted |= {(topic, place.partition): place.offset for place in places}

    def _groups(self, channel: str) -> list[str]:
        """Return the groups that may read a channel."""
        start, end = f"{self._settings.prefix}.", f".{channel}"

        def look() -> list[str]:
            found = self._client.list_consumer_groups(request_timeout=self._settings.timeout_s).result()
            names = [group.group_id for group in found.valid]
            return [name for name in names if name.startswith(start) and name.endswith(end)]

        return self.patiently(look, "listing groups")

    def patiently(self, act: Callable[[], T], what: str) -> T:
        """Return `act()`, done again while leaders and coordinators are on their way.

        Raises: ConfigurationError or TransportError, after `timeout_s` at the latest.
        """
        until = self._clock.monotonic() + self._settings.timeout_s
        while True:
            try:
                return act()
            except KafkaException as error:
                known: KafkaError = error.args[0]
                if not passes(known) or self._clock.monotonic() > until:
                    raise failure(known, self._settings.shown, what) from error
                log.debug("%s: again: %s", what, describe(known))
            block(LOOK_S)

    @property
    def _client(self) -> AdminClient:
        if self._admin is None:
            raise TransportError("E522", f"{self._settings.shown} is not connected", "start the transport first")
        return self._admin
