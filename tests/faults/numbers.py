"""The system that the fault tests run: numbered messages whose every effect is a row, and its processes.

`python -m tests.faults.numbers publisher|consumer URL ...` is one process; tests start, kill and restart them.
The effects' table counts up by itself, so its order is the order of commit. Read next: kill.py.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import sys
from collections import Counter
from pathlib import Path

from trunkline import App, Context, Queue, Retry, Running, Service, Stream, Struct
from trunkline.errors import PublishError, StoreFullError, TransportError
from trunkline.testing import Entry, Journal, Kind, read_journal

numbers = Stream("numbers", key="lane", partitions=4)
jobs = Queue("jobs")
answers = Stream("answers", key="lane", partitions=4)

LANES = 4
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS effect (n INTEGER PRIMARY KEY AUTOINCREMENT, producer TEXT NOT NULL,"
    " key TEXT NOT NULL, seq INTEGER NOT NULL, pid INTEGER NOT NULL)"
)


@numbers.event
class Own(Struct):
    """Its handler writes the effect itself."""

    lane: str
    producer: str
    seq: int


@numbers.event
class Follow(Struct):
    """Its handler only returns an Answer, whose handler writes the effect."""

    lane: str
    producer: str
    seq: int


@jobs.command
class OwnJob(Struct):
    """As Own, on a Queue."""

    lane: str
    producer: str
    seq: int


@jobs.command
class FollowJob(Struct):
    """As Follow, on a Queue."""

    lane: str
    producer: str
    seq: int


@answers.event
class Answer(Struct):
    """What Follow and FollowJob lead to."""

    lane: str
    producer: str
    key: str
    seq: int


KINDS = {"own": Own, "follow": Follow, "own-job": OwnJob, "follow-job": FollowJob}
Numbered = Own | Follow | OwnJob | FollowJob


def ledger_key(message: Numbered) -> str:
    """The key of the ledger: each kind of a lane has numbers of its own."""
    (kind,) = (name for name, cls in KINDS.items() if cls is type(message))
    return f"{kind}/{message.lane}"


def ordered(key: str) -> bool:
    """Whether the effects of a ledger key must come in order."""
    return "-job/" not in key


counter = Service("counter")
counter.schema(SCHEMA)
retry = Retry(immediate=1, delays_s=(0.05, 0.2), jitter=0)


class Deliveries:
    """Where handlers journal that they begin; nowhere unless a test says so."""

    def __init__(self, path: str = os.devnull) -> None:
        self.journal = Journal(path)

    def begin(self, message: Numbered) -> None:
        self.journal.add(Kind.DELIVERED, message.producer, ledger_key(message), message.seq)


counter.provide(Deliveries, Deliveries)


async def write_effect(ctx: Context, producer: str, key: str, seq: int) -> None:
    if seq % 3 == 0:
        await asyncio.sleep(0.001)  # a handler that waits for something before its transaction
    tx = await ctx.transaction()
    await tx.execute(
        "INSERT INTO effect (producer, key, seq, pid) VALUES (?, ?, ?, ?)", (producer, key, seq, os.getpid())
    )
    if seq % 5 == 0:
        await asyncio.sleep(0)  # and one that waits inside it


@counter.handle(retry=retry)
async def own(message: Own, ctx: Context, deliveries: Deliveries) -> None:
    deliveries.begin(message)
    await write_effect(ctx, message.producer, ledger_key(message), message.seq)


@counter.handle(retry=retry)
async def own_job(message: OwnJob, ctx: Context, deliveries: Deliveries) -> None:
    deliveries.begin(message)
    await write_effect(ctx, message.producer, ledger_key(message), message.seq)


@counter.handle(retry=retry)
async def follow(message: Follow, deliveries: Deliveries) -> Answer:
    deliveries.begin(message)
    return Answer(message.lane, message.producer, ledger_key(message), message.seq)


@counter.handle(retry=retry)
async def follow_job(message: FollowJob, deliveries: Deliveries) -> Answer:
    deliveries.begin(message)
    return Answer(message.lane, message.producer, ledger_key(message), message.seq)


@counter.handle(retry=retry)
async def answered(message: Answer, ctx: Context) -> None:
    await write_effect(ctx, message.producer, message.key, message.seq)


publisher = Service("publisher")


class Producer:
    """Publishes numbered messages and journals what it was told.

    Args:
        name: the producer in the ledger; its numbers go on after those of its journal.
    """

    def __init__(self, name: str, journal: Path) -> None:
        self.name = name
        self._seqs: Counter[str] = Counter()
        if journal.exists():
            for entry in read_journal(journal):
                self._seqs[entry.key] = max(self._seqs[entry.key], entry.seq)
        self.journal = Journal(journal)
        self.journal.add(Kind.BEGIN, name)

    async def publish(self, running: Running | App, kind: str, lane: str) -> Kind:
        """Publish the next message of a kind and lane; return how it ended."""
        key = f"{kind}/{lane}"
        self._seqs[key] += 1
        seq = self._seqs[key]
        self.journal.add(Kind.INVOKE, self.name, key, seq)
        try:
            await running.publish(KINDS[kind](lane=lane, producer=self.name, seq=seq))
        except (PublishError, StoreFullError):
            end = Kind.FAIL
        except TransportError:
            end = Kind.UNKNOWN
        else:
            end = Kind.OK
        self.journal.add(end, self.name, key, seq)
        return end


def entries(paths: list[Path]) -> list[Entry]:
    """All entries of some producers' journals."""
    return [entry for path in paths for entry in read_journal(path)]


class Load:
    """What a publisher process does until it is stopped: each kind of each lane, one after the other.

    A publish under way at the stop is finished first, so the journal ends with END.
    """

    def __init__(self, producer: Producer, seed: int, pause_s: float) -> None:
        self.producer = producer
        self.rng = random.Random(seed)
        self.pause_s = pause_s
        self.stopping = False

    async def run(self, running: Running) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for lane in range(LANES):
                    for kind in KINDS:
                        group.create_task(self.lane(running, kind, f"lane{lane}"))
        finally:
            self.producer.journal.close()

    async def lane(self, running: Running, kind: str, lane: str) -> None:
        while not self.stopping:
            publish = asyncio.ensure_future(self.producer.publish(running, kind, lane))
            try:
                await asyncio.shield(publish)
                await asyncio.sleep(self.rng.uniform(0, 2 * self.pause_s))  # the pace of this load
            except asyncio.CancelledError:
                self.stopping = True
                await publish


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["publisher", "consumer"])
    parser.add_argument("url")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--name", default="p")
    parser.add_argument("--pause", type=float, default=0.02)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {options.role} {os.getpid()} %(message)s")
    service = counter
    if options.role == "consumer" and options.journal is not None:
        counter.override(Deliveries, lambda: Deliveries(str(options.journal)))
    if options.role == "publisher":
        service = publisher
        producer = Producer(options.name, options.journal)

        @publisher.background
        async def load(running: Running) -> None:
            try:
                await Load(producer, os.getpid(), options.pause).run(running)
            except asyncio.CancelledError:
                with Journal(options.journal) as journal:
                    journal.add(Kind.END, options.name)
                raise

    @service.background
    async def say_ready(running: Running) -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    App(service, options.url, grace_s=20).run()


if __name__ == "__main__":
    main(sys.argv[1:])
