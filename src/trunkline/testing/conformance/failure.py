"""Failure cases: killed processes, restarted brokers, spoilt connections.

Read next: load.py.
"""

from __future__ import annotations

from collections import Counter

from trunkline.testing.conformance.bench import Bench, Worker, equal, must
from trunkline.testing.conformance.registry import Group
from trunkline.testing.lines import Line

failure = Group("failure")
PROCESSES = ("durable", "processes")


async def published(bench: Bench, line: Line, count: int = 10, keys: int = 2) -> None:
    """Publish from a process that ends; see all confirmed."""
    publisher = await bench.process(line, role="publish", keys=keys, count=count // keys, pause_s=0)
    await publisher.process.line("done")
    await publisher.process.stop()


async def once_each(bench: Bench, count: int) -> None:
    """See every message have its effect, once where there is an inbox."""
    await bench.drained()
    await bench.quiet(0.5)
    effects = Counter((one.producer, one.key, one.seq) for one in await bench.effects())
    equal(len(effects), count, "messages with an effect")
    if bench.remembers:
        equal([name for name, times in effects.items() if times > 1], [], "messages with several effects")


@failure.case(*PROCESSES)
async def crash_before_effect(bench: Bench) -> None:
    """A message whose handler died with its process is handled by another one."""
    jobs = bench.line()
    await published(bench, jobs)
    stuck = await bench.process(jobs, stall="handler")
    await stuck.process.line("stalled")
    await stuck.process.kill()
    await bench.process(jobs)
    await once_each(bench, 10)


@failure.case(*PROCESSES)
async def crash_between_effect_and_ack(bench: Bench) -> None:
    """A process that dies between effect and settlement leaves one effect: the inbox absorbs the redelivery."""
    jobs = bench.line()
    await published(bench, jobs)
    stuck = await bench.process(jobs, stall="settle")

    async def stored() -> bool:
        return len(await bench.effects()) >= 10

    await bench.until(stored, "the effects were not stored")
    await stuck.process.kill()
    other = await bench.process(jobs)
    await empty(bench, other)
    await once_each(bench, 10)
    if bench.remembers:
        equal(other.begun(), [], "handlers begun again")


async def empty(bench: Bench, worker: Worker) -> None:
    """Wait until a worker sees no backlog, twice in a row and not by what it wrote before."""
    from_now = len(worker.looks())

    def idle() -> bool:
        looks = worker.looks()[from_now:]
        return len(looks) > 2 and not any(look.waiting for look in looks[-2:])

    await bench.until(idle, lambda: f"the backlog is {[look.waiting for look in worker.looks()[-3:]]}")


@failure.case(*PROCESSES)
async def crash_after_ack(bench: Bench) -> None:
    """What was settled before a process died does not come again."""
    jobs = bench.line()
    await published(bench, jobs)
    first = await bench.process(jobs)
    await bench.drained()
    await empty(bench, first)
    await first.process.kill()
    second = await bench.process(jobs)
    await bench.quiet(0.5 + bench.lease_s)
    equal(second.begun(), [], "handlers begun again")
    await once_each(bench, 10)


@failure.case(*PROCESSES, "remembers", "keeps")
async def crash_between_commit_and_publish(bench: Bench) -> None:
    """Messages staged by a process that died before it sent them are sent by the next one, once in effect."""
    jobs, forwarded = bench.line(), bench.line("topic", "forwarded")
    await bench.stop(await bench.start(bench.reader(forwarded)))
    await published(bench, jobs)
    stuck = await bench.process(jobs, stall="send", forward=forwarded.spec)

    async def stored() -> bool:
        return len(await bench.effects()) >= 10

    await bench.until(stored, "the effects were not stored")
    await stuck.process.kill()
    await bench.process(jobs, forward=forwarded.spec)
    reader = bench.reader(forwarded)
    await bench.start(reader)
    await bench.until(lambda: len(reader.seen) >= 10, lambda: f"{len(reader.seen)} of 10 were sent")
    await bench.quiet()
    equal(len(reader.seen), 10, "messages sent")
    await once_each(bench, 10)


@failure.case(*PROCESSES, "remembers", within_s=90)
async def bound_on_duplicates(bench: Bench) -> None:
    """After kills, handlers begin again for no more messages than were in handlers when processes died."""
    jobs = bench.line()
    concurrency, kills = 4, 3
    publisher = await bench.process(jobs, role="publish", keys=6, pause_s=0.06)
    for _ in range(kills):
        worker = await bench.process(jobs, concurrency=concurrency, work_s=0.01)
        await bench.until(lambda worker=worker: len(worker.begun()) > 10, "nothing was handled", 30)  # type: ignore[misc]
        await bench.quiet(0.2 * bench.draws.random())
        await worker.process.kill()
    await bench.process(jobs, concurrency=concurrency)
    await publisher.process.stop()
    await bench.drained()
    await bench.quiet()
    verdict = await bench.verdict(ordered=False)
    must(verdict.passed, verdict.describe())
    begun = bench.deliveries()
    again = len(begun) - len(set(begun))
    # Beside those that run there are those that have returned and whose commit is under way.
    allowed = kills * concurrency * 3
    must(again <= allowed, f"{again} handlers began again after {kills} kills, allowed are {allowed}")
    bench.note = f"{verdict.counts['effects']} effects, {again} handlers begun again, allowed {allowed}"


@failure.case(*PROCESSES)
async def crash_of_publisher(bench: Bench) -> None:
    """What was confirmed to a publisher that died is handled; what it was not told of may be, once."""
    log = bench.line("stream")
    await bench.process(log)
    publisher = await bench.process(log, role="publish", keys=8, pause_s=0.002)
    await bench.until(lambda: len(publisher.journal()) > 100, "nothing was published")
    await publisher.process.kill()
    await bench.drained()
    await bench.quiet()
    verdict = await bench.verdict(ordered=bench.remembers and bench.capabilities.ordered_streams)
    must(verdict.passed, verdict.describe())


# --- the broker ---


async def after_trouble(bench: Bench, publisher: Worker) -> None:
    """See publisher and consumers go on after a trouble, and that nothing confirmed is lost or has two effects."""
    before = sum(1 for entry in publisher.journal() if entry.kind == "ok")

    def goes_on() -> bool:
        return sum(1 for entry in publisher.journal() if entry.kind == "ok") > before + 20

    await bench.until(goes_on, lambda: f"publishing does not go on:\n{publisher.process.tail()}", 60)
    await publisher.process.stop(60)
    await bench.drained(60)
    await bench.quiet()
    verdict = await bench.verdict(ordered=False)
    must(verdict.passed, verdict.describe())
    counts = verdict.counts
    bench.note = (
        f"{counts['acknowledged']} confirmed, {counts['effects']} effects, {counts.get('RECOVERED', 0)} of unknown"
    )


@failure.case(*PROCESSES, "restart", within_s=120)
async def broker_restart_mid_publish(bench: Bench) -> None:
    """A broker that is restarted while messages are published loses none that it confirmed; publishing goes on."""
    jobs, log = bench.line(), bench.line("stream")
    await bench.process(jobs, log)
    publisher = await bench.process(jobs, log, role="publish", keys=4, pause_s=0.04)
    await bench.until(lambda: len(publisher.journal()) > 40, "nothing was published")
    await bench.restart_broker()
    await after_trouble(bench, publisher)


@failure.case(*PROCESSES, "kill", within_s=120)
async def broker_restart_mid_consume(bench: Bench) -> None:
    """A broker that is killed and resumed while messages are handled loses none; its consumers go on by themselves."""
    jobs, log = bench.line(), bench.line("stream")
    publisher = await bench.process(jobs, log, role="publish", keys=4, pause_s=0.04)
    await bench.until(lambda: len(publisher.journal()) > 200, "nothing was published")
    workers = [await bench.process(jobs, log, work_s=0.02, concurrency=2) for _ in range(2)]
    await bench.until(lambda: any(worker.begun() for worker in workers), "nothing was handled")
    await bench.kill_broker()
    await bench.quiet(0.5)
    await bench.resume_broker()
    await after_trouble(bench, publisher)


# --- the network ---


async def through_proxy(bench: Bench) -> tuple[Worker, Line]:
    """Start a consumer and a publisher behind a proxy; return the publisher."""
    proxy, url = await bench.proxy()
    jobs = bench.line()
    await bench.process(jobs, transport=url)
    publisher = await bench.process(jobs, role="publish", keys=4, pause_s=0.01, transport=url)
    await bench.until(lambda: len(publisher.journal()) > 40, "nothing was published")
    must(proxy.connections, "the transport went past the proxy")
    return publisher, jobs


@failure.case(*PROCESSES, "proxy", within_s=120)
async def connection_cut(bench: Bench) -> None:
    """Connections that are cut after any number of bytes are made again; nothing confirmed is lost."""
    publisher, _ = await through_proxy(bench)
    proxy = bench.proxies[0]
    for _ in range(6):
        proxy.toxics.cut_after = (1, 3000)
        proxy.reset()
        await bench.quiet(0.1 + 0.4 * bench.draws.random())
        proxy.toxics.cut_after = None
        await bench.quiet(0.2)
    proxy.heal()
    proxy.reset()
    await after_trouble(bench, publisher)
    bench.note += f"; {proxy.connections} connections, {proxy.cuts} cut"


@failure.case(*PROCESSES, "proxy", within_s=120)
async def half_open_detected(bench: Bench) -> None:
    """A connection that stands but carries nothing is noticed, and another one is made."""
    publisher, _ = await through_proxy(bench)
    proxy = bench.proxies[0]
    before, began = proxy.connections, bench.clock.monotonic()
    proxy.swallow()
    await bench.until(lambda: proxy.connections >= before + 2, "nobody noticed", 75)
    bench.note = f"noticed after {bench.clock.monotonic() - began:.0f} s"
    note = bench.note
    await after_trouble(bench, publisher)
    bench.note = f"{note}; {bench.note}"


@failure.case(*PROCESSES, "proxy", within_s=60)
async def latency_and_slicing(bench: Bench) -> None:
    """A slow network that brings a few bytes at a time changes nothing but the time."""
    proxy, url = await bench.proxy()
    proxy.toxics.latency_s, proxy.toxics.jitter_s, proxy.toxics.slice_bytes = 0.0002, 0.0005, 113
    lines = [bench.line("queue"), bench.line("stream")]
    reader = bench.reader(*lines)
    app = await bench.start(reader, url=url)
    for line in lines:
        await app.publish_all(line.messages(50, producer=line.name))
    await bench.until(lambda: len(reader.seen) >= 100, lambda: f"{len(reader.seen)} of 100 were handled", 30)
    await bench.quiet()
    must(proxy.connections, "the transport went past the proxy")
    wanted = sorted((line.name, number) for line in lines for number in range(1, 51))
    equal(sorted((one.producer, one.seq) for one in reader.seen), wanted, "messages")
