"""`trunkline dead`: look at what was set aside, correct it, give it back or drop it.

Invariant: each act is one commit in the store that running services see at once; nothing acts on a file that
does not exist. Read next: letters.py, dead_view.py, dead_edit.py.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from trunkline.cli import options
from trunkline.cli.dead_view import details, write_list
from trunkline.cli.terminal import print_json, stderr, stdout
from trunkline.config import Settings, load_settings
from trunkline.errors import DeadLetterError

if TYPE_CHECKING:
    from rich.progress import Progress

    from trunkline.cli.dead_edit import Change
    from trunkline.cli.target import Target
    from trunkline.inspection import LetterReader
    from trunkline.store import DeadLetterRow

app = typer.Typer(
    help="Look at dead letters, correct them, give them back, drop them.", no_args_is_help=True, rich_markup_mode=None
)

Number = Annotated[int, typer.Argument(metavar="NUMBER", max=options.MOST, help="As shown by `list`.")]
Numbers = Annotated[
    list[int] | None,
    typer.Argument(metavar="NUMBER...", max=options.MOST, help="As shown by `list`.", show_default=False),
]
All = Annotated[bool, typer.Option("--all", help="All that fit --subscription and --type.")]
T = TypeVar("T")
Data = Annotated[
    str | None, typer.Option("--data", metavar="JSON|@FILE", help="The corrected payload.", show_default=False)
]


@app.command("list")
def list_(
    *,
    subscription: options.OnlySubscription = None,
    message_type: options.OnlyType = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=options.MOST, help="Show so many, the oldest first.")
    ] = 50,
    transport: options.Transport = None,
    store: options.Store = None,
    as_json: options.AsJson = False,
) -> None:
    """List dead letters, oldest first."""

    async def listed(letters: LetterReader) -> tuple[list[DeadLetterRow], int]:
        rows = await letters.dead_letters(subscription, message_type, limit)
        return rows, len(await letters.dead_letter_numbers(subscription, message_type))

    rows, count = _ask(load_settings(transport=transport, store=store), listed)
    if as_json:
        print_json([details(row, with_payload=False) for row in rows])
    elif not rows:
        stdout().print("no dead letters")
    else:
        write_list(rows)
        if count > len(rows):
            stderr().print(f"{count} in all; --limit shows more")


@app.command()
def show(
    number: Number,
    *,
    transport: options.Transport = None,
    store: options.Store = None,
    as_json: options.AsJson = False,
) -> None:
    """Show one dead letter in full.

    Why and how often it was tried, its envelope and payload, the traceback, what waits behind it.
    """
    from trunkline.cli.dead_view import write

    row = _ask(load_settings(transport=transport, store=store), lambda letters: letters.dead_letter(number))
    if as_json:
        print_json(details(row, with_payload=True))
    else:
        write(row, stdout())


@app.command()
def edit(  # noqa: PLR0913 - one parameter per option
    number: Number,
    target: options.Target = None,
    *,
    data: Data = None,
    message_type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Another type; needed for an unreadable envelope.",
            callback=options.as_utf8,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Another partition key in the envelope.", callback=options.as_utf8),
    ] = None,
    schema_version: Annotated[
        int | None,
        typer.Option(
            "--schema-version", min=1, max=options.MOST, help="Version of the schema the payload is written in."
        ),
    ] = None,
    redrive: Annotated[bool, typer.Option("--redrive", help="Give it back as well, in the same step.")] = False,
    transport: options.Transport = None,
    store: options.Store = None,
) -> None:
    """Correct a dead letter.

    It stays set aside until it is redriven, unless --redrive. With MODULE:OBJECT, or `app` in trunkline.toml, a
    payload that does not fit its type is refused; otherwise it is not checked, and this says so.

    Without --data the payload opens in $VISUAL or $EDITOR. The message keeps its id, so what has handled it
    does not handle it again. For an unreadable envelope give --type and --data: a new envelope is made.
    """
    from trunkline.cli.dead_edit import Change, edited, editor_text, payload_argument
    from trunkline.cli.target import load_target

    settings = load_settings(transport=transport, store=store, app=target)
    app = None if settings.app is None else load_target(settings)
    row = _ask(settings, lambda letters: letters.dead_letter(number))
    payload = None if data is None else payload_argument(data)
    if payload is None and message_type is None and key is None and schema_version is None:
        if not sys.stdin.isatty():
            raise typer.BadParameter("say what changes: --data JSON, --data @FILE, --type, --key or --schema-version")
        payload = editor_text(row)
    change = Change(payload, message_type, key, schema_version)
    envelope, changes = edited(row, change)
    if not changes and not redrive:
        typer.echo(f"{number}: nothing changed")
        return
    if changes:
        _check(row, change, envelope, app)
    asyncio.run(_store_edit(settings, number, envelope, redrive=redrive))
    for line in changes:
        typer.echo(f"{number}: {line}")
    typer.echo(
        f"{number}: given back" if redrive else f"{number}: saved; give it back with: trunkline dead redrive {number}"
    )


@app.command()
def redrive(
    numbers: Numbers = None,
    *,
    everything: All = False,
    subscription: options.OnlySubscription = None,
    message_type: options.OnlyType = None,
    rate: Annotated[float, typer.Option("--rate", min=0.001, help="At most so many per second.")] = 100.0,
    transport: options.Transport = None,
    store: options.Store = None,
) -> None:
    """Give dead letters back to their subscriptions.

    They are handled as first tries; what waits behind them follows in order.
    """
    settings = load_settings(transport=transport, store=store)
    chosen = _chosen(settings, numbers or [], subscription, message_type, everything=everything)
    done = asyncio.run(_each(settings, chosen, "redrive", rate))
    typer.echo(f"{done} given back")


@app.command()
def discard(
    numbers: Numbers = None,
    *,
    everything: All = False,
    subscription: options.OnlySubscription = None,
    message_type: options.OnlyType = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    transport: options.Transport = None,
    store: options.Store = None,
) -> None:
    """Drop dead letters for good.

    What waits behind them goes on without them.
    """
    settings = load_settings(transport=transport, store=store)
    chosen = _chosen(settings, numbers or [], subscription, message_type, everything=everything)
    if chosen and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("this drops messages for good; say --yes")
        typer.confirm(f"Drop {len(chosen)} dead letter{'s' * (len(chosen) != 1)} for good?", abort=True)
    typer.echo(f"{asyncio.run(_each(settings, chosen, 'discard', None))} dropped")


def _ask(settings: Settings, question: Callable[[LetterReader], Awaitable[T]]) -> T:
    from trunkline.cli.letters import ask

    return ask(settings, question)


def _check(row: DeadLetterRow, change: Change, envelope: bytes, app: Target | None) -> None:
    """Refuse a changed payload that does not fit its type; say so when nothing here knows the type.

    Raises: DecodeError, such as E412.
    """
    from trunkline.cli.dead_edit import check

    if change.data is None and change.type is None and change.schema_version is None:
        return
    unknown = "no MODULE:OBJECT is named" if app is None else check(row, envelope, app.name)
    if unknown:
        stderr().print(f"{row.number}: not checked whether the payload fits its type: {unknown}")


def _chosen(
    settings: Settings, numbers: list[int], subscription: str | None, message_type: str | None, *, everything: bool
) -> list[int]:
    """Return the numbers to act on.

    Raises: DeadLetterError E601 if one is not there; then nothing is done.
    """
    if bool(numbers) == everything:
        raise typer.BadParameter(
            "name dead letters by NUMBER, or say --all (with --subscription or --type to narrow it)"
        )
    if numbers and (subscription or message_type):
        raise typer.BadParameter("--subscription and --type narrow --all; they do not go with NUMBER")
    known = _ask(settings, lambda letters: letters.dead_letter_numbers(subscription, message_type))
    if everything:
        return known
    missing = [number for number in numbers if number not in known]
    if missing:
        raise DeadLetterError(
            "E601",
            f"no dead letter {', '.join(map(str, missing))}; nothing was done",
            'list them with "trunkline dead list"',
        )
    return list(dict.fromkeys(numbers))


async def _store_edit(settings: Settings, number: int, envelope: bytes, *, redrive: bool) -> None:
    from trunkline.cli.actions import acting

    async with acting(settings) as store:
        if redrive:
            await store.redrive(number, envelope)
        else:
            await store.edit_dead_letter(number, envelope)


async def _each(settings: Settings, numbers: list[int], act: str, rate: float | None) -> int:
    """Redrive or discard one by one, `rate` per second; return how many were still there."""
    from trunkline.cli.actions import acting
    from trunkline.clock import system_clock

    if not numbers:
        return 0
    done = 0
    async with acting(settings) as store:
        perform = store.redrive if act == "redrive" else store.discard_dead_letter
        began = system_clock.monotonic()
        with _progress(act) as progress:
            task = progress.add_task(act, total=len(numbers))
            for count, number in enumerate(numbers):
                if rate is not None:
                    early = began + count / rate - system_clock.monotonic()
                    if early > 0:
                        await system_clock.sleep(early)
                try:
                    await perform(number)
                    done += 1
                except DeadLetterError:
                    # Listed a moment ago: someone else has treated it since, which is no failure of ours.
                    stderr().print(f"{number} is gone meanwhile")
                progress.advance(task)
    return done


def _progress(act: str) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr()
    return Progress(
        TextColumn(act), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
