"""What NATS' settings do to what is promised.

Invariant: pure; what can be lost is said for each failure, what cannot be known is said to be so. Source: NATS
documentation, "JetStream", "Configuring JetStream" (sync_interval), "Streams", "Consumers". Read next: inspector.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trunkline.channel import Channel, Stream
from trunkline.inspection import Finding
from trunkline.transport import Subscription
from trunkline.transports.nats.layout import ACK_PENDING, DUPLICATE_WINDOW_S
from trunkline.wire import MAX_WIRE_BYTES

WANTED_COPIES = 3
NS = 1_000_000_000
USUAL_SYNC = "2 minutes"
"""How seldom a server forces what it confirmed to disk, unless set otherwise."""
NEAR_FULL = 0.9


def judge_server(info: Mapping[str, Any], account: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what the server says of itself, and what the account may use.

    Args:
        info: of the connection. account: of JetStream.
    """
    yield Finding("server", "version", str(info.get("version")), "kept", "has what Trunkline uses")
    cluster = info.get("cluster")
    yield Finding(
        "server", "cluster", str(cluster or "none"), "kept" if cluster else "weak",
        "channels can have copies" if cluster else "a single server: nothing works while it is down",
        "" if cluster else "three servers",
    )  # fmt: skip
    largest = int(info.get("max_payload", 0))
    fits = largest >= MAX_WIRE_BYTES
    yield Finding(
        "server", "max_payload", str(largest), "kept" if fits else "weak",
        "every payload up to the limit fits" if fits
        else "payloads near 1 MiB do not fit with their envelope and are refused (E313)",
        "" if fits else f"max_payload: {MAX_WIRE_BYTES}",
    )  # fmt: skip
    limit = int(account.get("limits", {}).get("max_storage", -1))
    used = int(account.get("storage", 0))
    if limit > 0:
        full = used > NEAR_FULL * limit
        yield Finding(
            "account", "max_storage", f"{limit // 1_000_000} MB, {used * 100 // limit} % used",
            "weak" if full else "kept", "publishing is refused when it is full",
            "raise it, or let receivers catch up" if full else "",
        )  # fmt: skip


def judge_disk(told: Mapping[str, Any] | None) -> Finding:
    """Return what a failure of the machine takes.

    Args:
        told: the server's JetStream configuration, or None: only users of the system account are told.
    """
    loses = "up to {} of confirmed messages, when the machine fails"
    if told is None:
        return Finding(
            "server", "sync_interval", "not told", "unknown",
            "NATS tells it to its system account alone; unless it is `always`, confirmed is not yet on disk,"
            f" by default for up to {USUAL_SYNC}",
            "see the server's configuration: jetstream { sync_interval: always }",
            f"{loses.format(USUAL_SYNC)} (unless sync_interval is always)",
        )  # fmt: skip
    if told.get("sync_always"):
        return Finding("server", "sync_interval", "always", "kept", "confirmed means on disk")
    interval_s = int(told.get("sync_interval", 120 * NS)) / NS
    return Finding(
        "server", "sync_interval", f"{interval_s:g} s", "weak",
        f"up to {interval_s:g} s of confirmed messages may be lost when the machine fails",
        "jetstream { sync_interval: always }", loses.format(f"{interval_s:g} s"),
    )  # fmt: skip


def judge_stream(channel: Channel, found: Mapping[str, Any], *, clustered: bool) -> Iterator[Finding]:
    """Yield what the stream of a channel is worth."""
    subject, name, config = f"{channel.kind} {channel.name}", channel.name, found["config"]
    metadata = config.get("metadata") or {}
    declared = metadata.get("trunkline.kind"), metadata.get("trunkline.partitions")
    wanted = channel.kind, str(channel.partitions) if isinstance(channel, Stream) else None
    if declared != wanted:
        yield Finding(
            subject, "declared as", " ".join(filter(None, declared)) or "another program's", "broken",
            f"the system declares it as {' '.join(filter(None, wanted))} and does not start (E207)",
            "declare it as it exists, or use another name or ?prefix=", channel=name,
        )  # fmt: skip
    if config.get("storage") == "memory":
        yield Finding(
            subject, "storage", "memory", "broken", "what was confirmed is gone when the server restarts",
            "delete the stream, so that it is made with file storage", "everything, when the server restarts", name,
        )  # fmt: skip
    else:
        yield Finding(subject, "storage", "file", "kept", "messages survive a restart of the server", channel=name)
    yield from _copies(subject, name, int(config.get("num_replicas", 1)), clustered=clustered)
    window_s = int(config.get("duplicate_window", 0)) / NS
    short = window_s < DUPLICATE_WINDOW_S
    yield Finding(
        subject, "duplicate_window", f"{window_s:g} s", "kept",
        "what is sent again within it is stored once" + ("; later the inbox absorbs it" if short else ""), channel=name,
    )  # fmt: skip
    yield from _limits(subject, channel, config)


def _copies(subject: str, name: str, copies: int, *, clustered: bool) -> Iterator[Finding]:
    if copies >= WANTED_COPIES:
        yield Finding(subject, "num_replicas", str(copies), "kept", "one server may fail", channel=name)
        return
    yield Finding(
        subject, "num_replicas", str(copies), "weak",
        "there is one copy of its messages" if copies == 1 else "nothing can be sent while one of both is down",
        f"nats stream edit … --replicas {WANTED_COPIES}" if clustered
        else "a cluster of three servers, and ?replicas=3",
        "everything, when the disk of the server is lost" if copies == 1 else "", name,
    )  # fmt: skip


def _limits(subject: str, channel: Channel, config: Mapping[str, Any]) -> Iterator[Finding]:
    discards = config.get("discard") == "old"
    for name in ("max_msgs", "max_bytes", "max_msgs_per_subject"):
        limit = int(config.get(name, -1))
        if limit <= 0:
            continue
        yield Finding(
            subject, name, str(limit), "weak",
            "when it is reached the oldest messages go, handled or not" if discards
            else "when it is reached publishing is refused",
            f"{name}: -1", "the oldest messages, when the limit is reached" if discards else "", channel.name,
        )  # fmt: skip
    age_s = int(config.get("max_age", 0)) / NS
    wanted_s = (channel.retention_s or 0.0) if isinstance(channel, Stream) else 0.0
    if age_s and (not wanted_s or age_s < wanted_s):
        yield Finding(
            subject, "max_age", f"{age_s:g} s", "weak", "what waits longer is removed, handled or not",
            f"max_age: {wanted_s:g}s, as declared", "what waits longer than the stream keeps it", channel.name,
        )  # fmt: skip


def judge_consumer(subscription: Subscription, found: Mapping[str, Any], held_s: float) -> Iterator[Finding]:
    """Yield what the consumer of a Queue or Topic subscription is worth."""
    config, name = found["config"], subscription.channel.name
    subject = f"subscription {subscription.label}"
    tries = int(config.get("max_deliver", -1))
    if tries > 0:
        yield Finding(
            subject, "max_deliver", str(tries), "broken", "a message that was delivered so often is not brought again",
            "max_deliver: -1", "messages whose process died so often", name,
        )  # fmt: skip
    most = int(config.get("max_ack_pending", ACK_PENDING))
    if most != ACK_PENDING:
        yield Finding(
            subject, "max_ack_pending", str(most), "kept",
            f"so many messages may be under way in all processes (Trunkline sets {ACK_PENDING})", channel=name,
        )  # fmt: skip
    wait_s = int(config.get("ack_wait", 0)) / NS
    yield Finding(
        subject, "ack_wait", f"{wait_s:g} s", "kept",
        f"renewed while a handler works (up to {held_s:g} s); a message of a process that died comes again after it",
        channel=name,
    )  # fmt: skip
