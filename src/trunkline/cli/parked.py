"""`trunkline parked`: messages that wait for their next try, and what waits behind them.

Invariant: looking changes nothing. Read next: letters.py, ../parking.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.cli import options
from trunkline.cli.tail import clock_time
from trunkline.cli.terminal import ago, print_json, printable, stderr, stdout, write_rows
from trunkline.config import load_settings

if TYPE_CHECKING:
    from trunkline.store import ParkedRow


def parked(
    *,
    subscription: options.OnlySubscription = None,
    message_type: options.OnlyType = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=options.MOST, help="Show so many, the next tries first.")
    ] = 50,
    transport: options.Transport = None,
    store: options.Store = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what waits for its next try.

    A message that failed and is tried again later is parked. On a Stream the later messages of its key wait behind
    it and are counted, not listed; so are those that wait behind a dead letter. Looking changes nothing.
    """
    from trunkline.cli.letters import ask

    rows, more = ask(
        load_settings(transport=transport, store=store),
        lambda letters: letters.parked(subscription, message_type, limit),
    )
    if as_json:
        print_json([_details(row) for row in rows])
    elif rows:
        _write(rows)
    else:
        stdout().print("nothing is parked")
    if more:
        stderr().print(f"{more} more; --limit shows them")


def _write(rows: list[ParkedRow]) -> None:
    from trunkline.clock import system_clock

    now = system_clock.now()
    lines = [
        (
            row.subscription,
            "(unreadable)" if row.message is None else printable(row.message.type, limit=60),
            "-" if row.key is None else printable(row.key, limit=40),
            str(row.attempt),
            _next_try(row, now),
            "-" if row.behind is None else str(row.behind),
            printable(row.reason, limit=160),
            "-" if row.message is None else printable(row.message.id, limit=80),
        )
        for row in rows
    ]
    write_rows(
        ("Subscription", "Type", "Key", "Tries", "Next try", "Behind", "Reason", "Id"), lines,
        right=("Tries", "Behind"), below=("Reason", "Id"),
    )  # fmt: skip


def _next_try(row: ParkedRow, now: float) -> str:
    if row.held_by is not None:
        return f"after dead letter {row.held_by}"
    return f"in {ago(row.due - now)}" if row.due > now else "now"


def _details(row: ParkedRow) -> dict[str, Any]:
    """Return a parked message as plain values for JSON."""
    return {
        "subscription": row.subscription, "channel": row.subscription.rpartition("@")[2],
        "id": None if row.message is None else row.message.id,
        "type": None if row.message is None else row.message.type,
        "key": row.key, "reason": row.reason, "attempts": row.attempt,
        "next_try": clock_time(row.due) if row.due and row.held_by is None else None,
        "held_by": row.held_by, "waiting_behind": row.behind or 0,
    }  # fmt: skip
