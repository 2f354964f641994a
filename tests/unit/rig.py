"""A Rig: real Apps of one transport on a virtual clock, with everything an operator would see recorded.

Invariant: nothing of Trunkline is replaced; the rig waits for conditions, never for time to pass.
Read next: conftest.py.
"""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from trunkline import App, Service, System
from trunkline.clock import ManualClock
from trunkline.engine import query
from trunkline.hooks import Fact
from trunkline.message import Message, pack
from trunkline.store import DeadLetterRow
from trunkline.transport import Staged, Subscription


async def until(condition: Callable[[], Any], within_s: float = 10.0) -> None:
    """Let the loop run until `condition()` holds."""
    try:
        async with asyncio.timeout(within_s):
            while not await holds(condition):
                await asyncio.sleep(0.0005)
    except TimeoutError:
        raise AssertionError("the condition did not come true") from None


async def holds(condition: Callable[[], Any]) -> Any:
    """Return what `condition()` gives, awaited if it has to be."""
    value = condition()
    return await value if inspect.isawaitable(value) else value


class Rig:
    """Starts Apps on `url` and looks into them."""

    def __init__(self, url: str, clock: ManualClock) -> None:
        self.url = url
        self.clock = clock
        self.facts: list[Fact] = []
        self.app: App

    @contextlib.asynccontextmanager
    async def run(self, *services: Service, store: str | None = None, grace_s: float = 2.0) -> AsyncIterator[App]:
        """Run services until the block ends."""
        self.app = App(System("rig", services), self.url, store=store, clock=self.clock, grace_s=grace_s)
        self.app.hooks.add(self.facts.append)
        async with self.app:
            yield self.app

    def kinds(self) -> list[str]:
        """Return what happened, in order."""
        return [fact.kind for fact in self.facts]

    async def waiting(self) -> int:
        """Return how many messages are not settled yet."""
        found = 0
        for consumer in self.app._consumers:
            found += (await self.app.transport.backlog(consumer.subscription)).waiting + consumer._under_way
        return found

    async def idle(self, within_s: float = 10.0) -> None:
        """Wait until every message is settled and nothing more is on its way."""
        async with asyncio.timeout(within_s):
            quiet = 0
            while quiet < 3:
                await asyncio.sleep(0.0005)
                busy = await self.waiting() or self.outbox_due()
                quiet = 0 if busy else quiet + 1

    async def pass_time(self, condition: Callable[[], Any], step_s: float = 1.0, within_s: float = 10.0) -> None:
        """Move the clock in steps until `condition()` holds; `within_s` is of the machine's own time."""
        async with asyncio.timeout(within_s):
            while not condition():
                await self.clock.advance(step_s)
                await asyncio.sleep(0.002)

    def parked(self) -> int:
        """Return how many messages are parked on disk."""
        if self.url == "memory:":
            return self.app.store._parked.count()  # type: ignore[attr-defined]
        return int(self.query("SELECT count(*) FROM trunkline_parked")[0][0])

    def outbox_due(self) -> int:
        """Return how many staged messages should have left by now."""
        now = self.clock.now()
        if self.url == "memory:":
            return sum(1 for due, _, _ in self.app.store._outbox if due <= now)  # type: ignore[attr-defined]
        return int(self.query("SELECT count(*) FROM trunkline_outbox WHERE due <= ?", (now,))[0][0])

    async def dead(self) -> list[DeadLetterRow]:
        """Return the dead letters."""
        return await self.app.store.dead_letters()

    async def buried(self, count: int = 1) -> list[DeadLetterRow]:
        """Wait for so many dead letters."""

        async def enough() -> bool:
            return len(await self.dead()) >= count

        await until(enough)
        return await self.dead()

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Return rows of the store's tables."""
        store: Any = self.app.store
        connection = store._connection() if self.url == "memory:" else store.engine.reader
        return list(connection.execute(sql, parameters).fetchall())

    async def put(self, subscription_of: str, *messages: Message) -> None:
        """Publish ready-made envelopes as one batch to the channel that the service `subscription_of` reads."""
        channel = self.subscription(subscription_of).channel
        await self.app.transport.send([Staged(channel, message) for message in messages])

    def subscription(self, name: str) -> Subscription:
        """Return the subscription of that name."""
        return next(c.subscription for c in self.app._consumers if c.subscription.name == name)

    async def put_bytes(self, name: str, raw: bytes, partition: int | None = None) -> None:
        """Let the subscription `name` receive `raw` as an envelope, as another process could have written it."""
        if self.url == "memory:":
            from trunkline.transport import Delivery

            transport: Any = self.app.transport
            subscription = self.subscription(name)
            transport._position += 1
            partition = (0 if subscription.channel.kind == "stream" else -1) if partition is None else partition
            reader = transport.readers[subscription.label]
            reader.append(Delivery(subscription, None, raw, None, transport._position, partition))
            reader.wake()
            return
        await self._write_bytes(self.subscription(name), raw, partition or 0)

    async def _write_bytes(self, subscription: Subscription, raw: bytes, partition: int) -> None:
        from trunkline.transports.sqlite.tables import FREE, last_position, log_place, queue_place

        transport: Any = self.app.transport
        reader = transport._readers[subscription.label]

        def write(connection: Any) -> None:
            if subscription.channel.kind == "stream":
                position = last_position(connection, reader.channel) + 1
                row = (log_place(reader.channel, position), partition, raw)
                connection.execute("INSERT INTO trunkline_log VALUES (?, ?, 0, ?)", row)
            else:
                number = query(
                    connection, "UPDATE trunkline_counter SET value = value + 1 WHERE name = 'row' RETURNING value"
                )[0][0]
                row = (queue_place(reader.number, 0, number), FREE, raw)
                connection.execute("INSERT INTO trunkline_queue VALUES (?, ?, 0, ?)", row)

        await transport.engine.run(write)
        transport.foreign_change()


def same(message: Message, **changes: Any) -> bytes:
    """Return a changed envelope as stored."""
    return pack(msgspec.structs.replace(message, **changes))
