"""A Redis server as an operator sees it: its settings, its groups, its entries.

Invariant: only commands that read are sent. Settings are those of redis.conf, as Redis documents them.
Read next: server.py, ../../inspection.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError
from trunkline.inspection import Finding, Lag, Seen, Verdict
from trunkline.transport import Address, Subscription
from trunkline.transports.redis.connection import Connection, Refusal, failure, pack
from trunkline.transports.redis.layout import Names, Positions, group_of, read_entry
from trunkline.transports.redis.reader import count_after
from trunkline.transports.redis.server import Server

PAGE = 500
BLOCK_MS = 500
GOOD = (7, 0)
"""From this version on the server counts what waits, and keeps its log in parts."""
WANTED = (
    "appendonly", "appendfsync", "no-appendfsync-on-rewrite", "save", "maxmemory", "maxmemory-policy",
    "min-replicas-to-write", "proto-max-bulk-len",
)  # fmt: skip


class RedisInspector:
    """Looks at the server that `address` names."""

    def __init__(self, address: Address, clock: Clock) -> None:
        self._server = Server(address, clock)
        self._connection: Connection | None = None

    async def open(self) -> None:
        """Connect; see Inspector."""
        try:
            self._connection = await self._server.connect(lambda _: None)
        except TransportError as error:
            raise TransportError("E520", f"{self._server.shown}: {error.message}", error.hint) from error
        await self._server.learn(self._connection)

    async def close(self) -> None:
        """Disconnect; see Inspector."""
        if self._connection is not None:
            await self._connection.close()

    async def _run(self, command: bytes) -> Any:
        reply = await self._try(command)
        if isinstance(reply, Refusal):
            raise failure(self._server.shown, reply)
        return reply

    async def _try(self, command: bytes) -> Any:
        assert self._connection is not None  # noqa: S101 - opened
        (reply,) = await self._connection.request(command)
        return reply

    # --- settings ---

    async def examine(
        self,
        channels: Sequence[Channel],
        subscriptions: Sequence[Subscription],  # noqa: ARG002 - groups have no settings
        held_s: float,  # noqa: ARG002 - a process keeps what it has as long as it lives
    ) -> list[Finding]:
        """Return what the server's settings are worth; see Inspector."""
        settings = {}
        for name in WANTED:
            reply = await self._try(pack(("CONFIG", "GET", name)))
            if isinstance(reply, list) and len(reply) == 2:  # noqa: PLR2004 - name and value
                settings[name] = reply[1].decode()
        facts = _facts(await self._try(pack(("INFO", "everything"))))
        found = [self._version(), *_log(settings, facts), *_memory(settings, facts)]
        found += _replicas(facts, self._server.replicas, int(settings.get("min-replicas-to-write", 0)))
        found += _health(facts)
        for channel in channels:
            found += await self._channel(channel)
        return found

    def _version(self) -> Finding:
        version = ".".join(map(str, self._server.version))
        if self._server.version >= GOOD:
            return Finding("server", "version", version, "kept", "has what Trunkline uses")
        return Finding(
            "server", "version", version, "weak", "works, but what waits is counted by reading it", "Redis 7 or later"
        )

    async def _channel(self, channel: Channel) -> list[Finding]:
        """Return what is wrong with a channel that exists."""
        key = Names(self._server.prefix, channel).settings
        kind, partitions = await self._run(pack(("HMGET", key, "kind", "partitions")))
        if kind is None:
            return []
        wanted = channel.partitions if isinstance(channel, Stream) else 0
        if (kind.decode(), int(partitions)) == (channel.kind, wanted):
            return []
        value = f"{kind.decode()}, {partitions.decode()} partitions" if int(partitions) else kind.decode()
        return [
            Finding(
                f"{channel.kind} {channel.name}", "declared as", value, "broken",
                f"the system declares it as {channel.kind}{f' with {wanted} partitions' if wanted else ''}"
                " and does not start (E207)",
                "declare it as it exists, or use another name or ?prefix=", channel=channel.name,
            )
        ]  # fmt: skip

    # --- what waits ---

    async def look(self, subscriptions: Sequence[Subscription]) -> list[Lag | None]:
        """Count what waits for each; see Inspector."""
        return [await self._backlog(subscription) for subscription in subscriptions]

    async def _backlog(self, subscription: Subscription) -> Lag | None:
        group = group_of(subscription)
        counts = []
        for stream in Names(self._server.prefix, subscription.channel).streams:
            if await self._run(pack(("EXISTS", stream))):
                counts += [
                    await self._waiting(stream, facts, deletes=isinstance(subscription.channel, Queue))
                    for facts in map(_pairs, await self._run(pack(("XINFO", "GROUPS", stream))))
                    if facts[b"name"].decode() == group
                ]
        if not counts:
            return None
        in_flight = None if isinstance(subscription.channel, Stream) else sum(pending for _, pending in counts)
        return Lag(sum(waiting for waiting, _ in counts), in_flight)

    async def _waiting(self, stream: bytes, group: dict[bytes, Any], *, deletes: bool) -> tuple[int, int]:
        """Return how many entries a group has not settled, and how many of them it has handed out."""
        pending = int(group[b"pending"])
        if deletes:
            return int(await self._run(pack(("XLEN", stream)))), pending
        info = _pairs(await self._run(pack(("XINFO", "STREAM", stream))))
        lag = group.get(b"lag")
        if group[b"last-delivered-id"] == info[b"last-generated-id"]:
            lag = 0
        elif lag is None:
            lag = await count_after(self._run, stream, group[b"last-delivered-id"])
        return min(int(lag), int(info[b"length"])) + pending, pending

    # --- entries ---

    async def read(self, channel: Channel, *, from_start: bool, follow: bool) -> AsyncIterator[Seen]:
        """Yield entries, which reading leaves where they are; see Inspector."""
        names = Names(self._server.prefix, channel)
        streams = names.streams
        if not await self._run(pack(("EXISTS", names.settings, *streams))):
            raise ConfigurationError(
                "E233", f"no {channel.kind} {channel.name!r} on {self._server.shown}", "start a service first"
            )
        whole = from_start or not follow or not isinstance(channel, Stream)
        after = {}
        for stream in streams:
            newest = [] if whole else await self._run(pack(("XREVRANGE", stream, "+", "-", "COUNT", 1)))
            after[stream] = newest[0][0] if newest else b"0-0"
        positions = Positions()
        while True:
            page = await self._page(after, block_ms=0)
            for stream, entry_id, fields in page:
                after[stream] = entry_id
                message, raw, _ = read_entry(stream, entry_id, fields, getattr(channel, "plain", None))
                yield Seen(positions.of(entry_id), message, raw or b"")
            if not page and not follow:
                return
            if not page:
                await self._page(after, block_ms=BLOCK_MS)

    async def _page(self, after: dict[bytes, bytes], *, block_ms: int) -> list[tuple[bytes, bytes, Any]]:
        """Return (stream, id, fields) of what comes next, the oldest first."""
        block = ("BLOCK", block_ms) if block_ms else ()
        reply = await self._run(pack(("XREAD", "COUNT", PAGE, *block, "STREAMS", *after, *after.values())))
        found = [(stream, entry_id, fields) for stream, entries in reply or () for entry_id, fields in entries]
        return sorted(found, key=lambda entry: tuple(map(int, entry[1].split(b"-"))))


def _pairs(flat: list[Any]) -> dict[bytes, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=False))


def _facts(info: Any) -> dict[str, str]:
    """Return what INFO says, or nothing where it is not allowed."""
    if not isinstance(info, bytes):
        return {}
    lines = (line.partition(":") for line in info.decode().splitlines())
    return {name: value for name, colon, value in lines if colon}


def _log(settings: dict[str, str], facts: dict[str, str]) -> Iterator[Finding]:
    """Yield what the append-only file keeps."""
    told = {"1": "yes", "0": "no"}.get(facts.get("aof_enabled", ""))
    appending = settings.get("appendonly", told)
    if appending is None:
        yield _untold("appendonly", "whether confirmed messages are written to disk at all")
        return
    if appending == "no":
        snapshots = settings.get("save")
        since = " since the last snapshot" if snapshots else ""
        yield Finding(
            "server", "appendonly", "no", "broken",
            f"what was confirmed{since} is gone when the server ends or restarts", "appendonly yes, appendfsync always",
            f"what was confirmed{since}, when the server ends",
        )  # fmt: skip
        return
    yield Finding("server", "appendonly", "yes", "kept", "what is confirmed is in the append-only file")
    yield _synced(settings.get("appendfsync"))
    if settings.get("no-appendfsync-on-rewrite") == "yes":
        yield Finding(
            "server", "no-appendfsync-on-rewrite", "yes", "weak",
            "while the file is rewritten nothing is forced to disk", "no-appendfsync-on-rewrite no",
            "what was confirmed during a rewrite of the file, when the machine fails",
        )  # fmt: skip


def _synced(policy: str | None) -> Finding:
    if policy is None:
        return _untold("appendfsync", "how much a failure of the machine takes")
    if policy == "always":
        return Finding("server", "appendfsync", policy, "kept", "confirmed means on disk")
    much = "up to a second" if policy == "everysec" else "up to half a minute"
    return Finding(
        "server", "appendfsync", policy, "weak",
        f"{much} of confirmed messages may be lost when the machine fails", "appendfsync always",
        f"{much} of confirmed messages, when the machine fails",
    )  # fmt: skip


def _memory(settings: dict[str, str], facts: dict[str, str]) -> Iterator[Finding]:
    policy = settings.get("maxmemory-policy", facts.get("maxmemory_policy"))
    limit = int(settings.get("maxmemory", facts.get("maxmemory", 0)))
    if policy is None:
        yield _untold("maxmemory-policy", "whether messages are evicted when memory is full")
        return
    if policy.startswith("allkeys"):
        # Without a limit it is one setting away from eviction, so it is no less wrong.
        verdict: Verdict = "broken" if limit else "weak"
        yield Finding(
            "server", "maxmemory-policy", policy, verdict,
            "whole channels are evicted when memory is full", "maxmemory-policy noeviction",
            "whole channels, when memory is full",
        )  # fmt: skip
        return
    yield Finding("server", "maxmemory-policy", policy, "kept", "no message is evicted when memory is full")
    if not limit:
        yield Finding(
            "server", "maxmemory", "0 (no limit)", "weak",
            "a long backlog can take all memory of the machine, and the system then ends the server",
            "maxmemory below the memory of the machine: publishing is refused when it is reached",
        )  # fmt: skip
        return
    used = int(facts.get("used_memory", 0))
    full = used > 0.9 * limit
    yield Finding(
        "server", "maxmemory", f"{limit // 1_000_000} MB, {used * 100 // limit} % used", "weak" if full else "kept",
        "publishing is refused when it is reached", "more memory, or let receivers catch up" if full else "",
    )  # fmt: skip


def _replicas(facts: dict[str, str], asked: int, least: int) -> Iterator[Finding]:
    """Yield what a failover takes: replication is asynchronous, and WAIT only waits (redis.io/commands/wait)."""
    if "connected_slaves" not in facts:
        yield _untold("replicas", "whether there is a copy on another machine")
        return
    there = int(facts["connected_slaves"])
    if asked > there:
        yield Finding(
            "server", "replicas", f"{there} connected, ?replicas={asked}", "broken",
            f"nothing can be published: each message waits for {asked} copies (E521)",
            "connect the replicas, or lower ?replicas= in the URL",
        )  # fmt: skip
    elif not there:
        yield Finding(
            "server", "replicas", "0", "weak", "there is one copy of everything",
            "a replica, and ?replicas=1 in the URL", "everything, when the disk of the server is lost",
        )  # fmt: skip
    elif not asked:
        yield Finding(
            "server", "replicas", f"{there} connected, not waited for", "weak",
            "a failover can lose what was confirmed and had not reached the replica", "?replicas=1 in the URL",
            "the last confirmed messages, in a failover",
        )  # fmt: skip
    else:
        yield Finding(
            "server", "replicas", f"{there} connected, {asked} waited for", "kept",
            "what is confirmed is on a replica too; a failover to another one can still lose it",
            "" if least else "min-replicas-to-write 1, so that a primary that was cut off takes nothing",
            "the last confirmed messages, in a failover to a replica that lacks them",
        )  # fmt: skip


def _health(facts: dict[str, str]) -> Iterator[Finding]:
    for name in ("aof_last_write_status", "rdb_last_bgsave_status"):
        if facts.get(name, "ok") != "ok":
            yield Finding(
                "server", name, facts[name], "broken", "the server cannot write to its disk and refuses messages",
                "look into its log and at its disk",
            )  # fmt: skip


def _untold(setting: str, what: str) -> Finding:
    return Finding(
        "server", setting, "not told", "unknown", f"the server does not tell this user {what}",
        "allow CONFIG GET and INFO, or look into its configuration",
    )  # fmt: skip
