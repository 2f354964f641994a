"""`trunkline tail`: the messages of a channel as they come.

Invariant: reading changes nothing: no offset moves, nothing is taken from a queue. Read next: embedded.py, live.py.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli import completion, options
from trunkline.cli.terminal import printable
from trunkline.config import Settings, load_settings

if TYPE_CHECKING:
    from trunkline.cli.embedded import EmbeddedFile, StoredChannel, StoredMessage
    from trunkline.inspection import Seen
    from trunkline.message import Message

LOOK_S = 0.05
PAGE = 500
SEEN = 10_000
"""How many ids of a Topic are remembered, to show a message with several subscriptions once."""


def tail(
    channel: Annotated[
        str, typer.Argument(metavar="CHANNEL", help="Such as order-events.", autocompletion=completion.channels)
    ],
    target: options.Target = None,
    *,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Begin with the oldest message of a Stream.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, max=options.MOST, help="Stop after so many messages.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Wait for more at the end.")] = True,
    transport: options.Transport = None,
    as_json: Annotated[bool, typer.Option("--json", help="One CloudEvents JSON document per line.")] = False,
) -> None:
    """Show the messages of a channel.

    One line each: time in UTC, type, key, payload.

    Of a Stream it shows what is published from now on, with --from-start everything kept. Of a Queue or Topic it
    shows what waits, then what comes; a message that is handled at once may be gone before it is seen. On a broker
    MODULE:OBJECT, or `app` in trunkline.toml, says what kind of channel it is.

    Reading changes nothing: where looking would take messages away, it is refused. End with Ctrl-C.
    """
    from trunkline.transport import parse_address

    settings = load_settings(transport=transport, app=target)
    write = _writer(limit, _as_json if as_json else _line)
    if parse_address(settings.transport).scheme == "sqlite":
        _tail_file(settings, channel, write, from_start=from_start, follow=follow)
    else:
        import asyncio

        asyncio.run(_tail_broker(settings, channel, write, from_start=from_start, follow=follow))


def _writer(limit: int | None, form: Callable[[Seen], str]) -> Callable[[Seen], bool]:
    """Return what writes one message and returns whether it was the last."""
    left = count(1)

    def write(seen: Seen) -> bool:
        sys.stdout.write(f"{form(seen)}\n")
        sys.stdout.flush()
        return next(left) == limit

    return write


async def _tail_broker(
    settings: Settings, name: str, write: Callable[[Seen], bool], *, from_start: bool, follow: bool
) -> None:
    from contextlib import aclosing
    from typing import cast

    from trunkline.cli.live import channel_named, inspecting

    channel, url = channel_named(settings, name)
    async with inspecting(url) as inspector:
        found = cast("AsyncGenerator[Seen]", inspector.read(channel, from_start=from_start, follow=follow))
        async with aclosing(found):
            async for seen in found:
                if write(seen):
                    return


def _tail_file(settings: Settings, name: str, write: Callable[[Seen], bool], *, from_start: bool, follow: bool) -> None:
    from trunkline.cli.embedded import open_transport
    from trunkline.inspection import Seen
    from trunkline.message import read_packed

    with open_transport(settings) as file:
        found = file.channel(name)
        begin = 0 if from_start or not follow or found.kind != "stream" else file.last_position(found)
        for stored in _messages(file, found, begin, follow=follow):
            if write(Seen(stored.position, read_packed(stored.raw), stored.raw)):
                return


def _messages(file: EmbeddedFile, channel: StoredChannel, after: int, *, follow: bool) -> Iterator[StoredMessage]:
    from trunkline.clock import block

    seen: deque[str] = deque(maxlen=SEEN)
    while True:
        version = file.version()
        page = file.read(channel, after, PAGE)
        for stored in page:
            after = stored.position
            if channel.kind != "topic" or _is_new(stored, seen):
                yield stored
        if len(page) == PAGE:
            continue
        if not follow:
            return
        while file.version() == version:
            block(LOOK_S)


def _is_new(stored: StoredMessage, seen: deque[str]) -> bool:
    from trunkline.message import read_packed

    message = read_packed(stored.raw)
    if message is None:
        return True
    if message.identity in seen:
        return False
    seen.append(message.identity)
    return True


def payload_line(message: Message) -> str:
    """Return a payload on one line: text as it is, other bytes as hexadecimal digits."""
    try:
        return printable(message.data.decode())
    except UnicodeDecodeError:
        return f"0x{message.data.hex()}"


def clock_time(seconds: float) -> str:
    """Return a time in UTC to the millisecond, or what stands there if it is none."""
    from trunkline.message import format_time

    try:
        return f"{format_time(seconds)[:-4]}Z"
    except (ValueError, OverflowError, OSError):
        return f"time {seconds!r}"


def _line(seen: Seen) -> str:
    message = seen.message
    if message is None:
        return f"position {seen.position}: unreadable, {len(seen.raw)} bytes 0x{seen.raw[:64].hex()}"
    key = "-" if message.partitionkey is None else printable(message.partitionkey)
    parts = ((clock_time(message.time), "bright_black"), (printable(message.type), "cyan"), (key, "green"))
    coloured = sys.stdout.isatty()
    shown = [typer.style(text, fg=colour) if coloured else text for text, colour in parts]
    return "  ".join((*shown, payload_line(message)))


def _as_json(seen: Seen) -> str:
    import msgspec

    from trunkline.message import to_structured

    if seen.message is None:
        return msgspec.json.encode({"position": seen.position, "unreadable": seen.raw.hex()}).decode()
    return to_structured(msgspec.structs.replace(seen.message, sequence=str(seen.position))).decode()
