"""A NATS server as an operator sees it: its limits, streams, consumers and messages.

Invariant: only what reads is asked, but for consumers in memory that count what waits and are gone again.
Read next: layout.py, judgement.py.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any

import msgspec

from trunkline.channel import Channel, Queue, Stream
from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.inspection import Finding, Lag, Seen
from trunkline.link import TIMEOUT_S, Options
from trunkline.transport import Address, Subscription
from trunkline.transports.nats.connection import ApiError, Connection
from trunkline.transports.nats.judgement import judge_consumer, judge_disk, judge_server, judge_stream
from trunkline.transports.nats.layout import NO_CONSUMER, NO_STREAM, Layout, Names, durable
from trunkline.transports.nats.leases import Record
from trunkline.transports.nats.received import delivery

LOOK_S = 0.2
"""How often a stream is looked at for more."""
NO_MESSAGE = {10037, 10040}
"""Codes of nats-server's errors.json."""


class NatsInspector:
    """Looks at the server that `address` names."""

    def __init__(self, address: Address, clock: Clock) -> None:
        options = Options(address)
        self._clock = clock
        self._timeout_s = options.seconds("timeout_s", TIMEOUT_S)
        self._names = Names(options.text("prefix") or "trunkline")
        options.lease(1.0)
        options.number("replicas", 0)
        self._problem: TrunklineError | None = None
        self._connection = Connection(
            address, options, clock, established=_nothing, lost=lambda: None, denied=lambda *_: None
        )
        options.end()
        self._layout = Layout(self._connection, self._names, None, 1.0)

    async def open(self) -> None:
        """Connect; see Inspector."""
        try:
            await self._connection.connect_once()
        except TransportError as error:
            raise TransportError("E520", f"{self._connection.shown}: {error.message}", error.hint) from error

    async def close(self) -> None:
        """Disconnect; see Inspector."""
        await self._connection.close()

    async def _ask(self, verb: str, absent: set[int], body: object = None) -> dict[str, Any] | None:
        """Return an answer of the JetStream API, or None if it says that there is no such thing."""
        try:
            return await self._connection.ask(verb, body)
        except ApiError as error:
            if error.err_code in absent:
                return None
            raise

    # --- settings ---

    async def examine(
        self, channels: Sequence[Channel], subscriptions: Sequence[Subscription], held_s: float
    ) -> list[Finding]:
        """Return what the settings are worth; see Inspector."""
        info = dict(self._connection.info)
        try:
            await self._layout.check_server()
        except ConfigurationError as error:
            return [Finding("server", "jetstream", "off", "broken", error.message, error.hint)]
        account = await self._connection.ask("INFO")
        found = [*judge_server(info, account), judge_disk(await self._told())]
        for channel in channels:
            stream = await self._ask(f"STREAM.INFO.{self._names.stream(channel)}", {NO_STREAM})
            if stream is not None:
                found += judge_stream(channel, stream, clustered=bool(info.get("cluster")))
        for subscription in subscriptions:
            if not isinstance(subscription.channel, Stream):
                consumer = await self._consumer(subscription)
                if consumer is not None:
                    found += judge_consumer(subscription, consumer, held_s)
        return found

    async def _told(self) -> dict[str, Any] | None:
        """Return what the server tells of its JetStream to users of its system account, or None to others."""
        try:
            data, headers = await self._connection.inquire("$SYS.REQ.SERVER.PING.JSZ")
        except TrunklineError:
            return None
        if headers is not None and headers.startswith(b"NATS/1.0 503"):
            return None
        told: dict[str, Any] = msgspec.json.decode(data)
        config = told.get("data", {}).get("config")
        return config if isinstance(config, dict) else None

    async def _consumer(self, subscription: Subscription) -> dict[str, Any] | None:
        stream = self._names.stream(subscription.channel)
        return await self._ask(f"CONSUMER.INFO.{stream}.{durable(subscription)}", {NO_STREAM, NO_CONSUMER})

    async def _stream(self, channel: Channel) -> dict[str, Any] | None:
        return await self._ask(f"STREAM.INFO.{self._names.stream(channel)}", {NO_STREAM})

    # --- what waits ---

    async def look(self, subscriptions: Sequence[Subscription]) -> list[Lag | None]:
        """Count what waits for each; see Inspector."""
        return [await self._lag(subscription) for subscription in subscriptions]

    async def _lag(self, subscription: Subscription) -> Lag | None:
        channel = subscription.channel
        if isinstance(channel, Stream):
            return await self._stream_lag(subscription, channel)
        found = await self._consumer(subscription)
        if found is None:
            # A Queue keeps everything for its first reader.
            kept = await self._stream(channel) if isinstance(channel, Queue) else None
            return None if kept is None else Lag(int(kept["state"]["messages"]), 0)
        in_flight = int(found["num_ack_pending"])
        return Lag(int(found["num_pending"]) + in_flight, in_flight)

    async def _stream_lag(self, subscription: Subscription, channel: Stream) -> Lag | None:
        root = self._names.cursors(subscription)
        if await self._ask(f"STREAM.INFO.{self._names.bucket}", {NO_STREAM}) is None:
            return None
        cursors = [f"{root}.{number}" for number in range(channel.partitions)]
        asked = {"multi_last": cursors}
        found = await self._connection.ask_many(f"DIRECT.GET.{self._names.bucket}", asked)
        records = {
            int(headers["Nats-Subject"].rpartition(".")[2]): msgspec.json.decode(body, type=Record)
            for body, headers in found
            if "Nats-Subject" in headers and body
        }
        if not records:
            return None
        counts = await asyncio.gather(*(self._after(channel, number, records[number].cursor) for number in records))
        return Lag(sum(counts))

    async def _after(self, channel: Channel, number: int, cursor: int) -> int:
        stream, name = self._names.stream(channel), self._clock.new_id().replace("-", "")
        subject = f"{self._names.subject(channel)}.{number}"
        waiting = await self._layout.open_reader(stream, name, subject, cursor, 1.0)
        await self._layout.close_reader(stream, name)
        return waiting

    # --- messages ---

    async def read(self, channel: Channel, *, from_start: bool, follow: bool) -> AsyncIterator[Seen]:
        """Yield messages one by one, which reading leaves where they are; see Inspector."""
        stream = self._names.stream(channel)
        found = await self._stream(channel)
        if found is None:
            raise ConfigurationError("E233", f"no stream {stream} on {self._connection.shown}", "start a service first")
        whole = from_start or not follow or not isinstance(channel, Stream)
        following = 1 if whole else int(found["state"]["last_seq"]) + 1
        subscription = Subscription("look", channel)
        while True:
            asked = {"seq": following, "next_by_subj": ">"}
            answer = await self._ask(f"STREAM.MSG.GET.{stream}", NO_MESSAGE, asked)
            if answer is None:
                if not follow:
                    return
                await self._clock.sleep(LOOK_S)
                continue
            stored = answer["message"]
            following = int(stored["seq"]) + 1
            yield _seen(stored, subscription)


def _seen(stored: dict[str, Any], subscription: Subscription) -> Seen:
    data = base64.b64decode(stored.get("data", ""))
    headers = base64.b64decode(stored["hdrs"]) if stored.get("hdrs") else None
    at = datetime.fromisoformat(stored["time"]).timestamp()
    moment = str(int(at * 1e9)).encode()
    found = delivery(subscription, int(stored["seq"]), -1, moment, data, headers, suspect=False)
    return Seen(found.position, found.message, found.raw or b"")


async def _nothing() -> None:
    """Nothing is made on a new connection."""
