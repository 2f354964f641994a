"""`python -m trunkline.testing.conformance URL`: run the suite and print what became of each case."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from trunkline.errors import TrunklineError
from trunkline.testing.conformance import Bench, Case, Controls, Result, cases, result_of
from trunkline.testing.conformance.matrix import Report
from trunkline.transport import parse_address

STYLES = {"passed": "green", "failed": "bold red", "n/a": "dim"}


async def shell(line: str, **variables: str) -> None:
    """Run a shell command; raise RuntimeError if it fails."""
    process = await asyncio.create_subprocess_shell(
        line, stdout=asyncio.subprocess.DEVNULL, env={**os.environ, **variables}
    )
    if await process.wait():
        raise RuntimeError(f"{line!r} ended with {process.returncode}")


def command(line: str | None) -> Callable[[], Awaitable[None]] | None:
    """Return a function that runs a shell command, or None."""
    return None if line is None else partial(shell, line)


def rotation(line: str | None) -> Callable[[str], Awaitable[None]] | None:
    """Return a function that runs a shell command with a password in its environment, or None."""
    return None if line is None else lambda password: shell(line, PASSWORD=password)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    root = argparse.ArgumentParser("python -m trunkline.testing.conformance", description=__doc__)
    root.add_argument("url", help="of the transport")
    root.add_argument("--store", help="URL of a store; default: the transport's own")
    root.add_argument("--case", action="append", help="run this case only; may be repeated")
    root.add_argument("--group", action="append", help="core, order, failure or load; may be repeated")
    root.add_argument("--json", type=Path, help="write the results here, for the matrix")
    root.add_argument("--setting", default="", help="what the report says of the broker's settings")
    root.add_argument("--slow", type=float, default=1.0, help="each deadline is so many times longer")
    root.add_argument("-x", "--stop", action="store_true", help="stop at the first case that fails")
    root.add_argument("--list", action="store_true", help="print the cases and what they need")
    root.add_argument("--restart", metavar="COMMAND", help="restarts the broker and waits until it answers")
    root.add_argument("--kill", metavar="COMMAND", help="kills the broker")
    root.add_argument("--resume", metavar="COMMAND", help="starts it again and waits until it answers")
    root.add_argument("--rotate", metavar="COMMAND", help="has the broker take $PASSWORD, cuts its user's connections")
    root.add_argument("--name", help="host name by which the broker tells clients where it is, as Kafka does")
    return root


async def run(options: argparse.Namespace, chosen: list[Case], say: Callable[[Result], None]) -> Report:
    """Run the chosen cases, one after the other."""
    controls = Controls(
        command(options.restart), command(options.kill), command(options.resume), rotate=rotation(options.rotate),
        name=options.name,
    )  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = None
        for case in chosen:
            bench = Bench(options.url, options.store, folder=Path(folder), controls=controls, slow=options.slow)
            results.append(await result_of(case, bench))
            say(results[-1])
            if options.stop and results[-1].outcome == "failed":
                break
    assert bench is not None  # noqa: S101 - `choose` gives one case at least
    store = parse_address(bench.store_url).scheme
    return Report(bench.scheme, bench.scheme, store, options.setting, bench.capabilities, results)


def choose(options: argparse.Namespace) -> list[Case]:
    """Return the cases that were asked for; end the program if there are none."""
    known = {case.name: case for case in cases()}
    unknown = [name for name in options.case or () if name not in known]
    if unknown:
        sys.exit(f"no case {', '.join(unknown)}; --list prints them")
    chosen = [known[name] for name in options.case] if options.case else list(known.values())
    chosen = [case for case in chosen if not options.group or case.group in options.group]
    if not chosen:
        sys.exit("no case is left; --list prints them")
    return chosen


def short(note: str) -> str:
    """Return the first line of a note and the last one, which of a log says most; --json has all of it."""
    lines = note.splitlines()
    return note if len(lines) <= 1 else f"{lines[0]} … {lines[-1][-300:]}"


def listing(chosen: list[Case]) -> Table:
    """Return the cases as a table; their names are whole however narrow it is, for `--case` takes them."""
    table = Table(Column("case", no_wrap=True, min_width=max(len(case.name) for case in chosen)))
    for header in ("group", "what it shows", "needs"):
        table.add_column(header)
    for case in chosen:
        table.add_row(case.name, case.group, case.guarantee, ", ".join(case.needs))
    return table


def main() -> int:
    """Run; exit code 1 if a case failed."""
    options = parser().parse_args()
    console = Console()
    chosen = choose(options)
    if options.list:
        console.print(listing(chosen), crop=False)
        return 0
    logging.getLogger("trunkline").setLevel(logging.CRITICAL)
    table = Table("case", "result", "seconds", "note")

    def say(result: Result) -> None:
        line = f"{result.outcome:7} {result.case} ({result.seconds:.1f} s) {short(result.note)}"
        console.print(line, markup=False, soft_wrap=True, highlight=False)
        table.add_row(
            result.case, f"[{STYLES[result.outcome]}]{result.outcome}", f"{result.seconds:.1f}",
            escape(short(result.note)),
        )  # fmt: skip

    try:
        report = asyncio.run(run(options, chosen, say))
    except TrunklineError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    console.print(table)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return int(any(result.outcome == "failed" for result in report.results))


if __name__ == "__main__":
    sys.exit(main())
