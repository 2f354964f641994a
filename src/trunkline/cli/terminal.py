"""What goes to the terminal: text that is safe to show, tables, JSON, errors.

Invariant: nothing that came from a message reaches the terminal with control characters in it.
Read next: commands.py.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import typer

from trunkline.errors import ConfigurationError, DefinitionError, TrunklineError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FAILED, USAGE, TEMPORARY = 1, 2, 75
WRONG_ARGUMENTS = frozenset({"E306", "E308", "E309", "E310", "E311"})
"""What `trunkline publish` refuses before it looks at the payload: no second start mends these either."""
GAP = 3
"""Spaces between the columns of a table."""
PIPE_WIDTH = 1000
"""Width where no terminal limits it, so that `grep` sees whole lines."""

_PADDING = re.compile(r" +$", re.MULTILINE)


def exit_code(error: TrunklineError) -> int:
    """Return 2 for what no restart mends (usage, configuration, declarations), 75 for what may pass, else 1."""
    if isinstance(error, ConfigurationError | DefinitionError) or error.code in WRONG_ARGUMENTS:
        return USAGE
    return TEMPORARY if error.retryable else FAILED


def plain(error: typer.BadParameter) -> str:
    """Return what is wrong with an argument in words; the library that converts it speaks of itself."""
    cause: Any = error.__cause__
    found: dict[str, Any] = {}
    while hasattr(cause, "errors"):  # pydantic's ValidationError; that of an item of a list is inside
        found = cause.errors()[0]
        cause = found.get("ctx", {}).get("error")
    if not found:
        return error.message
    given, limits = found["input"], found.get("ctx", {})
    match found["type"]:
        case "greater_than_equal":
            return f"{given} is too small; the least is {limits['ge']}."
        case "less_than_equal":
            return f"{given} is too large; the most is {limits['le']}."
        case "int_parsing":
            return f"{given!r} is not a whole number."
        case "float_parsing":
            return f"{given!r} is not a number."
    return error.message.removeprefix("Value error, ")


def report(error: TrunklineError, *, with_traceback: bool) -> None:
    """Write an error to stderr: one line with its code, one with the next step."""
    if with_traceback:
        typer.echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    typer.secho(f"{error.code} {printable(error.message)}", fg="red", err=True)
    if error.hint:
        typer.echo(f"     {printable(error.hint)}", err=True)


def stdout() -> Console:
    """Return a console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return a console for progress and remarks, which must not end up in a pipe."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class QuietConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # commands.py ends the same way for all output

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    file: Any = None if stream.isatty() else _Unpadded(stream)
    return QuietConsole(
        file=file, stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False
    )


class _Unpadded:
    """A file or pipe, without the blanks that fill the last column of a table.

    Args:
        stream: where it goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write whole lines."""
        return self._stream.write(_PADDING.sub("", text))


def table(*headers: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    """Return an empty table in the one look all commands share.

    Args:
        right: headers of the columns that hold numbers.
    """
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", header_style="bold",
        pad_edge=False, show_edge=False,
    )  # fmt: skip
    for header in headers:
        made.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return made


def fits(made: Table) -> bool:
    """Return whether stdout is wide enough for a table, so that nothing in it is broken."""
    from rich.measure import Measurement

    console = stdout()
    return Measurement.get(console, console.options.update(max_width=PIPE_WIDTH), made).maximum <= console.width


def write_rows(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: tuple[str, ...], below: tuple[str, ...]
) -> None:
    """Print rows to stdout as a table; where that is too wide, some columns stand below each row.

    So no word is cut, and where no terminal limits the width each row is one line.

    Args:
        right: headers of the columns that hold numbers.
        below: headers of the columns that may go below.
    """
    from rich.cells import cell_len
    from rich.padding import Padding
    from rich.text import Text

    console = stdout()
    made = table(*headers, right=right)
    for row in rows:
        made.add_row(*map(Text, row))
    if fits(made):
        console.print(made)
        return
    widths = [max(cell_len(row[n]) for row in (headers, *rows)) for n in range(len(headers))]
    kept = [n for n, header in enumerate(headers) if header not in below]

    def line(row: Sequence[str]) -> str:
        spaces = {n: " " * (widths[n] - cell_len(row[n])) for n in kept}
        cells = [spaces[n] + row[n] if headers[n] in right else row[n] + spaces[n] for n in kept]
        return (" " * GAP).join(cells).rstrip()

    console.print(Text(line(headers), style="bold"))
    console.print(Text("─" * min(console.width, sum(widths[n] for n in kept) + GAP * (len(kept) - 1))))
    for row in rows:
        console.print(Text(line(row)))
        for n, header in enumerate(headers):
            if header in below:
                console.print(Padding(Text(row[n]), (0, 0, 0, 4), expand=False))


def print_json(value: Any) -> None:
    """Write `value` as indented JSON to stdout."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def printable(text: str, *, limit: int = 0) -> str:
    r"""Return `text` on one line, control characters shown as escapes.

    Args:
        limit: longest result; 0 for any.

    >>> printable("a\x1b[31mb\nc")
    'a\\x1b[31mb\\nc'
    >>> printable("abcdef", limit=4)
    'abc…'
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return f"{text[: limit - 1]}…" if limit and len(text) > limit else text


def ago(seconds: float) -> str:
    """Return a duration in the one unit that says enough.

    >>> ago(0.4), ago(75), ago(7300), ago(200000)
    ('0 s', '75 s', '2 h', '2 d')
    """
    for size, unit in ((172_800, "d"), (7200, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / {'d': 86_400, 'h': 3600, 'min': 60}[unit]:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def size(count: int) -> str:
    """Return a number of bytes for people.

    >>> size(999), size(123_456), size(5_000_000_000)
    ('999 B', '123 kB', '5.0 GB')
    """
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:  # noqa: PLR2004 - decimal units
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
