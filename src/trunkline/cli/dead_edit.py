"""The correction of a dead letter: a new envelope from the old one and what is to change.

Invariant: pure but for the editor; a message keeps its id, source and time. Read next: dead.py.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from trunkline.channel import MessageType, message_types
from trunkline.cli import options
from trunkline.cli.publish import fields_of
from trunkline.cli.terminal import printable
from trunkline.clock import system_clock
from trunkline.errors import ConfigurationError, DeadLetterError, DecodeError
from trunkline.message import JSON, Message, checked, pack, read_packed, unpack
from trunkline.store import DeadLetterRow


class Change(msgspec.Struct, frozen=True):
    """What is to change; None leaves it."""

    data: bytes | None = None
    type: str | None = None
    key: str | None = None
    schema_version: int | None = None


def edited(row: DeadLetterRow, change: Change) -> tuple[bytes, list[str]]:
    """Return the new envelope and what is different, one line each.

    Raises: DeadLetterError E602 if the payload is no JSON, E603 if an unreadable envelope lacks type or data;
        PublishError E307 for an attribute that cannot be, such as an empty type.
    """
    old = read_packed(row.raw)
    if change.data is not None and (old is None or old.datacontenttype == JSON):
        change = msgspec.structs.replace(change, data=_compact(change.data))
    if old is None:
        return _new_envelope(row, change)
    wanted: dict[str, Any] = {
        "data": change.data, "type": change.type, "partitionkey": change.key, "schemaversion": change.schema_version,
    }  # fmt: skip
    values = {name: value for name, value in wanted.items() if value is not None and value != getattr(old, name)}
    if "data" in values and _value(old.data) == _value(values["data"]):
        del values["data"]  # only the spelling of the same JSON
    new = msgspec.structs.replace(old, **values)
    lines = [f"{name}: {getattr(old, name)} -> {value}" for name, value in values.items() if name != "data"]
    if "data" in values:
        lines += difference(_value(old.data), _value(new.data))
    return pack(checked(new)) if values else row.raw, [printable(line, limit=300) for line in lines]


def _new_envelope(row: DeadLetterRow, change: Change) -> tuple[bytes, list[str]]:
    if change.type is None or change.data is None:
        raise DeadLetterError(
            "E603",
            f"the envelope of dead letter {row.number} cannot be read",
            "give both --type and --data for a new one",
        )
    message = Message(
        system_clock.new_id(), change.type, f"trunkline:dead-letter/{row.number}", change.data, system_clock.now(),
        partitionkey=row.key if change.key is None else change.key, schemaversion=change.schema_version or 1,
    )  # fmt: skip
    return pack(checked(message)), [f"new envelope of type {printable(change.type)} with id {message.id}"]


def check(row: DeadLetterRow, envelope: bytes, app: str) -> str | None:
    """Refuse a payload that is not of its type; return why that cannot be told, or None.

    Args:
        envelope: as it is to be stored.
        app: what was imported, for people.
    Raises: DecodeError E410 to E414.
    """
    message = unpack(envelope)
    declared = _declared(message.type, row.channel)
    if declared is None:
        return f"{app} declares no type {printable(message.type, limit=120)!r}"
    try:
        declared.decode(message)
    except DecodeError as error:
        raise DecodeError(
            error.code, f"dead letter {row.number}: {error.message}", error.hint or fields_of(declared)
        ) from error
    return None


def _declared(name: str, channel: str) -> MessageType | None:
    """Return what is declared under a name, on that channel if there."""
    known = [declared for declared in message_types() if declared.name == name]
    return next((declared for declared in known if declared.channel.name == channel), next(iter(known), None))


def difference(old: Any, new: Any, path: str = "data") -> list[str]:
    """Return what changed between two JSON values.

    >>> difference({"a": 1, "b": [1, 2]}, {"a": 2, "b": [1, 2], "c": None})
    ['data.a: 1 -> 2', 'data.c: added null']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = [f"{path}.{name}: removed, was {_text(old[name])}" for name in old if name not in new]
        for name, value in new.items():
            if name not in old:
                lines.append(f"{path}.{name}: added {_text(value)}")
            else:
                lines += difference(old[name], value, f"{path}.{name}")
        return lines
    return [] if old == new and type(old) is type(new) else [f"{path}: {_text(old)} -> {_text(new)}"]


def payload_argument(text: str) -> bytes:
    """Return the bytes of `--data`: JSON, or `@FILE`.

    Raises: ConfigurationError E216 if the file cannot be read, E226 if the text is not UTF-8.
    """
    if not text.startswith("@"):
        return options.utf8("--data", text).encode()
    try:
        return Path(text[1:]).read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(
            "E216", f"{text[1:]} cannot be read: {error.strerror}", "name a file of JSON"
        ) from error


def editor_text(row: DeadLetterRow) -> bytes:
    """Return the payload as the user leaves it in the editor.

    Raises: DeadLetterError E603 for an unreadable envelope; ConfigurationError E217 if the editor fails.
    """
    message = read_packed(row.raw)
    if message is None:
        raise DeadLetterError(
            "E603",
            f"the envelope of dead letter {row.number} cannot be read",
            "give both --type and --data for a new one",
        )
    try:
        text = msgspec.json.format(message.data, indent=2)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = message.data
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:
        path = Path(folder, f"dead-letter-{row.number}.json")
        path.write_bytes(text)
        try:
            subprocess.run([*shlex.split(command), str(path)], check=True)  # noqa: S603 - the user's own editor
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigurationError(
                "E217", f"the editor {command!r} failed: {error}", "set EDITOR, or use --data"
            ) from error
        return path.read_bytes().strip()


def _compact(data: bytes) -> bytes:
    """Return JSON without the white space of an editor."""
    try:
        msgspec.json.decode(data)
        return msgspec.json.format(data, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DeadLetterError(
            "E602", f"the payload is not JSON: {error}", 'such as \'{"order_id": "7"}\'; nothing changed'
        ) from error


def _value(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes 0x{value[:32].hex()}"
    return msgspec.json.encode(value).decode()
