"""A process that publishes or consumes numbered messages on any transport and store, and journals what it does.

`python -m trunkline.testing.worker PLAN` (a Plan as JSON) is one process; tests start, kill and restart it. It prints
`ready` once it runs, and stops at SIGTERM. Read next: processes.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from trunkline.app import App, Running
from trunkline.clock import Clock, Draws, system_clock
from trunkline.errors import PublishError, TransportError
from trunkline.handler import Context
from trunkline.policies.retry import Retry
from trunkline.service import Service
from trunkline.testing.effects import EffectTable
from trunkline.testing.ledger import Journal, Kind, read_journal
from trunkline.testing.lines import Line, Spec

LOOK_S = 0.1


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a worker does.

    Attributes:
        lines: the channels; all are read, or each is published to.
        journal: path of its journal; `journal.looks` gets a Look every LOOK_S.
        name: the service of a consumer, the producer of a publisher.
        table: where effects are written in the message's transaction; empty writes them into the journal.
        work_s: how long a handler takes before its effect.
        stall: where a consumer stands still for good, having printed `stalled`: in the `handler` before its effect, or
            at the first `settle` or `send`, with its effects stored.
        forward: a channel to which a consumer publishes each message again.
        fail_every: a handler fails at the first try of each message whose number is divisible by this; 0 never.
        keys: how many keys a publisher uses, each one message after the other.
        count: messages of each key; 0 publishes until it is stopped.
        pause_s: between two messages of a key, on average.
        padding: bytes of text in each message.
    """

    role: Literal["consume", "publish"]
    transport: str
    store: str
    lines: list[Spec]
    journal: str
    name: str
    table: str = ""
    work_s: float = 0.0
    stall: Literal["", "handler", "settle", "send"] = ""
    forward: Spec | None = None
    fail_every: int = 0
    concurrency: int = 64
    start: Literal["earliest", "latest"] = "earliest"
    grace_s: float = 20.0
    keys: int = 4
    count: int = 0
    pause_s: float = 0.01
    padding: int = 0
    seed: int = 7


class Look(msgspec.Struct, frozen=True, array_like=True):
    """How a worker is at one moment.

    Attributes:
        at: seconds since the epoch.
        rss: its resident memory in bytes.
        begun: handlers begun so far, or messages published.
        waiting: backlog of a consumer.
        in_flight: of these, handed to a process.
    """

    at: float
    rss: int
    begun: int
    waiting: int = 0
    in_flight: int = 0


def read_looks(journal: Path) -> list[Look]:
    """Return what a worker with this journal looked like, oldest first."""
    path = Path(f"{journal}.looks")
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [msgspec.json.decode(line, type=Look) for line in whole.splitlines()]


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Host(msgspec.Struct, frozen=True):
    """Where a worker runs; another one in a simulation.

    Attributes:
        say: tells whoever started it something.
        pid: number of the process, for its effects.
    """

    clock: Clock = system_clock
    say: Callable[[str], None] = say
    pid: Callable[[], int] = os.getpid


def resident_bytes() -> int:
    """Return the memory of this process; where /proc is not, the most that it ever was."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


class Consumer:
    """The handlers of a consumer."""

    def __init__(self, plan: Plan, host: Host) -> None:
        self.plan = plan
        self.host = host
        self.journal = Journal(plan.journal)
        self.begun = 0
        self.table = EffectTable(plan.store, plan.table) if plan.table else None
        self.service = Service(plan.name)
        if self.table is not None:
            self.service.schema(self.table.schema)
        options: dict[str, Any] = {
            "retry": Retry(immediate=0, delays_s=(0.05, 0.2, 1.0), jitter=0),
            "concurrency": plan.concurrency,
        }
        self.forward = None if plan.forward is None else Line(plan.forward)
        if self.forward is not None:
            options["publishes"] = (self.forward.type,)
        if plan.store == "none:":
            options["after_dead_letter"] = "continue"  # nothing could hold the others back
        for spec in plan.lines:
            self._add_handler(Line(spec), {**options, **({"start": plan.start} if spec.kind == "stream" else {})})

    def _add_handler(self, line: Line, options: dict[str, Any]) -> None:
        async def handle(message: Any, ctx: Context) -> None:
            await self.handle(message, ctx, line.name)

        handle.__annotations__ = {"message": line.type, "ctx": Context, "return": None}
        handle.__qualname__ = f"handle_{line.name}"
        self.service.handle(**options)(handle)

    async def handle(self, message: Any, ctx: Context, channel: str) -> None:
        """Journal the delivery, work, write the effect."""
        plan = self.plan
        key = f"{channel}/{message.key}"
        self.begun += 1
        self.journal.add(Kind.DELIVERED, message.producer, key, message.seq)
        if plan.stall == "handler":
            self.host.say("stalled")
            await asyncio.Event().wait()
        if plan.work_s:
            await self.host.clock.sleep(plan.work_s)
        # The first of all tries, not of this process's: a message whose tries are in four processes would be buried.
        if plan.fail_every and message.seq % plan.fail_every == 0 and not ctx.attempt:
            raise RuntimeError("this handler fails once")
        if self.forward is not None:
            ctx.publish(self.forward.message(message.seq, message.key, producer=message.producer))
        if self.table is not None:
            tx = await ctx.transaction()
            await self.table.add(tx, message.producer, key, message.seq, self.host.pid())
        else:
            self.journal.add(Kind.EFFECT, message.producer, key, message.seq)


class Publisher:
    """Publishes numbered messages and journals what it was told; its numbers go on after those of its journal."""

    def __init__(self, plan: Plan, host: Host) -> None:
        self.plan = plan
        self.host = host
        self.service = Service(plan.name)
        self.begun = 0
        self.draws = Draws(plan.seed)
        self.seqs: Counter[str] = Counter()
        self._stopping = False
        if Path(plan.journal).exists():
            for entry in read_journal(plan.journal):
                self.seqs[entry.key] = max(self.seqs[entry.key], entry.seq)
        self.journal = Journal(plan.journal)
        self.journal.add(Kind.BEGIN, plan.name)
        self.lines = [Line(spec) for spec in plan.lines]
        self.service.background(self.run)

    async def run(self, running: Running) -> None:
        """Publish until everything is, or the stop; what is under way then is finished first."""
        try:
            async with asyncio.TaskGroup() as group:
                for line in self.lines:
                    for key in range(self.plan.keys):
                        group.create_task(self.lane(running, line, f"key{key}"))
        finally:
            self.journal.add(Kind.END, self.plan.name)
        self.host.say("done")

    async def lane(self, running: Running, line: Line, key: str) -> None:
        """Publish the messages of one key, one after the other."""
        name = f"{line.name}/{key}"
        while not self._stopping and not (self.plan.count and self.seqs[name] >= self.plan.count):
            publish = asyncio.ensure_future(self.publish(running, line, key, name))
            try:
                await asyncio.shield(publish)
                if self.plan.pause_s:
                    await self.host.clock.sleep(self.draws.uniform(0, 2 * self.plan.pause_s))
            except asyncio.CancelledError:
                self._stopping = True
                await publish

    async def publish(self, running: Running, line: Line, key: str, name: str) -> None:
        """Publish the next message of a key."""
        self.seqs[name] += 1
        self.begun += 1
        seq = self.seqs[name]
        payload = line.message(seq, key, producer=self.plan.name, text="x" * self.plan.padding)
        self.journal.add(Kind.INVOKE, self.plan.name, name, seq)
        self.journal.add(await outcome(running.publish(payload)), self.plan.name, name, seq)


async def outcome(publish: Any) -> Kind:
    """Await a publish; return what the ledger calls its end."""
    try:
        await publish
    except PublishError:
        return Kind.FAIL
    except TransportError:
        return Kind.UNKNOWN
    return Kind.OK


def add_looks(work: Consumer | Publisher, plan: Plan) -> None:
    """Have the worker say `ready`, and write down every now and then how it is."""

    @work.service.background
    async def look(running: Running) -> None:
        app = running.app
        if plan.stall in {"settle", "send"}:

            async def stand_still(_messages: object) -> None:
                work.host.say("stalled")
                await asyncio.Event().wait()

            setattr(app.transport, plan.stall, stand_still)
        work.host.say("ready")
        encode = msgspec.json.encode
        with Path(f"{plan.journal}.looks").open("ab", buffering=0) as file:  # noqa: ASYNC230 - a process of a test
            while True:
                try:
                    backlog = await app.backlog()
                except TransportError as error:
                    logging.getLogger(__name__).warning("no backlog: %s", error)
                else:
                    waiting = sum(one.waiting for one in backlog.values())
                    in_flight = sum(one.in_flight for one in backlog.values())
                    now = Look(work.host.clock.now(), resident_bytes(), work.begun, waiting, in_flight)
                    file.write(encode(now) + b"\n")
                await work.host.clock.sleep(LOOK_S)


def app_of(plan: Plan, host: Host) -> App:
    """Return the App of a worker, not yet started."""
    work = Consumer(plan, host) if plan.role == "consume" else Publisher(plan, host)
    add_looks(work, plan)
    return App(work.service, plan.transport, store=plan.store, clock=host.clock, grace_s=plan.grace_s)


def main(arguments: list[str]) -> None:
    """Run one worker until SIGTERM."""
    plan = msgspec.json.decode(arguments[0], type=Plan)
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {plan.name} {os.getpid()} %(message)s")
    app_of(plan, Host()).run()


if __name__ == "__main__":
    main(sys.argv[1:])
