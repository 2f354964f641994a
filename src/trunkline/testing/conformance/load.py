"""Load cases: bounded memory, limits, ends by signal, several services and processes.

Read next: registry.py.
"""

from __future__ import annotations

import signal
from typing import Any

from trunkline.handler import Context
from trunkline.testing.conformance.bench import Bench, equal, must
from trunkline.testing.conformance.failure import PROCESSES, empty, published
from trunkline.testing.conformance.registry import Group
from trunkline.testing.ledger import Kind

load = Group("load")
MIB = 1024 * 1024


@load.case(*PROCESSES, within_s=90)
async def slow_consumer_bounded_memory(bench: Bench) -> None:
    """A consumer that is slower than its publishers grows by 64 MiB at most, however much waits."""
    jobs = bench.line()
    worker = await bench.process(jobs, work_s=0.05, concurrency=2)
    before = (await bench.until(worker.looks, "it never looked"))[-1].rss
    app = await bench.start()
    for number in range(10):
        await app.publish_all([jobs.message(number * 1000 + one, text="x" * 8192) for one in range(1, 1001)])
    await bench.quiet(1.5)
    grown = max(look.rss for look in worker.looks()) - before
    must(grown <= 64 * MIB, f"it grew by {grown / MIB:.0f} MiB while 78 MiB waited")
    bench.note = f"grew by {grown / MIB:.0f} MiB while 78 MiB waited"
    await worker.process.kill()


@load.case()
async def concurrency_limit(bench: Bench) -> None:
    """No more handlers run at once than `concurrency` says, and as many do."""
    jobs = bench.line()
    running, most = [0], [0]

    async def act(_job: Any, _ctx: Context) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await bench.clock.sleep(0.01)
        running[0] -= 1

    reader = bench.reader(jobs, act=act, concurrency=3)
    app = await bench.start(reader)
    await app.publish_all(jobs.messages(40))
    await bench.until(lambda: len(reader.seen) >= 40, lambda: f"{len(reader.seen)} of 40 were handled")
    equal(most[0], 3, "handlers at once")


@load.case(*PROCESSES, within_s=60)
async def prefetch_limit(bench: Bench) -> None:
    """A process that does not get on holds back a bounded number of messages; the others go to those that do."""
    jobs = bench.line()
    stuck = await bench.process(jobs, stall="handler", concurrency=1)
    app = await bench.start()
    await app.publish(jobs.message(1))
    await stuck.process.line("stalled")
    for number in range(6):
        await app.publish_all([jobs.message(2 + number * 1000 + one) for one in range(1000)])
    other = await bench.process(jobs, table="")
    await bench.until(
        lambda: len(other.begun()) >= 2000,
        lambda: f"of 6001 messages only {len(other.begun())} came to the other process",
        30,
    )
    await bench.quiet(1.0)
    held = 6001 - len(set(other.begun()))
    bench.note = f"at most {held} of 6001 held back"
    await stuck.process.kill()


@load.case(*PROCESSES)
async def sigterm_drains_nothing_lost(bench: Bench) -> None:
    """SIGTERM lets handlers finish and gives the rest back: nothing is lost, and no handler begins twice."""
    jobs = bench.line()
    await published(bench, jobs, 60)
    first = await bench.process(jobs, work_s=0.3, concurrency=4)
    await bench.until(lambda: len(first.begun()) >= 6, "nothing was handled")
    await first.process.stop()
    begun = first.begun()
    must(len(begun) < 60, "all was handled before the signal")
    done = {(one.producer, one.key, one.seq) for one in await bench.effects()}
    equal(done, set(begun), "what has effects, compared with what had begun")
    second = await bench.process(jobs)
    await bench.drained()
    await empty(bench, second)
    equal(len(bench.deliveries()), 60, "handlers begun")


@load.case(*PROCESSES)
async def sigterm_deadline_requeues(bench: Bench) -> None:
    """A handler that does not end in the time of a stop is undone; its message comes to the next process."""
    jobs = bench.line()
    await published(bench, jobs)
    stuck = await bench.process(jobs, stall="handler", grace_s=0.3)
    await stuck.process.line("stalled")
    stuck.process.send(signal.SIGTERM)
    equal(await stuck.process.wait(), 0, "exit code")
    equal(await bench.effects(), [], "effects of handlers that did not end")
    other = await bench.process(jobs)
    await bench.drained()
    await empty(bench, other)
    equal(len(await bench.effects()), 10, "effects")


@load.case(*PROCESSES, "remembers", within_s=90)
async def two_services_three_processes(bench: Bench) -> None:
    """Two services with three processes each, on all kinds of channels: each service has each effect once."""
    lines = [bench.line("topic"), bench.line("stream")]
    services = ("billing", "shipping")
    table = bench.table.name if bench.table else ""
    for service in services:
        for _ in range(3):
            await bench.process(*lines, name=service, table=table and f"{table}_{service}")
    publisher = await bench.process(*lines, role="publish", keys=6, count=12, pause_s=0.01)
    await publisher.process.line("done", 60)
    wanted = {(one.producer, one.key, one.seq) for one in bench.published() if one.kind is Kind.OK}
    equal(len(wanted), 2 * 6 * 12, "confirmed messages")
    for service in services:

        async def done(service: str = service) -> bool:
            return len(await bench.effects_in(f"{table}_{service}")) >= len(wanted)

        await bench.until(done, f"{service} misses effects", 30)
    await bench.quiet()
    for service in services:
        found = [(one.producer, one.key, one.seq) for one in await bench.effects_in(f"{table}_{service}")]
        equal(sorted(found), sorted(wanted), f"effects of {service}")


@load.case(*PROCESSES, "remembers", within_s=120)
async def soak(bench: Bench) -> None:
    """Publishers and consumers that are killed at random moments: the ledger finds nothing wrong."""
    jobs, log = bench.line(), bench.line("stream")
    consumers = [await bench.process(jobs, log, work_s=0.001) for _ in range(2)]
    options: dict[str, Any] = {"role": "publish", "keys": 4, "pause_s": 0.1}
    publishers = [await bench.process(jobs, log, name=f"publisher-{number}", **options) for number in range(2)]
    for number in range(4):
        await bench.quiet(0.2 + 0.3 * bench.draws.random())
        group = publishers if number % 2 else consumers
        victim = group[bench.draws.randrange(2)]
        await victim.process.kill()
        group[group.index(victim)] = await bench.again(victim)
    for publisher in publishers:
        await publisher.process.stop()
    await bench.drained(30)
    await bench.quiet()
    verdict = await bench.verdict_by_channel({log.name})
    must(verdict.passed, verdict.describe())
    bench.note = f"{verdict.counts['effects']} effects, {len(bench.deliveries())} handlers begun, 4 kills"
