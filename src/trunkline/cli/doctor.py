"""`trunkline doctor`: whether everything is as it must be, and what each link keeps.

Invariant: exit code 1 exactly when a check failed. Read next: checks.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli import options
from trunkline.cli.terminal import FAILED, print_json, printable, stdout, write_rows
from trunkline.config import Settings, load_settings

if TYPE_CHECKING:
    from rich.table import Table

    from trunkline.cli.checks import Check
    from trunkline.cli.promises import LinkPromise
    from trunkline.inspection import Finding

_LOOKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        findings: what live servers told, as they told it; they are among `checks` too.
    """

    checks: list[Check]
    findings: list[Finding]
    links: list[LinkPromise]


def doctor(
    target: options.Target = None,
    *,
    transport: options.Transport = None,
    store: options.Store = None,
    integrity: Annotated[
        bool, typer.Option("--integrity/--no-integrity", help="Read the whole file to check it.")
    ] = True,
    as_json: options.AsJson = False,
) -> None:
    """Check environment, file or server, and services.

    A broker or database is asked for the settings that decide what a confirmation is worth. With MODULE:OBJECT it
    also says what each link from service to service guarantees now. Looking changes nothing.

    Exit code 1 when something is wrong; a warning alone is 0.
    """
    settings = load_settings(transport=transport, store=store, app=target)
    report = _examine(settings, integrity=integrity)
    if as_json:
        print_json(report)
    else:
        _write(report)
    if any(check.status == "fail" for check in report.checks):
        raise typer.Exit(FAILED)


def _examine(settings: Settings, *, integrity: bool) -> Report:
    from trunkline.cli.actions import place
    from trunkline.cli.checks import environment, file_checks, settings_checks, system_checks
    from trunkline.cli.live import examine, left_over_checks
    from trunkline.cli.promises import promises
    from trunkline.cli.target import load_target

    checks = list(environment())
    system = None
    if settings.app is not None:
        target = load_target(settings)
        system = target.system
        if target.app is not None:
            where = dict.fromkeys(("transport", "store"), target.name)
            settings = Settings(target.app.transport_url, target.app.store_url, settings.app, where)
    adapters = list(settings_checks(settings))
    checks += adapters
    usable = all(check.status != "fail" for check in adapters)
    if usable:
        checks += file_checks(settings.transport, integrity=integrity)
        if place(settings.store) != place(settings.transport):
            checks += file_checks(settings.store, integrity=integrity)
        checks += asyncio.run(left_over_checks(settings))
    told, findings = asyncio.run(examine(settings, system))
    checks += told
    if system is None:
        return Report(checks, findings, [])
    checks += system_checks(system, settings)
    return Report(checks, findings, promises(system, settings, findings) if usable else [])


def _grid(checks: Iterable[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=5, justify="right")
    checks = list(checks)
    grid.add_column(width=max(13, *(len(check.name) for check in checks)))
    grid.add_column(overflow="fold")
    for check in checks:
        word, style = _LOOKS[check.status]
        found = Text(printable(check.found))
        if check.advice:
            found.append(f"\n-> {printable(check.advice)}", "dim")
        grid.add_row(Text(word, style), check.name, found)
    return grid


def _write(report: Report) -> None:
    from rich.text import Text

    console = stdout()
    for area, group in groupby(report.checks, key=lambda check: check.area):
        console.print(Text(area, style="bold"))
        console.print(_grid(group))
    if report.links:
        _write_links(report.links)
    bad = sum(check.status == "fail" for check in report.checks)
    warned = sum(check.status == "warn" for check in report.checks)
    console.print(Text(f"\n{bad} wrong, {warned} to look at", style="bold red" if bad else "bold"))


def _write_links(links: list[LinkPromise]) -> None:
    from rich.text import Text

    console = stdout()
    rows = [(link.sender, f"{link.channel} ({link.kind})", link.receiver, link.guarantee) for link in links]
    console.print(Text("\nlinks", style="bold"))
    write_rows(("From", "Channel", "To", "Kept now"), rows, right=(), below=("Kept now",))
    for limit, step in dict.fromkeys((link.limit, link.next_step) for link in links if link.limit):
        alike = dict.fromkeys(link.channel for link in links if (link.limit, link.next_step) == (limit, step))
        where = "" if len(alike) == len({link.channel for link in links}) else f" of {', '.join(alike)}"
        _write_limit(where, limit.split("; "), list(filter(None, step.split("; "))))


def _write_limit(where: str, limits: list[str], steps: list[str]) -> None:
    """Print what is not kept: on one line where it is one thing, else as a list."""
    from rich.padding import Padding
    from rich.text import Text

    console = stdout()
    if len(limits) == 1 and len(steps) <= 1:
        console.print(Text(f"Limit{where}: {limits[0]}." + (f" Next step: {steps[0]}." if steps else "")))
        return
    what, colon, first = limits[0].partition(": ")
    console.print(Text(f"Limit{where}: {what}" if colon else f"Limit{where}:"))
    for line in (first or what, *limits[1:]):
        console.print(Padding(Text(line), (0, 0, 0, 4), expand=False))
    if steps:
        console.print(Text("  Next steps:" if len(steps) > 1 else "  Next step:"))
    for line in steps:
        console.print(Padding(Text(line), (0, 0, 0, 4), expand=False))
