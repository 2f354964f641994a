"""`trunkline publish`: messages from the command line, as the declared type would make them.

Invariant: everything is decoded as its type before anything is sent; then all of it is sent as one batch, so
a wrong line publishes nothing. Read next: actions.py.
"""

from __future__ import annotations

import asyncio
import difflib
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trunkline.cli import options
from trunkline.cli.target import Target, load_target
from trunkline.cli.terminal import print_json, stderr
from trunkline.config import Settings, load_settings
from trunkline.errors import DecodeError, PublishError, UnroutableError

if TYPE_CHECKING:
    from trunkline.channel import MessageType
    from trunkline.transport import Staged

_WAIT = re.compile(r"\+?(\d+(?:\.\d+)?)(ms|s|min|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_OBJECT = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
FORM = 'trunkline publish [MODULE:OBJECT] TYPE DATA, such as shop:system OrderPlaced \'{"order_id": "1"}\''
LINES = (".jsonl", ".ndjson")


def publish(  # noqa: PLR0913 - one parameter per option
    target: Annotated[
        str | None,
        typer.Argument(metavar="MODULE:OBJECT", help="Default: `app` in trunkline.toml.", show_default=False),
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Argument(metavar="TYPE", help="Name such as order.created, or class OrderCreated.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="JSON; @FILE: one document from a file (.jsonl, .ndjson: one per line); -: one per line of stdin.",
            show_default=False,
        ),
    ] = None,
    *,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Partition key, where it is not the type's key field.", callback=options.as_utf8),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Publish then: 2026-01-31T12:00:00Z, or +30s, +10m, +2h.")
    ] = None,
    priority: Annotated[int, typer.Option("--priority", min=0, max=9, help="0 to 9; queues with priority only.")] = 0,
    transport: options.Transport = None,
    store: options.Store = None,
    as_json: options.AsJson = False,
) -> None:
    """Publish messages of one type.

    Their ids are printed. DATA is checked by decoding it as the declared type. Nothing is sent unless all of it fits.
    """
    given = [argument for argument in (target, type_name, data) if argument is not None]
    app, type_name, data = arguments(given)
    settings = load_settings(transport=transport, store=store, app=app)
    found = load_target(settings)
    declared = find_type(type_name)
    if priority and not getattr(declared.channel, "priority", False):
        raise PublishError(
            "E308",
            f"--priority on {declared.channel.kind} {declared.channel.name!r}",
            "only a Queue(priority=True) has it",
        )
    staged = _staged(declared, _documents(data), found, key=key, at=at, priority=priority)
    if not staged:
        stderr().print("nothing to publish: no data")
        return
    from trunkline.cli.actions import publish as send

    asyncio.run(send(_places(settings, found), declared.channel, staged))
    ids = [item.message.id for item in staged]
    if as_json:
        print_json({"type": declared.name, "channel": declared.channel.name, "ids": ids})
    else:
        typer.echo("\n".join(ids))


def arguments(given: Sequence[str]) -> tuple[str | None, str, str]:
    """Return (MODULE:OBJECT or None, TYPE, DATA) of one to three arguments.

    Raises: typer.BadParameter if one is missing.

    >>> arguments(["OrderPlaced", "{}"])
    (None, 'OrderPlaced', '{}')
    """
    missing = ""
    named = bool(given) and _OBJECT.fullmatch(given[0]) is not None
    if len(given) < 2:  # noqa: PLR2004
        missing = "DATA is missing" if given and not named else "TYPE and DATA are missing"
    elif len(given) == 2 and named and _WORD.fullmatch(given[1]):  # noqa: PLR2004 - no JSON, file or stdin: a type
        missing = "DATA is missing"
    if missing:
        raise typer.BadParameter(f"{missing}; the form is {FORM}")
    data, type_name, *app = reversed(given)
    return (app[0] if app else None), type_name, data


def find_type(name: str) -> MessageType:
    """Return what is declared as CloudEvents type or class `name` in the imported modules.

    Raises: UnroutableError E309 if nothing is, E310 if several are.
    """
    from trunkline.channel import message_types

    known = message_types()
    found = [declared for declared in known if name in (declared.name, declared.cls.__name__)]
    if not found:
        names = sorted(declared.name for declared in known)
        close = difflib.get_close_matches(name, [*names, *(declared.cls.__name__ for declared in known)], 1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise UnroutableError("E309", f"no message type {name!r}", f"{meant}declared are: {', '.join(names) or 'none'}")
    if len(found) > 1:
        where = ", ".join(
            f"{declared.cls.__module__}.{declared.cls.__name__} on {declared.channel.name}" for declared in found
        )
        raise UnroutableError(
            "E310", f"{name!r} is declared several times: {where}", "use the one of the two names that differs"
        )
    return found[0]


def due(text: str) -> datetime | timedelta:
    """Read a time with zone, or a wait such as `+10m`.

    Raises: PublishError E306.

    >>> due("+90s")
    datetime.timedelta(seconds=90)
    """
    try:
        if match := _WAIT.fullmatch(text.strip()):
            return timedelta(seconds=float(match[1]) * _UNITS[match[2]])
        at = datetime.fromisoformat(text)
    except OverflowError as error:
        raise PublishError("E306", f"--at {text!r} is too far away", "at most 999999999 days, such as +30d") from error
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise PublishError(
            "E306", f"--at {text!r}", "a time with zone such as 2026-01-31T12:00:00Z, or a wait such as +30s"
        )
    return at


def _documents(data: str) -> list[tuple[str, bytes]]:
    """Return (place for errors, JSON) of what DATA stands for."""
    if data == "-":
        return _lines("line", sys.stdin.buffer.read())
    if not data.startswith("@"):
        return [("DATA", options.utf8("DATA", data).encode())]
    path = Path(data[1:])
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise PublishError(
            "E311", f"{path} cannot be read: {getattr(error, 'strerror', error)}", "name a file of JSON"
        ) from error
    return _lines(f"{path} line", content) if path.suffix in LINES else [(str(path), content)]


def _lines(place: str, content: bytes) -> list[tuple[str, bytes]]:
    return [(f"{place} {number}", line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _staged(
    declared: MessageType,
    documents: list[tuple[str, bytes]],
    target: Target,
    *,
    key: str | None,
    at: str | None,
    priority: int,
) -> list[Staged]:
    from trunkline.clock import system_clock
    from trunkline.handler import due_time, make_message
    from trunkline.message import Message
    from trunkline.transport import Staged

    due_at = None if at is None else due_time(due(at), system_clock.now())
    attributes = {"priority": priority} if priority else {}
    staged: list[Staged] = []
    for place, document in documents:
        draft = Message("", declared.name, "", document, 0.0, schemaversion=declared.version)
        try:
            payload: Any = declared.decode(draft)
        except DecodeError as error:
            raise DecodeError(error.code, f"{place}: {error.message}", error.hint or fields_of(declared)) from error
        made = make_message(payload, system_clock, target.system.name, None, key, None, dict(attributes))
        staged.append(made if due_at is None else Staged(made.channel, made.message, due_at))
    return staged


def fields_of(declared: MessageType) -> str:
    """Return the fields of a type with what they hold, for a hint."""
    from typing import get_type_hints

    hints = get_type_hints(declared.cls)
    return "fields: " + ", ".join(f"{name}: {getattr(hint, '__name__', hint)}" for name, hint in hints.items())


def _places(settings: Settings, target: Target) -> Settings:
    """Return where to publish: an App says so itself."""
    if target.app is None:
        return settings
    return Settings(target.app.transport_url, target.app.store_url, settings.app, settings.origin)
