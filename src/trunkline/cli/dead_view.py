"""A dead letter for people and for scripts.

Invariant: payload bytes that are no text are shown as a hexadecimal dump; nothing of a message is run or trusted.
Read next: dead_edit.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from trunkline.cli.tail import clock_time
from trunkline.cli.terminal import ago, printable, write_rows

if TYPE_CHECKING:
    from rich.console import Console

    from trunkline.message import Message
    from trunkline.store import DeadLetterRow

SHOWN_BYTES = 16 * 1024
"""Longest payload that `show` prints whole."""


def write_list(rows: Iterable[DeadLetterRow]) -> None:
    """Print one line per dead letter, two where the terminal is narrow."""
    from trunkline.clock import system_clock

    now = system_clock.now()
    lines = [
        (
            str(row.number),
            row.subscription,
            printable(row.message_type, limit=60) or "(unreadable)",
            "-" if row.key is None else printable(row.key, limit=40),
            printable(_reason(row), limit=160),
            str(row.attempt),
            str(row.waiting) if row.holds else "-",
            ago(now - row.at),
        )
        for row in rows
    ]
    write_rows(
        ("No", "Subscription", "Type", "Key", "Reason", "Tries", "Behind", "Age"), lines,
        right=("No", "Tries", "Behind", "Age"), below=("Reason",),
    )  # fmt: skip


def _reason(row: DeadLetterRow) -> str:
    """Return why; what a handler raised names itself."""
    return row.reason if row.code == "handler" else f"{row.code}: {row.reason}"


def details(row: DeadLetterRow, *, with_payload: bool) -> dict[str, Any]:
    """Return a dead letter as plain values for JSON."""
    found: dict[str, Any] = {
        "number": row.number, "subscription": row.subscription, "channel": row.channel, "id": row.message_id,
        "type": row.message_type, "key": row.key, "code": row.code, "reason": row.reason, "attempts": row.attempt,
        "at": clock_time(row.at), "holds_key": row.holds, "waiting_behind": row.waiting,
    }  # fmt: skip
    if with_payload:
        from trunkline.message import read_packed

        message = read_packed(row.raw)
        found["traceback"] = row.detail
        found["envelope"] = None if message is None else envelope(message)
        found["payload"] = _json_value(row.raw if message is None else message.data)
    return found


def envelope(message: Message) -> dict[str, str]:
    """Return the CloudEvents attributes of a message that are set."""
    from trunkline.message import attributes

    try:
        return attributes(message)
    except (ValueError, OverflowError, OSError):  # a time no calendar has
        return {"id": message.id, "type": message.type, "source": message.source}


def write(row: DeadLetterRow, console: Console) -> None:
    """Print everything about one dead letter."""
    from rich.text import Text

    from trunkline.message import read_packed

    message = read_packed(row.raw)
    behind = f"{row.waiting} of its key wait behind it" if row.holds else "its key goes on without it"
    if row.key is None:
        behind = "no key, nothing waits behind it"
    for name, value in (
        ("Dead letter", f"{row.number} of {row.subscription}"),
        ("Reason", _reason(row)),
        ("Tries", f"{row.attempt}, set aside {clock_time(row.at)}"),
        ("Key", f"{'-' if row.key is None else row.key} ({behind})"),
    ):
        console.print(Text.assemble((f"{name:<12}", "bold"), printable(value)))
    if message is not None:
        console.print(Text("\nEnvelope", style="bold"))
        for name, value in envelope(message).items():
            console.print(Text.assemble((f"  {name:<16}", "dim"), printable(value)))
    data = row.raw if message is None else message.data
    title = "Payload" if message is not None else "Raw bytes (the envelope cannot be read)"
    console.print(Text(f"\n{title}, {len(data)} bytes", style="bold"))
    console.print(Text(_shown(data)))
    if row.detail:
        console.print(Text("\nTraceback", style="bold"))
        console.print(Text("\n".join(f"  {printable(line)}" for line in row.detail.splitlines())))
    console.print(
        Text(f"\nNext: trunkline dead edit {row.number} · dead redrive {row.number} · dead discard {row.number}", "dim")
    )


def _shown(data: bytes) -> str:
    import msgspec

    cut = data[:SHOWN_BYTES]
    rest = f"\n  … {len(data) - len(cut)} bytes more" if len(data) > len(cut) else ""
    try:
        text = data.decode()
        if not rest:
            text = msgspec.json.format(text, indent=2)
        lines = text[:SHOWN_BYTES].splitlines()
        return "\n".join(f"  {printable(line)}" for line in lines) + rest
    except (msgspec.DecodeError, RecursionError):
        return "\n".join(f"  {printable(line)}" for line in text.splitlines()) + rest
    except UnicodeDecodeError:
        return hex_dump(cut) + rest


def hex_dump(data: bytes) -> str:
    r"""Return 16 bytes per line: offset, hexadecimal digits, printable characters.

    >>> print(hex_dump(b"ab\xff"))
      0000  61 62 ff                                         ab.
    """
    lines = []
    for offset in range(0, len(data), 16):
        part = data[offset : offset + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)  # noqa: PLR2004 - ASCII
        lines.append(f"  {offset:04x}  {part.hex(' '):<47}  {text}")
    return "\n".join(lines)


def _json_value(data: bytes) -> Any:
    import msgspec

    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {"hex": data.hex()}
