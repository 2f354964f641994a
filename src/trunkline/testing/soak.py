"""`python -m trunkline.testing.soak URL`: a long run with kills, and a verdict on all that was said.

Publishers and consumers are processes that are killed at random moments and started again; the broker may be
restarted too. Journals and effects go through the ledger. Exit code 1 if anything is wrong. Read next: worker.py.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from trunkline.clock import Draws, system_clock
from trunkline.errors import TransportError, TrunklineError
from trunkline.testing.effects import EffectTable
from trunkline.testing.ledger import Entry, Kind, Verdict, check, read_journal
from trunkline.testing.lines import Spec
from trunkline.testing.processes import Process, ProcessError
from trunkline.testing.worker import Look, Plan, read_looks

STALL_S = 60.0
"""A drain has failed when nothing is handled for so long."""
AWAY_S = 60.0
"""How long the effects may be out of reach: the server that keeps them may be down for a while."""
TELL_S = 2.0
MIB = 1024 * 1024
IN_FLIGHT = 64
"""Handlers that a consumer may have begun when it is killed: what the duplicates are bounded by."""


class Report(msgspec.Struct):
    """What a run found.

    Attributes:
        again: handlers begun beyond one per message.
        allowed: how many of those kills and restarts excuse.
        growth: MiB per minute by which each life of a consumer grew, by its name.
    """

    seed: int
    seconds: float
    kills: dict[str, int]
    restarts: int
    verdict: Verdict
    again: int
    allowed: int
    growth: dict[str, float]
    largest: int

    @property
    def passed(self) -> bool:
        """Return whether nothing is wrong."""
        return self.verdict.passed

    def table(self) -> Table:
        """Return it for people."""
        table = Table("finding", "number", title=f"seed {self.seed}: {'passed' if self.passed else 'FAILED'}")
        counts = self.verdict.counts
        for name in ("LOST", "UNEXPECTED", "DUP_EFFECT", "DUP_DELIVERY", "ORDER", "JOURNAL"):
            found = counts.get(name, 0)
            table.add_row(name, f"[bold red]{found}[/]" if found else "0")
        table.add_section()
        table.add_row("confirmed", str(counts.get("acknowledged", 0)))
        table.add_row("effects", str(counts.get("effects", 0)))
        table.add_row("effects of publishes with unknown end", str(counts.get("RECOVERED", 0)))
        table.add_row("handlers begun again (allowed)", f"{self.again} ({self.allowed})")
        table.add_row("kills", ", ".join(f"{name} {number}" for name, number in self.kills.items()) or "0")
        table.add_row("restarts of the broker", str(self.restarts))
        table.add_row("seconds", f"{self.seconds:.0f}")
        table.add_row("largest consumer", f"{self.largest / MIB:.0f} MiB")
        for name, slope in self.growth.items():
            table.add_row(f"growth of {name}", f"{slope:+.2f} MiB a minute")
        return table


def slope(looks: Sequence[Look]) -> float:
    """Return by how much memory grows, in MiB a minute: the line of least squares through what was seen.

    >>> slope([Look(0.0, 0, 0), Look(60.0, MIB, 0), Look(120.0, 2 * MIB, 0)])
    1.0
    """
    if len(looks) < 3 or looks[0].at == looks[-1].at:  # noqa: PLR2004 - two points are no trend
        return 0.0
    line = statistics.linear_regression([look.at / 60 for look in looks], [look.rss / MIB for look in looks])
    return round(line.slope, 3)


class Counter:
    """Counts the publishes that were begun, by reading on in the journals."""

    def __init__(self, journals: Sequence[Path]) -> None:
        self._places = dict.fromkeys(journals, 0)
        self._count = 0

    def count(self) -> int:
        """Return how many there are by now."""
        for path, place in self._places.items():
            if path.exists():
                with path.open("rb") as file:
                    file.seek(place)
                    text = file.read().rpartition(b"\n")[0]
                self._count += text.count(b'["invoke"')
                self._places[path] = place + len(text)
        return self._count


class Soak:
    """One run.

    Args:
        options: of the command line.
        folder: for journals and logs.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, say: Any) -> None:
        self.options = options
        self.folder = folder
        self.say = say
        self.draws = Draws(options.seed)
        tag = f"soak{system_clock.new_id()[-6:]}"
        url, self.store = options.url, options.store or options.url
        if not url.startswith(("sqlite:", "memory:")) and "prefix=" not in url:
            url += f"{'&' if '?' in url else '?'}prefix={tag}"
        table = EffectTable(self.store, f"effect_{tag}") if EffectTable.fits(self.store) else None
        self.effects = table
        self.lines = [Spec("queue", f"{tag}-jobs"), Spec("stream", f"{tag}-log", partitions=8)]
        per_key = max(1, options.messages // (options.publishers * len(self.lines) * options.keys))
        self.total = per_key * options.publishers * len(self.lines) * options.keys
        self.plans: dict[str, Plan] = {}
        shared: dict[str, Any] = {"transport": url, "store": self.store, "lines": self.lines}
        for number in range(options.publishers):
            name = f"publisher-{number + 1}"
            self.plans[name] = Plan(
                role="publish", name=name, journal=str(folder / f"{name}.journal"), keys=options.keys,
                count=per_key, pause_s=options.pause, padding=options.padding, seed=options.seed + number, **shared,
            )  # fmt: skip
        for number in range(options.consumers):
            name = f"consumer-{number + 1}"
            self.plans[name] = Plan(
                role="consume", name="soak", journal=str(folder / f"{name}.journal"),
                table=table.name if table else "", concurrency=IN_FLIGHT, fail_every=options.fail_every, **shared,
            )  # fmt: skip
        self.running: dict[str, Process] = {}
        self.kills = dict.fromkeys(self.plans, 0)
        self.lives: dict[str, list[float]] = {}
        self.restarts = 0
        self.killed = ""
        self.counter = Counter([Path(self.plans[name].journal) for name in self.names("publish")])

    def start(self, name: str) -> None:
        """Start a process of the plan."""
        plan = msgspec.json.encode(self.plans[name]).decode()
        self.running[name] = Process("trunkline.testing.worker", [plan], self.folder / f"{name}.log")
        self.lives.setdefault(name, []).append(system_clock.now())

    async def run(self) -> Report:
        """Run it all.

        Raises: ProcessError if a process ends by itself; TransportError if the effects cannot be read for too long.
        """
        began = system_clock.monotonic()
        try:
            for name in self.plans:
                self.start(name)
            for process in self.running.values():
                await process.line("ready")
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.trouble())
                    group.create_task(self.published())
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None  # the first ended the other
            await self.published()  # one that was killed at last goes on first
            for name in self.names("publish"):
                await self.running[name].stop()
            await self.drained()
            await system_clock.sleep(1.0)
            for name in self.names("consume"):
                await self.running[name].stop(60)
            return await self.report(system_clock.monotonic() - began)
        finally:
            for process in self.running.values():
                process.close()

    def names(self, role: str) -> list[str]:
        """Return the names of the publishers or consumers."""
        return [name for name, plan in self.plans.items() if plan.role == role]

    # --- trouble ---

    async def trouble(self) -> None:
        """Kill and restart, spread over the time that publishing takes."""
        events = ["kill"] * self.options.kills + ["restart"] * (
            self.options.restarts if self.options.restart_broker else 0
        )
        self.draws.shuffle(events)
        for number, event in enumerate(events, 1):
            share = number / (len(events) + 1)
            while self.counter.count() < self.total * share:
                await system_clock.sleep(0.02)
            await system_clock.sleep(0.2 * self.draws.random())
            await (self.kill() if event == "kill" else self.restart())

    async def kill(self) -> None:
        """Kill one process at once and start it again; sometimes while it still starts."""
        name = self.draws.choice(list(self.plans))
        self.check_alive([name])
        self.killed = name
        await self.running[name].kill()
        self.kills[name] += 1
        self.start(name)
        self.killed = ""

    async def restart(self) -> None:
        """Run the command that restarts the broker."""
        process = await asyncio.create_subprocess_shell(self.options.restart_broker, stdout=asyncio.subprocess.DEVNULL)
        if await process.wait():
            raise ProcessError(f"{self.options.restart_broker!r} ended with {process.returncode}")
        self.restarts += 1

    # --- progress ---

    def journals(self, role: str, *, growing: bool = True) -> list[Entry]:
        """Return what all publishers or consumers wrote."""
        paths = [Path(self.plans[name].journal) for name in self.names(role)]
        return [entry for path in paths if path.exists() for entry in read_journal(path, growing=growing)]

    async def done(self) -> list[Entry]:
        """Return the effects so far, as soon as they can be read.

        Raises: TransportError if they cannot for AWAY_S.
        """
        if self.effects is None:
            return [entry for entry in self.journals("consume") if entry.kind is Kind.EFFECT]
        end = system_clock.monotonic() + AWAY_S
        told = False
        while True:
            try:
                return await self.effects.read()
            except TransportError as error:
                if not error.retryable or system_clock.monotonic() > end:
                    raise
                if not told:
                    self.say(f"the effects cannot be read, waiting up to {AWAY_S:g} s for their store: {error}")
                    told = True
            await system_clock.sleep(0.2)

    async def published(self) -> None:
        """Wait until every publisher has published all."""
        told = 0.0
        while not all(self.running[name].said("done") for name in self.names("publish")):
            self.check_alive([*self.plans])
            now = system_clock.monotonic()
            if now - told > TELL_S:
                told = now
                self.tell("publishing", await self.done())
            await system_clock.sleep(0.1)

    def check_alive(self, names: Sequence[str]) -> None:
        """See that nobody ended who was not killed.

        Raises: ProcessError with what it logged.
        """
        for name in names:
            process = self.running[name]
            if not process.alive() and name != self.killed:
                raise ProcessError(f"{name} ended by itself:\n{process.tail()}")

    def tell(self, what: str, effects: Sequence[Entry]) -> None:
        """Print a line of progress."""
        rss = max((looks[-1].rss for name in self.names("consume") if (looks := self.looks(name))), default=0)
        self.say(
            f"{what}: {len(effects)} effects of {self.total} messages, {sum(self.kills.values())} kills,"
            f" {self.restarts} restarts, largest consumer {rss / MIB:.0f} MiB"
        )

    def looks(self, name: str) -> list[Look]:
        """Return what a consumer looked like."""
        return read_looks(Path(self.plans[name].journal))

    async def drained(self) -> None:
        """Wait until everything confirmed has had its effect.

        When nothing is handled for STALL_S, what is missing is left to the ledger.
        Raises: ProcessError if a consumer ends by itself.
        """
        confirmed = {
            entry[1:] for entry in map(msgspec.structs.astuple, self.journals("publish")) if entry[0] == Kind.OK
        }
        told, most, risen = 0.0, -1, system_clock.monotonic()
        while True:
            effects = await self.done()
            missing = confirmed - {(entry.producer, entry.key, entry.seq) for entry in effects}
            if not missing:
                return
            self.check_alive(self.names("consume"))
            now = system_clock.monotonic()
            if len(effects) > most:
                most, risen = len(effects), now
            elif now - risen > STALL_S:
                self.say(f"nothing was handled for {STALL_S:g} s; {len(missing)} are missing: {sorted(missing)[:5]}")
                return  # the ledger names them LOST
            if now - told > TELL_S:
                told = now
                self.tell("draining", effects)
            await system_clock.sleep(0.5)

    # --- the verdict ---

    async def report(self, took_s: float) -> Report:
        """Ask the ledger."""
        effects = await self.done()
        ordered = {spec.name for spec in self.lines if spec.kind == "stream"} if self.effects is not None else set()
        if self.effects is None:
            effects = list(dict.fromkeys(effects))  # without an inbox a message may have several effects
        published = self.journals("publish", growing=False)
        verdict = check(published, effects, drained=True, ordered=lambda key: key.partition("/")[0] in ordered)
        begun = [entry for entry in self.journals("consume", growing=False) if entry.kind is Kind.DELIVERED]
        retries = sum(1 for entry in set(begun) if self.options.fail_every and entry.seq % self.options.fail_every == 0)
        consumers = self.names("consume")
        faults = sum(self.kills[name] for name in consumers) + self.restarts * len(consumers)
        allowed = faults * IN_FLIGHT * len(self.lines) + retries * (1 + faults)
        again = len(begun) - len(set(begun))
        if again > allowed:
            verdict.count("DUP_DELIVERY", again - allowed)
        return Report(
            self.options.seed, took_s, {name: number for name, number in self.kills.items() if number}, self.restarts,
            verdict, again, allowed, {name: self.growth(name) for name in consumers},
            max(look.rss for name in consumers for look in self.looks(name)),
        )  # fmt: skip

    def growth(self, name: str) -> float:
        """Return the slope of the longest life of a consumer, without its first quarter."""
        looks = self.looks(name)
        bounds = [*self.lives[name], float("inf")]
        lives = [[look for look in looks if begin <= look.at < end] for begin, end in pairwise(bounds)]
        longest = max(lives, key=len)
        return slope(longest[len(longest) // 4 :])


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser("python -m trunkline.testing.soak", description=__doc__)
    root.add_argument("url", help="of the transport; sqlite: and brokers, not memory:")
    root.add_argument("--store", help="URL; default: the transport's own")
    root.add_argument("--messages", type=int, default=10_000, help="to publish in all")
    root.add_argument("--kills", type=int, default=10, help="kill -9 of a process drawn by lot")
    root.add_argument("--restart-broker", metavar="COMMAND", help="restarts the broker and waits until it answers")
    root.add_argument("--restarts", type=int, default=1, help="how often, if there is a command for it")
    root.add_argument("--publishers", type=int, default=2)
    root.add_argument("--consumers", type=int, default=2)
    root.add_argument("--keys", type=int, default=16, help="of each publisher on each channel")
    root.add_argument("--pause", type=float, default=0.0, help="seconds between two messages of a key, on average")
    root.add_argument("--padding", type=int, default=64, help="bytes of text in each message")
    root.add_argument(
        "--fail-every", type=int, default=97, help="a handler fails once for every so many numbers; 0: none"
    )
    root.add_argument("--seed", type=int, default=int(system_clock.random() * 1_000_000))
    root.add_argument("--folder", type=Path, help="for journals and logs; default: a temporary one")
    root.add_argument("--json", type=Path, help="write the report here")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; exit code 1 if anything is wrong."""
    options = parser().parse_args(arguments)
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            report = asyncio.run(Soak(options, folder, say).run())
        except (ProcessError, TrunklineError) as error:
            say(f"FAILED, seed {options.seed}: {error}")
            return 1
    console.print(report.table())
    for name, examples in report.verdict.examples.items():
        say(f"{name}: {', '.join(examples)}")
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
