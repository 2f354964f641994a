"""`trunkline doctor`: whether everything is as it must be, and what each link keeps.

Invariant: exit code 1 exactly when a check failed. Read next: checks.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli import options
from trunkline.cli.terminal import FAILED, print_json, printable, stdout, table
from trunkline.config import Settings, load_settings

if TYPE_CHECKING:
    from rich.table import Table

    from trunkline.cli.checks import Check, LinkPromise

_LOOKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


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
    """Check environment, file and services.

    With MODULE:OBJECT it also says what each link from service to service guarantees now. Looking changes
    nothing. Exit code 1 when something is wrong; a warning alone is 0.
    """
    settings = load_settings(transport=transport, store=store, app=target)
    checks, links = _examine(settings, integrity=integrity)
    if as_json:
        print_json({"checks": checks, "links": links})
    else:
        _write(checks, links)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(FAILED)


def _examine(settings: Settings, *, integrity: bool) -> tuple[list[Check], list[LinkPromise]]:
    from trunkline.cli.checks import environment, file_checks, file_or_url, promises, settings_checks, system_checks
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
    reachable = all(check.status != "fail" for check in adapters)
    if reachable:
        checks += file_checks(settings.transport, integrity=integrity)
        if file_or_url(settings.store) != file_or_url(settings.transport):
            checks += file_checks(settings.store, integrity=integrity)
    if system is None:
        return checks, []
    checks += system_checks(system)
    return checks, promises(system, settings) if reachable else []


def _grid(checks: Iterable[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=5, justify="right")
    grid.add_column(width=13)
    grid.add_column(overflow="fold")
    for check in checks:
        word, style = _LOOKS[check.status]
        found = Text(printable(check.found))
        if check.advice:
            found.append(f"\n-> {printable(check.advice)}", "dim")
        grid.add_row(Text(word, style), check.name, found)
    return grid


def _write(checks: list[Check], links: list[LinkPromise]) -> None:
    from rich.text import Text

    console = stdout()
    for area, group in groupby(checks, key=lambda check: check.area):
        console.print(Text(area, style="bold"))
        console.print(_grid(group))
    if links:
        made = table("From", "Channel", "To", "Kept now", title="links")
        for link in links:
            made.add_row(link.sender, link.channel, link.receiver, link.guarantee)
        console.print()
        console.print(made)
        for limit, step in dict.fromkeys((link.limit, link.next_step) for link in links if link.limit):
            console.print(Text(f"Limit: {limit}. Next step: {step}."))
    bad = sum(check.status == "fail" for check in checks)
    warned = sum(check.status == "warn" for check in checks)
    console.print(Text(f"\n{bad} wrong, {warned} to look at", style="bold red" if bad else "bold"))
