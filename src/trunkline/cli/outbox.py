"""`trunkline outbox`: messages that are committed and wait to be sent, scheduled ones among them.

Invariant: looking changes nothing. Read next: letters.py, ../outbox.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.cli import options
from trunkline.cli.tail import clock_time
from trunkline.cli.terminal import ago, print_json, printable, stderr, stdout, write_rows
from trunkline.config import load_settings

if TYPE_CHECKING:
    from trunkline.store import OutboxEntry


def outbox(
    *,
    channel: Annotated[
        str | None,
        typer.Option(
            "--channel",
            metavar="NAME",
            help="Only what goes to this channel.",
            show_default=False,
            callback=options.as_utf8,
        ),
    ] = None,
    message_type: options.OnlyType = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=options.MOST, help="Show so many, what is due first.")
    ] = 50,
    transport: options.Transport = None,
    store: options.Store = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what is committed and waits to be sent.

    That is what was scheduled, until it is due, and where store and transport are not the same database all that
    handlers publish, for a moment. What stays there was published to a broker that cannot be reached or refuses it,
    or no process that declares its channel runs. Looking changes nothing.
    """
    from trunkline.cli.letters import ask

    rows, more = ask(
        load_settings(transport=transport, store=store), lambda letters: letters.outbox(channel, message_type, limit)
    )
    if as_json:
        print_json([_details(row) for row in rows])
    elif rows:
        _write(rows)
    else:
        stdout().print("nothing waits to be sent")
    if more:
        stderr().print(f"{more} more; --limit shows them")


def _write(rows: list[OutboxEntry]) -> None:
    from trunkline.clock import system_clock

    now = system_clock.now()
    lines = []
    for row in rows:
        message = row.message
        key = None if message is None else message.partitionkey
        lines.append(
            (
                row.channel,
                "(unreadable)" if message is None else printable(message.type, limit=60),
                "-" if key is None else printable(key, limit=40),
                "-" if message is None else ago(max(0.0, now - message.time)),
                f"in {ago(row.due - now)}" if row.due > now else "now",
                "-" if message is None else printable(message.id, limit=80),
            )
        )
    write_rows(("Channel", "Type", "Key", "Age", "Leaves", "Id"), lines, right=("Age",), below=("Id",))


def _details(row: OutboxEntry) -> dict[str, Any]:
    """Return a message of the outbox as plain values for JSON."""
    message = row.message
    return {
        "channel": row.channel,
        "id": None if message is None else message.id,
        "type": None if message is None else message.type,
        "key": None if message is None else message.partitionkey,
        "time": None if message is None else clock_time(message.time),
        "due": clock_time(row.due) if row.due else None,
    }
