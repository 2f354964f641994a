"""A Kafka cluster as an operator sees it: settings of brokers and topics, offsets of groups, records.

Invariant: no group is joined and no offset is committed; what blocks runs in a worker thread. Settings are those of
Kafka's broker and topic configuration. Read next: cluster.py, judgement.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import ConfigResource, ResourceType  # type: ignore[attr-defined]

from trunkline import wire
from trunkline.channel import Channel, Queue
from trunkline.clock import Clock, offload
from trunkline.errors import ConfigurationError, DecodeError, TransportError
from trunkline.inspection import Finding, Lag, Seen
from trunkline.transport import Address, Subscription
from trunkline.transports.kafka.cluster import Cluster
from trunkline.transports.kafka.judgement import TopicFacts, judge_brokers, judge_topic
from trunkline.transports.kafka.records import plain_of, text_headers
from trunkline.transports.kafka.settings import END, ClusterState, client_log, failure, read_settings, refusal

BATCH = 500
POLL_S = 0.3


class Looking(Cluster):
    """The cluster with what is asked for looking alone."""

    def brokers(self) -> tuple[int, dict[str, str]]:
        """Return how many brokers there are, and the settings of one of them; none where they are not told."""
        found = self.brokers_known()
        return len(found), self._settings_of(ConfigResource(ResourceType.BROKER, str(min(found))))

    def topic(self, name: str) -> TopicFacts | None:
        """Return how a topic is set, or None if there is none."""
        asked = self._client.describe_topics(TopicCollection([name]), request_timeout=self._settings.timeout_s)
        try:
            described = asked[name].result()
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise failure(error.args[0], self._settings.shown, f"looking at topic {name}") from error
        partitions = described.partitions
        return TopicFacts(
            len(partitions),
            min(len(partition.replicas) for partition in partitions),
            min(len(partition.isr) for partition in partitions),
            self._settings_of(ConfigResource(ResourceType.TOPIC, name)),
        )

    def _settings_of(self, resource: ConfigResource) -> dict[str, str]:
        (future,) = self._client.describe_configs([resource], request_timeout=self._settings.timeout_s).values()
        try:
            return {name: str(entry.value) for name, entry in future.result().items()}
        except KafkaException:
            return {}  # what is not told is said to be so


class KafkaInspector:
    """Looks at the cluster that `address` names."""

    def __init__(self, address: Address, clock: Clock) -> None:
        self._settings = read_settings(address)
        self._clock = clock
        self._cluster = Looking(self._settings, clock)

    async def open(self) -> None:
        """Connect; see Inspector."""
        try:
            await offload(self._cluster.connect)
        except TransportError as error:
            raise TransportError(
                "E520", f"{self._settings.shown}: {error.message}", "check that the broker runs, and host and port"
            ) from error

    async def close(self) -> None:
        """Disconnect; see Inspector."""
        await offload(self._cluster.close)

    async def examine(
        self,
        channels: Sequence[Channel],
        subscriptions: Sequence[Subscription],  # noqa: ARG002 - groups have no settings of their own
        held_s: float,  # noqa: ARG002 - a message stays with the process whose partition it is in
    ) -> list[Finding]:
        """Return what the settings are worth; see Inspector."""
        brokers, settings = await offload(self._cluster.brokers)
        found = list(judge_brokers(brokers, settings, self._settings.lease_s))
        for channel in channels:
            facts = await offload(self._cluster.topic, self._settings.topic(channel.name))
            if facts is not None:
                found += judge_topic(channel, facts, brokers)
        return found

    async def look(self, subscriptions: Sequence[Subscription]) -> list[Lag | None]:
        """Compare what groups have committed with the ends of their topics; see Inspector."""
        return [await offload(self._lag, subscription) for subscription in subscriptions]

    def _lag(self, subscription: Subscription) -> Lag | None:
        topic = self._settings.topic(subscription.channel.name)
        facts = self._cluster.topic(topic)
        if facts is None:
            return None
        group = self._settings.group(subscription.name, subscription.channel.name)
        known = self._cluster.committed(group, topic, facts.partitions)
        if not known and not isinstance(subscription.channel, Queue):
            return None  # of a Queue everything waits for its first reader
        begins = self._cluster.ends(topic, facts.partitions, earliest=True)
        ends = self._cluster.ends(topic, facts.partitions)
        return Lag(sum(max(0, end - known.get(number, begins[number])) for number, end in ends.items()))

    async def read(self, channel: Channel, *, from_start: bool, follow: bool) -> AsyncIterator[Seen]:
        """Yield records by a consumer without a group's position; see Inspector.

        A topic keeps what was handled, so of a Queue or Topic too only what comes is shown, or all with `from_start`.
        """
        topic = self._settings.topic(channel.name)
        facts = await offload(self._cluster.topic, topic)
        if facts is None:
            raise ConfigurationError("E233", f"no topic {topic} on {self._settings.shown}", "start a service first")
        ends = {} if follow else await offload(self._cluster.ends, topic, facts.partitions)
        state = ClusterState(self._settings, f"topic {topic}")
        consumer = await offload(self._assigned, topic, facts.partitions, from_start or not follow, state)
        left = {number for number, end in ends.items() if end > 0}
        heard = self._clock.monotonic()
        try:
            while follow or left:
                records = await offload(consumer.consume, BATCH, POLL_S)
                for record in sorted(records, key=lambda one: one.timestamp()[1]):
                    if self._is_record(record, state):
                        state.works()
                        heard = self._clock.monotonic()
                        yield _seen(record, channel.plain)
                if not follow:
                    left -= {record.partition() for record in records if _is_last(record, ends)}
                    self._check_heard(heard, topic)
        finally:
            await offload(consumer.close)

    def _assigned(self, topic: str, partitions: int, whole: bool, state: ClusterState) -> Consumer:  # noqa: FBT001
        looking = {
            "group.id": f"{self._settings.prefix}.look",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "latest",
            "error_cb": state.note,
        }
        consumer = Consumer(self._settings.client | looking, logger=client_log)
        offset = OFFSET_BEGINNING if whole else OFFSET_END
        consumer.assign([TopicPartition(topic, number, offset) for number in range(partitions)])
        return consumer

    def _is_record(self, record: Message, state: ClusterState) -> bool:
        """Tell records from what the client tells beside them; it gets over a lost connection by itself.

        Raises: ConfigurationError for what somebody has to mend.
        """
        error = record.error()
        if error is None:
            return True
        if (refused := refusal(error, self._settings.shown)) is not None:
            raise refused
        if error.code() != END:
            state.note(error)
        return False

    def _check_heard(self, heard: float, topic: str) -> None:
        """Refuse to wait for ever for what is known to be there.

        Raises: TransportError E522.
        """
        if self._clock.monotonic() - heard > self._settings.timeout_s:
            raise TransportError(
                "E522", f"{self._settings.shown}: topic {topic} was not read to its end: nothing came for"
                f" {self._settings.timeout_s:g} s", "see the broker's log, then look again",
            )  # fmt: skip


def _is_last(record: Message, ends: dict[int, int]) -> bool:
    """Return whether a partition was read up to where it ended: what is there may end before, or be gone."""
    error = record.error()
    if error is not None:
        return error.code() == END
    number, offset = record.partition(), record.offset()
    return number is not None and offset is not None and offset + 1 >= ends[number]


def _seen(record: Message, plain: str | None) -> Seen:
    body: Any = record.value() or b""
    offset: Any = record.offset()
    try:
        message = wire.decode(body, lambda: text_headers(record), None if plain is None else plain_of(record, plain))
    except DecodeError:
        return Seen(offset, None, body)
    return Seen(offset, message)
