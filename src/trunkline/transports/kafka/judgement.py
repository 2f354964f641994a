"""What Kafka's settings do to what is promised.

Invariant: pure; what can be lost is said for each failure. Source: Apache Kafka, "Configuration" and "Replication":
an acknowledgement of all replicas in step does not wait for any disk. Read next: inspector.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from trunkline.channel import Channel, Stream
from trunkline.inspection import Finding
from trunkline.wire import MAX_WIRE_BYTES

WANTED_BROKERS = 3
DAY_MS = 86_400_000
FOREVER = -1


class TopicFacts(msgspec.Struct, frozen=True):
    """A topic as it is.

    Attributes:
        copies: replicas of the partition that has fewest. in_step: of these, in step.
        settings: by name; empty where they are not told.
    """

    partitions: int
    copies: int
    in_step: int
    settings: Mapping[str, str]


def judge_brokers(count: int, settings: Mapping[str, str], lease_s: float) -> Iterator[Finding]:
    """Yield what the settings of the brokers are worth."""
    if count >= WANTED_BROKERS:
        yield Finding("server", "brokers", str(count), "kept", "one of them may fail")
    else:
        yield Finding(
            "server", "brokers", str(count), "weak",
            "nothing can be sent while one is down, and there is one copy of each message" if count == 1
            else "where both must have a message, nothing can be sent while one is down",
            "three brokers", "" if count > 1 else "everything, when the disk of the broker is lost",
        )  # fmt: skip
    if not settings:
        yield Finding(
            "server", "broker settings", "not told", "unknown", "this user may not describe the brokers' configuration",
            "allow DescribeConfigs on the cluster",
        )  # fmt: skip
        return
    yield from _groups(settings, count, lease_s)
    making = settings.get("auto.create.topics.enable", "false") == "true"
    yield Finding(
        "server", "auto.create.topics.enable", str(making).lower(), "kept",
        "Trunkline makes its topics itself" + ("; a misspelt name of another program makes one too" if making else ""),
    )  # fmt: skip


def _groups(settings: Mapping[str, str], count: int, lease_s: float) -> Iterator[Finding]:
    least = int(settings.get("group.min.session.timeout.ms", 0)) / 1000
    most = int(settings.get("group.max.session.timeout.ms", 2**31)) / 1000
    fits = least <= lease_s <= most
    yield Finding(
        "server", "group session timeouts", f"{least:g} to {most:g} s", "kept" if fits else "broken",
        f"lease_s={lease_s:g} is {'allowed' if fits else 'refused: no process can read'}",
        "" if fits else "?lease_s= within them",
    )  # fmt: skip
    kept_ms = int(settings.get("offsets.retention.minutes", 10_080)) * 60_000
    yield Finding(
        "server", "offsets.retention.minutes", f"{kept_ms / DAY_MS:g} d", "kept" if kept_ms >= 7 * DAY_MS else "weak",
        "a subscription that no process runs for so long begins as a new one: all that is kept comes again, but of a"
        " Topic, or with start='latest', what waited is passed over",
        "" if kept_ms >= 7 * DAY_MS else "10080 or more, as long as the inbox remembers",
    )  # fmt: skip
    copies = int(settings.get("offsets.topic.replication.factor", 1))
    if copies < min(count, WANTED_BROKERS):
        yield Finding(
            "server", "offsets.topic.replication.factor", str(copies), "weak",
            "how far subscriptions are is lost with one broker: messages come again, and the inbox absorbs them",
            f"{min(count, WANTED_BROKERS)}, before the first group is used",
        )  # fmt: skip


def judge_topic(channel: Channel, facts: TopicFacts, brokers: int) -> Iterator[Finding]:
    """Yield what the settings of a channel's topic are worth."""
    subject = f"{channel.kind} {channel.name}"
    if isinstance(channel, Stream) and channel.partitions != facts.partitions:
        yield Finding(
            subject, "partitions", str(facts.partitions), "broken",
            f"the system declares {channel.partitions} and does not start (E207)",
            "declare it as it exists, or use another name or ?prefix=", channel=channel.name,
        )  # fmt: skip
    yield from _copies(subject, channel.name, facts, brokers)
    if not facts.settings:
        yield Finding(
            subject, "topic settings", "not told", "unknown", "this user may not describe them",
            "allow DescribeConfigs on the topics of this prefix", channel=channel.name,
        )  # fmt: skip
        return
    yield from _kept(subject, channel, facts.settings)
    largest = int(facts.settings.get("max.message.bytes", MAX_WIRE_BYTES))
    fits = largest >= MAX_WIRE_BYTES
    yield Finding(
        subject, "max.message.bytes", str(largest), "kept" if fits else "weak",
        "every payload up to the limit fits" if fits else "larger messages are refused (E313)",
        "" if fits else f"{MAX_WIRE_BYTES + 65_536}", channel=channel.name,
    )  # fmt: skip


def _copies(subject: str, name: str, facts: TopicFacts, brokers: int) -> Iterator[Finding]:
    wanted = min(brokers, WANTED_BROKERS)
    least = int(facts.settings.get("min.insync.replicas", 1))
    if facts.copies < wanted:
        yield Finding(
            subject, "replication factor", str(facts.copies), "weak", "fewer copies than there are brokers",
            f"reassign its partitions to {wanted} replicas (kafka-reassign-partitions)",
            "everything, when the disk of a broker is lost" if facts.copies == 1 else "", name,
        )  # fmt: skip
    else:
        yield Finding(subject, "replication factor", str(facts.copies), "kept", "as many as there can be", channel=name)
    if facts.in_step < least:
        yield Finding(
            subject, "min.insync.replicas", f"{least}, {facts.in_step} in step", "broken",
            "nothing can be sent until more replicas are in step", "see why a broker is behind or down", channel=name,
        )  # fmt: skip
    elif facts.copies > 1 and least == 1:
        yield Finding(
            subject, "min.insync.replicas", "1", "weak", "a message may be confirmed that only one broker has",
            "min.insync.replicas=2", "the last confirmed messages, when a broker fails that was in step alone", name,
        )  # fmt: skip
    else:
        yield Finding(
            subject, "min.insync.replicas", str(least), "kept", f"confirmed means on {least} broker{'s' * (least > 1)}",
            channel=name,
        )  # fmt: skip
    yield _flushed(subject, name, least, facts.settings)
    if facts.settings.get("unclean.leader.election.enable") == "true":
        yield Finding(
            subject, "unclean.leader.election.enable", "true", "broken",
            "a replica that is behind may become the leader, and the rest is gone",
            "unclean.leader.election.enable=false", "confirmed messages, when the replicas in step fail", name,
        )  # fmt: skip


def _flushed(subject: str, name: str, least: int, settings: Mapping[str, str]) -> Finding:
    if settings.get("flush.messages") == "1":
        return Finding(subject, "flush.messages", "1", "kept", "each message is forced to disk", channel=name)
    if least == 1:
        return Finding(
            subject, "flush.messages", "not set", "weak",
            "Kafka does not wait for the disk: the last confirmed messages may be lost when the machine fails",
            "more brokers with min.insync.replicas=2, or flush.messages=1 (slow)",
            "the last confirmed messages, when the machine of a broker fails", name,
        )  # fmt: skip
    return Finding(
        subject, "flush.messages", "not set", "kept",
        f"Kafka does not wait for the disk; only if {least} machines fail at once is something lost", "",
        f"the last confirmed messages, when {least} machines fail at the same moment", name,
    )  # fmt: skip


def _kept(subject: str, channel: Channel, settings: Mapping[str, str]) -> Iterator[Finding]:
    if "compact" in settings.get("cleanup.policy", "delete"):
        yield Finding(
            subject, "cleanup.policy", settings["cleanup.policy"], "broken",
            "of each key only the last message is kept, whether earlier ones were handled or not",
            "cleanup.policy=delete", "messages that were followed by another of their key", channel.name,
        )  # fmt: skip
    wanted_s = channel.retention_s if isinstance(channel, Stream) else None
    wanted_ms = FOREVER if wanted_s is None else int(wanted_s * 1000)
    there_ms = int(settings.get("retention.ms", FOREVER))
    shorter = there_ms != FOREVER and (wanted_ms == FOREVER or there_ms < wanted_ms)
    for name, value in (("retention.ms", there_ms if shorter else FOREVER), ("retention.bytes", _bytes(settings))):
        if value != FOREVER:
            yield Finding(
                subject, name, str(value), "weak", "what no subscription has handled by then is removed all the same",
                f"{name}={wanted_ms if name == 'retention.ms' else FOREVER}, as declared",
                "what waits longer than the topic keeps it", channel.name,
            )  # fmt: skip


def _bytes(settings: Mapping[str, str]) -> int:
    return int(settings.get("retention.bytes", FOREVER))
