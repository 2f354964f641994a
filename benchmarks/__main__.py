"""Command line: `python -m benchmarks [suite] [--quick] [--case TEXT]`; `make bench SUITE=embedded`.

A full run writes benchmarks/results/<suite>.json and renews the plot and the tables of the documentation; a quick or
partial one writes to build/bench only. Read next: cases.py.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import brokers, curves, embedded, plot, report, scaling, simulator
from benchmarks.cases import Case
from benchmarks.machine import machine_facts, versions
from benchmarks.runner import WORK, Runner

SUITES = {"brokers": brokers, "embedded": embedded, "scaling": scaling, "simulator": simulator}
PICTURES = {"brokers": plot.svg, "embedded": plot.svg, "scaling": curves.svg, "simulator": plot.svg}
console = Console()


def main() -> None:
    """Run what the command line asks for; exit code 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, side by side, in alternation.")
    parser.add_argument("suite", nargs="?", choices=sorted(SUITES), help="one suite; default: all")
    parser.add_argument("--quick", action="store_true", help="small cases, for development")
    parser.add_argument("--case", help="only cases with this text in their name")
    parser.add_argument("--rounds", type=int, help="rounds of each case; default: at least 5")
    parser.add_argument("--page", action="store_true", help="renew plot and page from the results; measure nothing")
    options = parser.parse_args()
    missed = 0
    for suite in [options.suite] if options.suite else sorted(SUITES):
        if not options.page:
            missed += _run(suite, options)
        if options.page or not (options.quick or options.case):
            _document(suite)
    sys.exit(1 if missed else 0)


def _run(suite: str, options: argparse.Namespace) -> int:
    cases = [case for case in SUITES[suite].CASES if not options.case or options.case in case.name]
    if not cases:
        sys.exit(f"no case named like {options.case!r} (have: {'; '.join(case.name for case in SUITES[suite].CASES)})")
    results = _measure(suite, cases, options)
    folder = WORK if options.quick or options.case else report.RESULTS
    console.print(report.terminal_table(suite, results))
    console.print(f"written to {report.write_results(folder, suite, results).relative_to(report.ROOT)}")
    return sum(result["met"] is False for result in results)


def _measure(suite: str, cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    results: list[dict[str, Any]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(suite)

        def tell(text: str) -> None:
            progress.update(task, description=text)
            if not console.is_terminal:
                console.print(text)

        runner = Runner(
            quick=options.quick, rounds=options.rounds, progress=tell,
            skipped=lambda reason: console.print(f"[yellow]not run:[/] {reason}"),
        )  # fmt: skip
        progress.update(task, total=sum(runner.steps(case) for case in cases))
        try:
            facts = machine_facts(WORK)
            for case in cases:
                samples = runner.run(case)
                progress.advance(task, runner.steps(case))
                results += [row.read(samples) for row in case.rows]
        finally:
            runner.close()
    known = versions()
    return [{**result, "machine": facts, "versions": known} for result in results]


def _document(suite: str) -> None:
    report.plot_path(suite).write_text(PICTURES[suite](report.load(suite)))
    report.PAGE.write_text(report.with_block(report.PAGE.read_text(), suite))
    report.README.write_text(report.readme_with_speed(report.README.read_text()))
    console.print(f"renewed {report.PAGE.relative_to(report.ROOT)} and {report.plot_path(suite).name}")


if __name__ == "__main__":
    main()
