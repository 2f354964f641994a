"""Run the code blocks of a documentation page as a reader would.

The blocks of a page run in order, in the current folder, and share one namespace:

- `python` runs, as a script;
- `console` runs each line that starts with `$ `; the lines below it must appear in its output, in
  order; `...` stands for anything, within a line or as lines;
- `sh` and `bash` run as one script; any other language does nothing.

An HTML comment before a block changes that: `<!-- file: shop.py -->` writes the block to a file,
`<!-- exit: 2 -->` expects another exit status, `<!-- no-run: reason -->` skips the block,
`<!-- broker: redis -->` runs it only where the variable BROKER has the URL of one.

Run as a program (`python code_blocks.py PAGE`) so that a page can neither see nor spoil the tests'
own process; the exit status is 1 and the error names page and line when a block fails.
"""

import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)")
MARKER = re.compile(r"^\s*<!--\s*(?P<name>file|exit|no-run|broker)\b\s*:?\s*(?P<value>.*?)\s*-->\s*$")
COMMAND_SECONDS = 50


class PageError(Exception):
    """A page is written wrongly or says something that does not happen."""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is where its first line of text stands in the page."""

    line: int
    language: str
    text: str
    markers: dict[str, str] = field(default_factory=dict)


def blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page, with the comments that stand directly before them.

    Raises:
        PageError: a block is not closed, or a comment has no value or no block.
    """
    lines = iter(enumerate(page.splitlines(), start=1))
    markers: dict[str, str] = {}
    for number, line in lines:
        if marker := MARKER.match(line):
            if not marker["value"]:
                raise PageError(f"line {number}: <!-- {marker['name']} --> needs a value")
            markers[marker["name"]] = marker["value"]
        elif fence := FENCE.match(line):
            body = _body(lines, fence["ticks"], number)
            yield Block(number + 1, fence["language"], textwrap.dedent(body), markers)
            markers = {}
        elif markers and line.strip():
            raise PageError(f"line {number}: a block must follow the comment {markers}")
    if markers:
        raise PageError(f"no block follows the comment {markers}")


def _body(lines: Iterator[tuple[int, str]], ticks: str, opened: int) -> str:
    body: list[str] = []
    for _, line in lines:
        if line.strip() == ticks:
            return "".join(f"{text}\n" for text in body)
        body.append(line)
    raise PageError(f"line {opened}: the block is not closed")


def run_page(path: Path) -> None:
    """Run all blocks of the page in the current folder.

    Raises:
        PageError: the page is written wrongly, or a command did not do what the page says.
        Exception: whatever a Python block raised.
    """
    # Classes and annotations are looked up through sys.modules, so the namespace is a real module.
    page_module = types.ModuleType("__main__")
    sys.modules["__main__"] = page_module
    for block in blocks(path.read_text(encoding="utf-8")):
        where = f"{path}:{block.line}"
        if "no-run" in block.markers or ("broker" in block.markers and "BROKER" not in os.environ):
            continue
        if "file" in block.markers:
            target = Path(block.markers["file"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # The padding makes tracebacks point at the page.
            padded = "\n" * (block.line - 1) + block.text
            exec(compile(padded, path, "exec"), page_module.__dict__)
        elif block.language == "console":
            for command, expected in _commands(block.text, where):
                run_command(command, expected, int(block.markers.get("exit", "0")), where)
        elif block.language in {"bash", "sh"}:
            run_command(block.text, [], int(block.markers.get("exit", "0")), where)


def _commands(text: str, where: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command with the lines printed below it; a final backslash joins lines."""
    found: list[tuple[str, list[str]]] = []
    continued = False
    for line in text.splitlines():
        if continued:
            command, expected = found[-1]
            found[-1] = (f"{command}\n{line}", expected)
        elif line.startswith("$ "):
            found.append((line.removeprefix("$ "), []))
        elif found:
            found[-1][1].append(line)
            continue
        else:
            raise PageError(f"{where}: a console block starts with a line '$ command', not {line!r}")
        continued = line.endswith("\\")
    yield from found


def run_command(command: str, expected: list[str], exit_status: int, where: str) -> None:
    """Run a shell command and compare exit status and output with what the page shows."""
    programs = Path(sys.executable).parent
    plain = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            ["bash", "-euc", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
            env=os.environ | plain | {"COLUMNS": "100", "PYTHONPATH": os.curdir},
        )
    except subprocess.TimeoutExpired as error:
        raise PageError(f"{where}: still running after {error.timeout} s: {command}") from error
    said = f"$ {command}\n{done.stdout}"
    if done.returncode != exit_status:
        raise PageError(f"{where}: exit status {done.returncode}, not {exit_status}\n{said}")
    if (line := first_missing(expected, done.stdout)) is not None:
        raise PageError(f"{where}: the output lacks the line {line!r}\n{said}")


def first_missing(expected: list[str], output: str) -> str | None:
    """Return the first expected line that the output does not show in its place, or None.

    >>> first_missing(["order ... confirmed", "done"], "order 7 confirmed\\nother\\ndone\\n")
    >>> first_missing(["done", "order"], "order\\ndone\\n")
    'order'
    """
    rest = iter(output.splitlines())
    for line in expected:
        if line.strip() in {"", "..."}:
            continue
        pattern = ".*".join(re.escape(part) for part in line.strip().split("..."))
        if not any(re.search(pattern, printed) for printed in rest):
            return line
    return None


if __name__ == "__main__":
    sys.path[0] = os.curdir
    run_page(Path(sys.argv[1]))
