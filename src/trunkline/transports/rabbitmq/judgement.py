"""What RabbitMQ's queues and settings do to what is promised.

Invariant: pure; what AMQP does not tell is said to be so. Source: RabbitMQ, "Quorum Queues", "Streams" ("Data safety":
streams do not flush explicitly), "Classic Queues", "Consumers" (delivery acknowledgement timeout), "Alarms".
Read next: inspector.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from trunkline.channel import Channel, Queue, Stream
from trunkline.inspection import Finding

USUAL_TIMEOUT_S = 1800.0
"""consumer_timeout unless set otherwise (RabbitMQ 3.8.17 and later)."""


def judge_server(version: tuple[int, int], held_s: float) -> Iterator[Finding]:
    """Yield what the broker says of itself, and what it does not.

    Args:
        held_s: how long a message may stay unacknowledged.
    """
    shown = ".".join(map(str, version))
    yield Finding("server", "version", shown, "kept", "has what Trunkline uses")
    yield Finding(
        "server", "cluster size", "not told", "unknown",
        "AMQP does not tell how many nodes there are; with one, nothing works while it is down",
        "see rabbitmqctl cluster_status; three nodes keep quorum queues and streams in three copies",
        "everything, when the disk of the node is lost (unless three nodes have it)",
    )  # fmt: skip
    fits = held_s < USUAL_TIMEOUT_S
    yield Finding(
        "server", "consumer_timeout", "not told", "kept" if fits else "weak",
        f"{USUAL_TIMEOUT_S / 60:g} min unless set otherwise; a message stays unacknowledged for {held_s:g} s at most"
        if fits
        else f"a message may stay unacknowledged for {held_s:g} s; after {USUAL_TIMEOUT_S / 60:g} min, unless set"
        " otherwise, the broker closes the channel and gives it to another process",
        "" if fits else "consumer_timeout in rabbitmq.conf above it, or a shorter timeout_s of the handler",
    )  # fmt: skip


def judge_alarm(reason: str | None) -> Finding:
    """Return whether the broker takes messages.

    Args:
        reason: what it says when it does not.
    """
    if reason is None:
        return Finding("server", "alarms", "none", "kept", "the broker takes messages")
    return Finding(
        "server", "alarms", reason, "broken", "publishing is blocked until it is over",
        "free memory or disk, or raise vm_memory_high_watermark; see rabbitmq-diagnostics alarms",
    )  # fmt: skip


def judge_channel(channel: Channel) -> list[Finding]:
    """Return what the queues of a channel that is declared as it should be are worth."""
    subject, name = f"{channel.kind} {channel.name}", channel.name
    if isinstance(channel, Queue) and channel.priority:
        return [
            Finding(
                subject, "queue type", "classic", "weak",
                "a queue with priority is on one node only, and stands still while that is down",
                "Queue without priority=True: a quorum queue, which is replicated",
                "its messages, when the disk of its node is lost", name,
            )
        ]  # fmt: skip
    if isinstance(channel, Stream):
        return [
            Finding(
                subject, "queue type", "stream", "kept",
                "confirmed means on most replicas; RabbitMQ does not wait for their disks", "",
                "the last confirmed messages of a Stream, when the machines of most replicas (or the only one) fail",
                name,
            )
        ]  # fmt: skip
    return [
        Finding(
            subject, "queue type", "quorum", "kept", "confirmed means on the disks of most replicas", channel=name
        ),
        Finding(
            subject, "delivery-limit", "none, unless a policy sets one", "kept",
            "however often a process dies of a message, it comes again",
            channel=name,
        ),
    ]  # fmt: skip
