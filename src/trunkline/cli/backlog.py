"""`trunkline backlog`: how far each subscription is behind.

Read next: embedded.py, live.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli import options
from trunkline.cli.terminal import ago, fits, print_json, stdout, table
from trunkline.config import Settings, load_settings

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from trunkline.cli.embedded import SubscriptionBacklog

EVERY_S = 1.0


def backlog(
    target: options.Target = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Renew the table every second until Ctrl-C.")] = False,
    transport: options.Transport = None,
    store: options.Store = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what waits for each subscription.

    Also what is in flight, what is parked for a later try, and what was set aside as a dead letter. Waiting
    includes what is in flight. Of a Stream it is not known what is in flight. On a broker MODULE:OBJECT, or `app` in
    trunkline.toml, says whose subscriptions they are. Looking changes nothing: no group is joined, nothing is taken.
    """
    settings = load_settings(transport=transport, store=store, app=target)
    if watch:
        _watch(settings, as_json=as_json)
    elif as_json:
        print_json(_read(settings))
    else:
        stdout().print(_table(_read(settings)))


def _read(settings: Settings) -> list[SubscriptionBacklog]:
    import asyncio

    from trunkline.cli.live import backlogs

    return asyncio.run(backlogs(settings))


def _watch(settings: Settings, *, as_json: bool) -> None:
    from trunkline.clock import block

    if as_json:
        import msgspec

        while True:
            typer.echo(msgspec.json.encode(_read(settings)))
            block(EVERY_S)
    from rich.live import Live

    with Live(_table(_read(settings)), console=stdout(), auto_refresh=False) as live:
        while True:
            block(EVERY_S)
            live.update(_table(_read(settings)), refresh=True)


def _table(rows: list[SubscriptionBacklog]) -> RenderableType:
    """Return the table; where it is too wide, names are broken before the channel and not inside a word."""
    if not rows:
        return "no subscriptions"
    made = _lines(rows, "@")
    return made if fits(made) else _lines(rows, "\n@")


def _lines(rows: list[SubscriptionBacklog], at: str) -> Table:
    numbers = ("Waiting", "In flight", "Parked", "Dead", "Oldest")
    made = table("Subscription", "Kind", *numbers, right=numbers)
    for row in rows:
        made.add_row(
            row.subscription.replace("@", at),
            row.kind,
            _number(row.waiting),
            _number(row.in_flight),
            _number(row.parked),
            _number(row.dead),
            "-" if row.oldest_s is None else ago(row.oldest_s),
            style="red" if row.dead else None,
        )
    return made


def _number(count: int | None) -> str:
    return "-" if count is None else str(count)
