"""The cluster as an administrator sees it: reach it, make topics, look how far groups are.

Every method blocks and is called in a worker thread. Invariant: what exists is never changed.
Read next: transport.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from trunkline.channel import Channel, Stream
from trunkline.clock import Clock, block
from trunkline.errors import ConfigurationError, TransportError
from trunkline.transports.kafka.place import begin_of
from trunkline.transports.kafka.probe import mechanisms_asked_for
from trunkline.transports.kafka.settings import (
    MAX_MESSAGE_BYTES,
    Settings,
    SignIn,
    client_log,
    describe,
    failure,
    passes,
    refusal,
)

log = logging.getLogger("trunkline.kafka")
K = TypeVar("K")
T = TypeVar("T")

EARLIEST, LATEST = OffsetSpec.earliest(), OffsetSpec.latest()  # type: ignore[no-untyped-call]
COPIES = 3
"""Replicas of a topic where there are as many brokers."""
TRY_S = 5.0
"""How long one try to reach the cluster takes at most.

A node that died is asked until the try ends, and the client dials it without a pause; the next try asks who leads now.
"""
LOOK_S = 0.1
_MISMATCHES = ("connecting to a PLAINTEXT broker listener", "connecting to a SSL listener")
"""What the client says where one side speaks TLS and the other does not; it has no code of its own for that."""


class Cluster:
    """Administers one cluster for one App."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._errors: list[KafkaError] = []
        self._sign_in = SignIn(settings.credentials)
        self._admin: AdminClient | None = None
        self._members: dict[str, Consumer] = {}
        self._deleted: dict[tuple[str, int], int] = {}
        self._ids: dict[str, str] = {}

    def connect(self) -> None:
        """Reach one broker.

        Raises: ConfigurationError E244, E245 or E246 if it refuses; TransportError if none answers.
        """
        self.close()
        self._errors.clear()
        self._sign_in = SignIn(self._settings.credentials)
        self._admin = admin = self._admin_client()
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

    def _admin_client(self) -> AdminClient:
        """Return a client.

        Raises: ConfigurationError E245 for a file that the TLS library does not take.
        """
        try:
            return AdminClient(self._settings.client | {"error_cb": self._errors.append}, logger=client_log)
        except KafkaException as error:
            raise ConfigurationError(
                "E245", f"a file of ca, cert or key in the URL of {self._settings.shown} cannot be used:"
                f" {error.args[0].str()}", "PEM is needed",
            ) from error  # fmt: skip

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
        if "sasl.username" not in self._settings.client and (asked := mechanisms_asked_for(self._settings.client)):
            return ConfigurationError(
                "E244", f"{self._settings.shown} asks for a user and password ({', '.join(asked)})",
                "write user:password@ before the host, and ?sasl= with one of these",
            )  # fmt: skip
        return TransportError("E522", describe(told[0] if told else last))

    def close(self) -> None:
        """Let the connections go: each ends once no other thread asks it anything, and is not closed under it."""
        self._members.clear()
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
        # Their leaders answer too, not only for them: what is sent before that may get lost; see publisher.py.
        self._places([(topic, number) for topic, count in found.items() for number in range(count)], LATEST)
        for topic, channel in wanted.items():
            if isinstance(channel, Stream) and found[topic] != channel.partitions:
                raise ConfigurationError(
                    "E207",
                    f"stream {channel.name!r} with {channel.partitions} partitions exists as topic {topic}"
                    f" with {found[topic]}",
                    "declare it as it exists, or use another name",
                )
        return {channel.name: found[topic] for topic, channel in wanted.items()}

    def exists(self, topic: str) -> bool:
        """Return whether there is a topic, whatever the state of its partitions.

        Raises: TransportError or ConfigurationError if that is not told.
        """
        topics = TopicCollection([topic])
        asked = self._answered(lambda admin: admin.describe_topics(topics, request_timeout=self._settings.timeout_s))
        try:
            asked[topic].result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise failure(error.args[0], self._settings.shown, f"looking at topic {topic}") from error
            return False
        return True

    def topic_ids(self, topics: Sequence[str]) -> dict[str, str]:
        """Return the id of each of `topics` that is told, and note it: one that is made anew has another."""
        wanted, found = TopicCollection(list(topics)), {}
        asked = self._answered(lambda admin: admin.describe_topics(wanted, request_timeout=self._try_s))
        for name, future in asked.items():
            try:
                found[name] = str(future.result().topic_id)
            except KafkaException as error:
                log.debug("the id of topic %s is not told: %s", name, describe(error.args[0]))
        self._ids |= found
        return found

    def topic_id(self, topic: str) -> str:
        """Return the id of a topic, or nothing where it is not told."""
        return self.topic_ids([topic]).get(topic, "")

    def _partitions(self, topics: Iterable[str]) -> dict[str, int]:
        """Return how many partitions each of `topics` has that exists and can be used."""
        found = {}
        names = list(topics)
        if not names:
            return {}
        wanted = TopicCollection(names)
        asked = self._answered(lambda admin: admin.describe_topics(wanted, request_timeout=self._settings.timeout_s))
        for name, future in asked.items():
            try:
                described = future.result()
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise failure(error.args[0], self._settings.shown, f"looking at topic {name}") from error
            else:
                if all(partition.leader is not None for partition in described.partitions):
                    found[name] = len(described.partitions)
        return found

    def brokers_known(self) -> list[int]:
        """Return the numbers of the brokers that are up."""
        found = self.patiently(lambda: self._client.list_topics(timeout=self._try_s), "looking at its brokers")
        return list(found.brokers)

    def _create(self, missing: Mapping[str, Channel]) -> None:
        brokers = len(self.brokers_known())
        copies = self._settings.replication or min(COPIES, brokers)
        new = [self._new_topic(topic, channel, copies) for topic, channel in missing.items()]

        def create() -> None:
            asked = self._answered(lambda admin: admin.create_topics(new, request_timeout=self._settings.timeout_s))
            for name, future in asked.items():
                try:
                    future.result()
                except KafkaException as error:
                    self._not_made(name, error.args[0], enough=copies <= brokers)

        self.patiently(create, f"making topics {', '.join(missing)}")

    def _not_made(self, name: str, error: KafkaError, *, enough: bool) -> None:
        """Raise what became of a topic, unless another process was faster.

        Args:
            enough: whether there are as many brokers as copies: then those that do not take one have just started.
        """
        if error.code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return
        if error.code() == KafkaError.INVALID_REPLICATION_FACTOR and enough:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, error.str()))  # noqa: SLF001 - tried again
        if error.code() in (KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.TOPIC_EXCEPTION):
            raise ConfigurationError(
                "E207", f"topic {name} cannot be made on {self._settings.shown}: {error.str()}",
                "another replication= or prefix=, or another name of the channel",
            )  # fmt: skip
        raise KafkaException(error)

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

    def least_limit(self, channels: Iterable[Channel]) -> int:
        """Return the least `max.message.bytes` of the topics of some channels: a broker takes no larger batch."""
        asked = [ConfigResource(ResourceType.TOPIC, self._settings.topic(channel.name)) for channel in channels]
        if not asked:
            return MAX_MESSAGE_BYTES
        limits = [MAX_MESSAGE_BYTES]
        told = self._answered(lambda admin: admin.describe_configs(asked, request_timeout=self._try_s))
        for resource, future in told.items():
            try:
                limits.append(int(str(future.result()["max.message.bytes"].value)))
            except (KafkaException, KeyError, ValueError) as error:
                log.debug("the limit of topic %s is not told: %s", resource.name, error)
        return min(limits)

    # --- offsets ---

    def ends(self, topic: str, partitions: int, *, earliest: bool = False) -> dict[int, int]:
        """Return the offset after the newest message of each partition, or that of the oldest."""
        found = self._places([(topic, number) for number in range(partitions)], EARLIEST if earliest else LATEST)
        return {number: offset for (_, number), offset in found.items()}

    def since(self, topic: str, partitions: int, moment_s: int) -> dict[int, int]:
        """Return the offset of the first message of each partition that was stored at a moment or later.

        Where there is none, the offset after the newest: asked for first, since what comes meanwhile is later.
        """
        ends = self.ends(topic, partitions)
        spec = OffsetSpec.for_timestamp(moment_s * 1000)
        found = self._places([(topic, number) for number in ends], spec, none=OFFSET_END)
        return ends | {number: offset for (_, number), offset in found.items() if offset != OFFSET_END}

    def _places(
        self, partitions: Iterable[tuple[str, int]], spec: OffsetSpec, *, none: int = 0
    ) -> dict[tuple[str, int], int]:
        """Ask the leader of each (topic, partition) for an offset.

        Args:
            none: what it answers where it has none to tell.
        """
        asked = {TopicPartition(topic, number): spec for topic, number in partitions}
        if not asked:
            return {}
        topics = ", ".join(sorted({place.topic for place in asked}))

        def look() -> dict[tuple[str, int], int]:
            futures = self._answered(lambda admin: admin.list_offsets(asked, request_timeout=self._try_s))
            found = {(place.topic, place.partition): future.result().offset for place, future in futures.items()}
            if min(found.values(), default=0) < none:
                # What a leader has not answered is no error here, but OFFSET_INVALID. Another one may lead by now.
                self._client.list_topics(timeout=self._try_s)
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))  # noqa: SLF001
            return found

        return self.patiently(look, f"looking at offsets of {topics}")

    def committed(self, group: str, topic: str, partitions: int) -> dict[int, int]:
        """Return the committed offset of each partition that has one, 0 for that of another topic of this name."""
        asked = [TopicPartition(topic, number) for number in range(partitions)]

        def look() -> dict[int, int]:
            places = self._member(group).committed(asked, timeout=self._try_s)
            known = self._ids.get(topic, "")
            return {place.partition: max(0, begin_of(place, known)) for place in places if place.offset >= 0}

        return self.patiently(look, f"looking at offsets of group {group}")

    def begin(self, group: str, member: Consumer, places: list[TopicPartition]) -> None:
        """Commit where a new group begins, unless another process of it was faster.

        Raises: ConfigurationError or TransportError: without it the group would begin at the first message.
        """

        def commit() -> None:
            # Looked up, not waited for: the client waits for ever where nobody answers.
            member.commit(offsets=places, asynchronous=True)
            if any(place.offset < 0 for place in member.committed(places, timeout=self._try_s)):
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))  # noqa: SLF001 - tried again

        self.patiently(commit, f"saying where group {group} begins")

    def _member(self, group: str) -> Consumer:
        """Return a consumer of a group that it never joins.

        An administrator's request is bound to the coordinator that it found: where that node dies, the client dials it
        without a pause, asks no other one, and at the request's timeout ends the process (librdkafka 2.16.0, an
        assertion on `eonce->refcnt`).
        """
        known = self._members.get(group)
        if known is None:
            configured = self._settings.client | {"group.id": group, "enable.auto.commit": False}
            known = self._members.setdefault(group, Consumer(configured, logger=client_log))
        self._renew()
        return known

    def delete_handled(self, channel: str, partitions: int) -> None:
        """Delete the messages of a Queue or Topic that all its groups have handled."""
        topic = self._settings.topic(channel)
        self.topic_id(topic)  # offsets that were committed for another one of this name do not count
        groups = self._groups(channel)
        if groups is None:
            log.debug(
                "handled messages of %r stay on the disk for now: not every node says which groups it has", channel
            )
            return
        lows: dict[int, int] = {}
        for group in groups:
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
            asked = self._answered(lambda admin: admin.delete_records(places, request_timeout=self._try_s))
            for future in asked.values():
                future.result()

        self.patiently(delete, f"deleting handled messages of topic {topic}")
        self._deleted |= {(topic, place.partition): place.offset for place in places}

    def _groups(self, channel: str) -> list[str] | None:
        """Return the groups that may read a channel, or None where a node is silent that may have more of them."""
        start, end = f"{self._settings.prefix}.", f".{channel}"

        def look() -> list[str] | None:
            asked = self._answered(lambda admin: {"": admin.list_consumer_groups(request_timeout=self._try_s)})
            found = asked[""].result()
            if found.errors:
                return None
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

    def _answered(self, ask: Callable[[AdminClient], Mapping[K, Future[T]]]) -> Mapping[K, Future[T]]:
        """Ask, and return once all is answered.

        The client is held until then: what ends with unanswered requests leaves them so, past their timeout too.
        """
        admin = self._client
        futures = ask(admin)
        wait(futures.values())
        return futures

    @property
    def _try_s(self) -> float:
        return min(TRY_S, self._settings.timeout_s)

    @property
    def _client(self) -> AdminClient:
        if self._admin is None:
            raise TransportError("E522", f"{self._settings.shown} is not connected", "start the transport first")
        self._renew()
        return self._admin

    def _renew(self) -> None:
        self._sign_in.renew(*self._members.values(), *([] if self._admin is None else [self._admin]))
