"""What stands on the server: names, streams, consumers, the bucket of cursors.

Invariant: what exists is used as it is or refused, never changed, but for how long a Stream keeps and how long a
consumer waits. Never does: move messages. Read next: publisher.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from trunkline.channel import Channel, Queue, Stream, Topic
from trunkline.errors import ConfigurationError
from trunkline.transport import Subscription
from trunkline.transports.nats.connection import ApiError, Connection

log = logging.getLogger("trunkline.transport.nats")

DUPLICATE_WINDOW_S = 120.0
"""How long the server knows the id of a message, so that one sent again is stored once."""
ACK_PENDING = 100_000
"""Most messages of a Queue or Topic subscription under way in all processes."""

NOT_ENABLED = {10039, 10076}
NO_STREAM = 10059
NO_CONSUMER = 10014
NAME_IN_USE = 10058
SUBJECTS_OVERLAP = 10065
NO_PEERS = {10005, 10074}
"""Codes of nats-server's errors.json."""


class Names:
    """What things are called on the server.

    Names of channels may have dots, those of streams and consumers may not; `=` is in neither, so it stands for them.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.bucket = f"KV_{prefix}_cursors"

    def stream(self, channel: Channel) -> str:
        """Return the name of the stream of a channel."""
        return f"{self._prefix}_{token(channel.name)}"

    def subject(self, channel: Channel) -> str:
        """Return the subject of a Queue or Topic, or of a Stream what stands before its partition."""
        # Two dots in a row are no subject.
        name = channel.name if ".." not in channel.name else token(channel.name)
        return f"{self._prefix}.{channel.kind[0]}.{name}"

    def cursors(self, subscription: Subscription) -> str:
        """Return what the subjects of a subscription's records begin with."""
        return f"$KV.{self._prefix}_cursors.{token(subscription.channel.name)}.{token(subscription.name)}"


def token(name: str) -> str:
    """Return a name of a channel or subscription as one token of a subject."""
    return name.replace(".", "=")


def durable(subscription: Subscription) -> str:
    """Return the name of a subscription's consumer; a Queue has one owner, whatever its service is called."""
    return "owner" if isinstance(subscription.channel, Queue) else token(subscription.name)


class Layout:
    """Declares what is missing, verifies what is there.

    Args:
        replicas: how many servers keep each stream, or None: three in a cluster, else one.
        ack_wait_s: how long a message of a Queue or Topic stays with a silent process.
    """

    def __init__(self, connection: Connection, names: Names, replicas: int | None, ack_wait_s: float) -> None:
        self._connection = connection
        self._names = names
        self._replicas = replicas
        self._ack_wait_s = ack_wait_s

    async def check_server(self) -> None:
        """Refuse a server that cannot carry channels.

        Raises: ConfigurationError E248.
        """
        shown, info = self._connection.shown, self._connection.info
        try:
            await self._connection.ask("INFO")
        except ApiError as error:
            if error.err_code != 503 and error.err_code not in NOT_ENABLED:  # noqa: PLR2004 - as HTTP's
                raise
            raise ConfigurationError(
                "E248", f"{shown} has no JetStream, so it keeps no message", "enable JetStream for this account"
            ) from error
        version = str(info.get("version", "0.0"))
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
            raise ConfigurationError("E248", f"{shown} is NATS {version}", "2.11 or later is needed")

    async def declare(self, channels: Iterable[Channel], subscriptions: Iterable[Subscription]) -> None:
        """Create what is missing.

        Raises: ConfigurationError E207 if something exists otherwise, E248 if the cluster is too small.
        """
        await asyncio.gather(*(self._stream(channel) for channel in channels))
        wanted = list(subscriptions)
        if any(isinstance(subscription.channel, Stream) for subscription in wanted):
            await self._create(self._bucket_config(), "the bucket of cursors")
        await asyncio.gather(*(self._consumer(one) for one in wanted if not isinstance(one.channel, Stream)))

    # --- streams ---

    async def _stream(self, channel: Channel) -> None:
        asked = self._stream_config(channel)
        found = await self._create(asked, f"{channel.kind} {channel.name!r}")
        if found["max_age"] != asked["max_age"]:
            log.info("%s %r keeps its messages for another time from now on", channel.kind, channel.name)
            window = min(found["duplicate_window"], asked["duplicate_window"])
            changed = {**found, "max_age": asked["max_age"], "duplicate_window": window}
            await self._connection.ask(f"STREAM.UPDATE.{asked['name']}", changed)

    def _stream_config(self, channel: Channel) -> dict[str, Any]:
        subject = self._names.subject(channel)
        age_s = channel.retention_s if isinstance(channel, Stream) else None
        window_s = DUPLICATE_WINDOW_S if age_s is None else min(DUPLICATE_WINDOW_S, age_s)
        metadata: dict[str, str] = {"trunkline.kind": channel.kind}
        if isinstance(channel, Stream):
            metadata["trunkline.partitions"] = str(channel.partitions)
        return {
            "name": self._names.stream(channel),
            "subjects": [f"{subject}.*" if isinstance(channel, Stream) else subject],
            "retention": {"queue": "workqueue", "topic": "interest", "stream": "limits"}[channel.kind],
            "max_age": _ns(age_s or 0),
            "duplicate_window": _ns(window_s),
            "metadata": metadata,
            **_KEPT,
            # Without limits nothing is ever discarded; where an operator sets some, the newest is refused.
            "discard": "old" if isinstance(channel, Stream) else "new",
        }

    def _bucket_config(self) -> dict[str, Any]:
        return {
            "name": self._names.bucket,
            "subjects": [f"$KV.{self._names.bucket.removeprefix('KV_')}.>"],
            "retention": "limits",
            "max_age": 0,
            "duplicate_window": _ns(DUPLICATE_WINDOW_S),
            "metadata": {"trunkline.kind": "cursors"},
            **_KEPT,
            "discard": "new",
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "allow_msg_ttl": True,
            "deny_delete": True,
        }

    async def _create(self, asked: dict[str, Any], shown: str) -> dict[str, Any]:
        """Create a stream unless it exists; return its configuration."""
        found = await self._find(asked["name"]) or await self._make(asked, shown) or await self._find(asked["name"])
        assert found is not None  # noqa: S101 - somebody has made it just now
        _compare(found, asked, shown)
        return found

    async def _find(self, name: str) -> dict[str, Any] | None:
        """Return the configuration of a stream, or None if there is none.

        Asked first, so that a user needs no permission to create what an operator has created.
        """
        try:
            found: dict[str, Any] = (await self._connection.ask(f"STREAM.INFO.{name}"))["config"]
        except ApiError as error:
            if error.err_code != NO_STREAM:
                raise
            return None
        return found

    async def _make(self, asked: dict[str, Any], shown: str) -> dict[str, Any] | None:
        """Create a stream; return its configuration, or None if somebody else was faster."""
        default = 3 if self._connection.info.get("cluster") else 1
        request = {**asked, "num_replicas": self._replicas or default}
        try:
            made = await self._connection.ask(f"STREAM.CREATE.{asked['name']}", request)
        except ApiError as error:
            if error.err_code in NO_PEERS:
                raise ConfigurationError(
                    "E248", f"{shown} cannot have {request['num_replicas']} replicas: {error.message}", "set replicas"
                ) from error
            if error.err_code == SUBJECTS_OVERLAP:
                raise ConfigurationError(
                    "E207", f"{shown}: another stream has its subject {asked['subjects'][0]} already",
                    "remove that stream, or set another prefix",
                ) from error  # fmt: skip
            if error.err_code != NAME_IN_USE:
                raise
            return None
        config: dict[str, Any] = made["config"]
        return config

    # --- consumers ---

    async def _consumer(self, subscription: Subscription) -> None:
        stream, name = self._names.stream(subscription.channel), durable(subscription)
        asked = {
            "durable_name": name,
            "name": name,
            "ack_policy": "explicit",
            "ack_wait": _ns(self._ack_wait_s),
            "deliver_policy": "new" if isinstance(subscription.channel, Topic) else "all",
            "replay_policy": "instant",
            "max_deliver": -1,
            "max_ack_pending": ACK_PENDING,
            "metadata": {"trunkline.subscription": subscription.label},
        }
        try:
            found = (await self._connection.ask(f"CONSUMER.INFO.{stream}.{name}"))["config"]
        except ApiError as error:
            if error.err_code != NO_CONSUMER:
                raise
            await self._connection.ask(
                f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": asked, "action": ""}
            )
            return
        if found["ack_policy"] != "explicit" or found.get("deliver_subject") or found.get("filter_subject"):
            raise ConfigurationError(
                "E207", f"consumer {name} of stream {stream} exists otherwise: ack_policy {found['ack_policy']},"
                f" deliver_subject {found.get('deliver_subject')}, filter_subject {found.get('filter_subject')}",
                "remove it; it must be a pull consumer with explicit acknowledgement and without filter",
            )  # fmt: skip
        if found["ack_wait"] != asked["ack_wait"]:
            changed = {**found, "ack_wait": asked["ack_wait"]}
            await self._connection.ask(
                f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": changed, "action": "update"}
            )

    async def open_reader(self, stream: str, name: str, subject: str, first: int, idle_s: float = 60.0) -> int:
        """Make a consumer that reads `subject` from position `first` in order, without acknowledging.

        It is gone when nobody has asked it for `idle_s` seconds.
        Returns: how many messages it will bring.
        """
        config = {
            "name": name,
            "ack_policy": "none",
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, first),
            "replay_policy": "instant",
            "filter_subject": subject,
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": _ns(idle_s),
        }
        answer = await self._connection.ask(
            f"CONSUMER.CREATE.{stream}.{name}.{subject}", {"stream_name": stream, "config": config, "action": "create"}
        )
        return int(answer["num_pending"])

    async def first_since(self, stream: str, name: str, subject: str, moment_s: int) -> int:
        """Return the position of the first message that was stored at a moment or later, or that of the next one.

        Args:
            name: of a consumer that is made to find out, and removed.
        """
        config = {
            "name": name,
            "ack_policy": "none",
            "deliver_policy": "by_start_time",
            "opt_start_time": datetime.fromtimestamp(moment_s, UTC).isoformat(),
            "filter_subject": subject,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": _ns(5.0),
        }
        answer = await self._connection.ask(
            f"CONSUMER.CREATE.{stream}.{name}.{subject}", {"stream_name": stream, "config": config, "action": "create"}
        )
        await self.close_reader(stream, name)
        return int(answer["delivered"]["stream_seq"]) + 1

    async def close_reader(self, stream: str, name: str) -> None:
        """Remove what `open_reader` made, if it is still there."""
        try:
            await self._connection.ask(f"CONSUMER.DELETE.{stream}.{name}")
        except ApiError as error:
            if error.err_code != NO_CONSUMER:
                raise


_KEPT: dict[str, Any] = {"storage": "file", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1}
"""Everything is on disk, and nothing goes for want of room."""


def _ns(seconds: float) -> int:
    return math.ceil(seconds * 1e9)


def _compare(found: dict[str, Any], asked: dict[str, Any], shown: str) -> None:
    """Refuse a stream that would break what was promised.

    Raises: ConfigurationError E207.
    """
    ours = {name: asked["metadata"].get(name) for name in ("trunkline.kind", "trunkline.partitions")}
    # An operator's own stream says nothing of it; its subjects and retention do.
    theirs = {name: (found.get("metadata") or {}).get(name, ours[name]) for name in ours}
    for name in ("subjects", "retention", "storage"):
        ours[name], theirs[name] = asked[name], found.get(name)
    wrong = [name for name in ours if ours[name] != theirs[name]]
    if wrong:
        exists, wanted = (
            ", ".join(f"{name.removeprefix('trunkline.')} {side[name]}" for name in wrong) for side in (theirs, ours)
        )
        raise ConfigurationError(
            "E207", f"{shown} exists on the server as stream {asked['name']} with {exists}; asked for was {wanted}",
            "declare it as it exists, or use another name",
        )  # fmt: skip
