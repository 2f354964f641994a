"""Failure cases: killed processes, restarted brokers, spoilt connections, names and passwords that change.

Read next: load.py.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Self

from trunkline.app import App
from trunkline.errors import TransportError
from trunkline.handler import Context
from trunkline.testing.conformance.bench import Bench, Worker, equal, must
from trunkline.testing.conformance.registry import Group
from trunkline.testing.conformance.secret import Secret
from trunkline.testing.hostname import HostName
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
    await bench.drained(40)
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


@failure.case(*PROCESSES, "remembers", within_s=90)
async def late_ack_after_lease_ignored(bench: Bench) -> None:
    """A process that was silent for longer than its lease undoes nothing of what another one has handled meanwhile."""
    jobs, log = bench.line(), bench.line("stream")
    for line in (jobs, log):
        await published(bench, line)
    late = await bench.process(jobs, log, work_s=1.0)
    await bench.until(lambda: {key.partition("/")[0] for _, key, _ in late.begun()} == {jobs.name, log.name},
                      "it has no messages of both channels")  # fmt: skip
    await frozen(bench, late)
    in_time = await bench.process(jobs, log)
    await bench.drained(40)
    publisher = await bench.process(jobs, log, role="publish", keys=4, count=10, pause_s=0.1)
    await bench.until(lambda: len(publisher.journal()) > 40, "nothing was published")
    late.process.send(signal.SIGCONT)
    await publisher.process.line("done")
    await bench.drained(40)
    await bench.quiet(1.0 + 2 * bench.lease_s)
    verdict = await bench.verdict_by_channel({log.name} if bench.capabilities.ordered_streams else set())
    must(verdict.passed, verdict.describe())
    bench.note = f"{verdict.counts['effects']} effects, {len(bench.deliveries())} handlers begun"
    # It goes on, or it ends by itself where its store was taken over.
    await settled_by_now(bench, [one for one in (late, in_time) if one.process.alive()], jobs, log)


async def frozen(bench: Bench, worker: Worker) -> None:
    """Let a process stand still, but not in the middle of a commit to a file: nobody gets past that lock."""

    async def is_free() -> bool:
        return bench.table is None or not await bench.table.is_locked()

    await worker.process.freeze()
    while not await is_free():
        worker.process.send(signal.SIGCONT)
        await bench.until(is_free, "a process holds the lock of the file")
        await worker.process.freeze()


async def settled_by_now(bench: Bench, workers: list[Worker], *lines: Line) -> None:
    """See that everything was settled: without these workers nothing comes again, and what is new is handled."""
    for worker in workers:
        await worker.process.stop()
    last = await bench.process(*lines)
    await bench.quiet(0.5 + bench.lease_s)
    equal(last.begun(), [], "handlers begun again")
    for line in lines:
        await published(bench, line)
    await bench.drained()


# --- the broker ---


async def after_trouble(bench: Bench, publisher: Worker) -> None:
    """See publisher and consumers go on after a trouble, and that nothing confirmed is lost or has two effects."""
    before = confirmed(publisher)

    def goes_on() -> bool:
        return confirmed(publisher) > before + 20

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


UNRESOLVED_S = 3.0
"""How long the name stays unknown while `dns_failure_recovers` looks."""


def confirmed(publisher: Worker) -> int:
    """Return how many messages a publisher was told are confirmed."""
    return sum(1 for entry in publisher.journal() if entry.kind == "ok")


@failure.case(*PROCESSES, "restart", "name", "namespaces", within_s=150)
async def dns_failure_recovers(bench: Bench) -> None:
    """While the broker's name is not resolved, a start and what is published wait; then both go on, nothing is lost."""
    name, url = await bench.named()
    lines = bench.line(), bench.line("stream")
    await given_up(bench, name, url, *lines)
    where: dict[str, Any] = {"transport": url, "store": bench.store_for(url), "knows": name}
    workers = [
        await bench.process(*lines, ready=False, **where),
        publisher := await bench.process(*lines, role="publish", keys=4, pause_s=0.04, ready=False, **where),
    ]
    await bench.quiet(UNRESOLVED_S)
    for worker in workers:
        must(worker.process.alive(), f"a start does not wait:\n{worker.process.tail()}")
        must(not worker.process.said("ready"), "a start needs no name: the transport went past it")
    name.learn()
    for worker in workers:
        await worker.process.line("ready", 60 * bench.slow)
    await bench.until(lambda: len(publisher.journal()) > 40, "nothing was published")
    name.forget()
    await bench.restart_broker()
    before = confirmed(publisher)
    await bench.quiet(UNRESOLVED_S)
    equal(
        confirmed(publisher), before, "messages confirmed by a broker whose name is unknown: the transport went past it"
    )
    name.learn()
    await after_trouble(bench, publisher)


async def given_up(bench: Bench, name: HostName, url: str, *lines: Line) -> None:
    """See a start end by itself when its timeout is over, and say so."""
    url += f"{'&' if '?' in url else '?'}timeout_s=2"
    worker = await bench.process(*lines, ready=False, transport=url, store=bench.store_for(url), knows=name)
    must(await worker.process.wait(20 * bench.slow), "a start without a broker ended well")
    must("E520" in worker.process.tail(), f"a start does not say that no broker was reached:\n{worker.process.tail()}")


UNKNOWN_S = 3.0
"""How long a publish of `pub_timeout_is_unknown` waits for its confirmation."""
NOT_SENT, UNKNOWN, CONFIRMED = "E520", "E521", "confirmed"


class Ends:
    """What became of the publishes of an App: number → CONFIRMED, or the code of an error."""

    def __init__(self, app: App, line: Line) -> None:
        self._app = app
        self._line = line
        self.of: dict[int, str] = {}

    async def publish(self, count: int = 1) -> list[str]:
        """Publish the next messages all at once; return what became of them."""
        numbers = range(len(self.of) + 1, len(self.of) + 1 + count)
        self.of |= dict.fromkeys(numbers, "")
        await asyncio.gather(*map(self._publish, numbers))
        return [self.of[number] for number in numbers]

    async def _publish(self, number: int) -> None:
        try:
            await self._app.publish(self._line.message(number))
        except TransportError as error:
            self.of[number] = error.code
        else:
            self.of[number] = CONFIRMED

    def those(self, end: str) -> set[int]:
        """Return the numbers that ended so."""
        return {number for number, found in self.of.items() if found == end}


@failure.case("durable", "proxy", within_s=90)
async def pub_timeout_is_unknown(bench: Bench) -> None:
    """A publish that is not confirmed in time fails and says whether it was sent; its message is there once at most."""
    jobs = bench.line()
    reader = bench.reader(jobs)
    await bench.start(reader)
    proxy, url = await bench.proxy()
    ends = Ends(await bench.start(url=f"{url}{'&' if '?' in url else '?'}timeout_s={UNKNOWN_S}"), jobs)
    equal(await ends.publish(5), [CONFIRMED] * 5, "publishes before the silence")

    async def goes_on() -> bool:
        return await ends.publish() == [CONFIRMED]

    for silence in ("mute", "swallow"):
        setattr(proxy.toxics, silence, True)
        found = set(await ends.publish(5))
        must(found <= {NOT_SENT, UNKNOWN}, f"publishes without an answer ({silence}) ended with {sorted(found)}")
        proxy.heal()
        proxy.reset()
        await bench.until(goes_on, "publishing does not go on", 30)
    confirmed, unknown = ends.those(CONFIRMED), ends.those(UNKNOWN)
    await bench.until(lambda: confirmed <= set(reader.numbers()), lambda: f"lost: {confirmed - set(reader.numbers())}")
    await bench.quiet(1.0)
    handled = Counter(reader.numbers())
    equal(ends.those(NOT_SENT) & set(handled), set(), "messages that were not sent and are there")
    if bench.remembers:
        equal([number for number, times in handled.items() if times > 1], [], "messages that are there more than once")
    there = len(unknown & set(handled))
    bench.note = f"{len(confirmed)} confirmed; of {len(unknown)} of unknown end {there} were there"


class Told(logging.Handler):
    """What Trunkline logs as a warning or worse, while it is entered; the levels that were set do not matter."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._logger = logging.getLogger("trunkline")
        self._level = self._logger.level

    def emit(self, record: logging.LogRecord) -> None:
        """Note a line."""
        self.lines.append(record.getMessage())

    def refusals(self) -> list[str]:
        """Return the lines that say what somebody has to change."""
        return [line for line in self.lines if re.search(r"\bE24\d\b", line)]

    def __enter__(self) -> Self:
        self._logger.setLevel(logging.WARNING)
        self._logger.addHandler(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)


@failure.case("durable", "rotate", within_s=180)
async def credentials_rotated(bench: Bench) -> None:
    """A password that is not taken any more is told; with the variable's new one, or the old one again, all goes on."""
    secret = bench.secret()
    where: dict[str, Any] = {"url": secret.url, "store": bench.store_for(secret.url)}
    gate = asyncio.Event()

    async def wait(_message: object, ctx: Context) -> None:
        await gate.wait()
        if bench.table is not None:
            await ctx.transaction()  # the store may be on the broker, and sign in for this by itself

    jobs = bench.line()
    reader = bench.reader(jobs, act=wait)
    app = await bench.start(reader, **where)
    ends = Ends(await bench.start(**where), jobs)
    for mend in (secret.tell, secret.restore):
        gate.clear()
        equal(await ends.publish(5), [CONFIRMED] * 5, "publishes before the change")
        await bench.until(lambda: len(reader.begun) > len(reader.seen), "no handler began")
        await refused_and_mended(bench, secret, ends, mend, gate)
    sure = ends.those(CONFIRMED)
    await bench.until(lambda: sure <= set(reader.numbers()), lambda: f"lost: {sure - set(reader.numbers())}", 30)
    equal(await bench.dead_letters(app), [], "dead letters")
    bench.note = f"{len(sure)} confirmed, {len(ends.of) - len(sure)} not, {len(set(reader.numbers()))} handled"


async def refused_and_mended(
    bench: Bench, secret: Secret, ends: Ends, mend: Callable[[], Awaitable[None]], gate: asyncio.Event
) -> None:
    """Change the password, see it told while handlers run and messages are published, mend it, see all go on."""
    with Told() as told:
        await secret.change()
        meanwhile = asyncio.ensure_future(ends.publish(5))
        try:
            await bench.until(told.refusals, lambda: f"no line with E24x in the log: {told.lines[-5:]}", 30)
            must(not meanwhile.done(), "publishing does not wait, or needs no password")
            gate.set()
            await mend()
            found = set(await meanwhile)
        finally:
            meanwhile.cancel()
    must(found <= {CONFIRMED, NOT_SENT, UNKNOWN}, f"publishes during the change ended with {sorted(found)}")

    async def goes_on() -> bool:
        return await ends.publish() == [CONFIRMED]

    await bench.until(goes_on, "publishing does not go on", 30)


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
