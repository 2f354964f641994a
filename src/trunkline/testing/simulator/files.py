"""What a failure leaves in a folder: its tape, the whole story, and a sequence diagram.

Read next: story.py, diagram.py, recording.py.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import msgspec

from trunkline.testing.simulator.campaign import Failure
from trunkline.testing.simulator.diagram import to_mermaid, to_svg
from trunkline.testing.simulator.recording import Recording
from trunkline.testing.simulator.story import Story

FOLDER = "simulation-failures"
"""Where files go if nobody says otherwise."""
REPLAY = "TRUNKLINE_REPLAY"
"""Environment variable that names the tape which a test repeats."""


class Files(msgspec.Struct, frozen=True):
    """The files of one failure."""

    tape: Path
    story: Path
    svg: Path
    mermaid: Path
    problem: str = ""
    """Why they were not written."""


def write(failure: Failure, story: Story, target: str, folder: Path) -> Files:
    """Write everything about a failure; one of the same target, broker and promise before it is replaced.

    Args:
        target: what was simulated: `shop:system`, or a test such as `tests/test_shop.py::test_orders`.
    """
    name = "-".join(_plain(part) for part in (target, failure.broker, failure.violation.promise))
    tape, told, svg, mermaid = (folder / f"{name}.{ending}" for ending in ("json", "txt", "svg", "mmd"))
    paths = Files(tape, told, svg, mermaid)
    recording = Recording(
        target=target, broker=failure.broker, promise=failure.violation.promise, text=failure.violation.text,
        found=failure.found.aim, tape=failure.result.tape,
    )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recording.save(paths.tape)
        paths.story.write_text(story.text(everything=True), encoding="utf-8")
        paths.svg.write_text(to_svg(story), encoding="utf-8")
        paths.mermaid.write_text(to_mermaid(story), encoding="utf-8")
    except OSError as error:
        return msgspec.structs.replace(paths, problem=str(error))
    return paths


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text.replace(".py::", "-")).strip("-")[-60:]


def command(target: str, tape: Path) -> str:
    """Return the one command that repeats a tape."""
    if "::" in target:
        return f"{REPLAY}={shlex.quote(str(tape))} pytest {shlex.quote(target)}"
    return f"trunkline simulate {shlex.quote(target)} --replay {shlex.quote(str(tape))}"


def foot(failure: Failure, files: Files, target: str) -> list[str]:
    """Return what stands below a story: how it was found, where the rest is, how to repeat it."""
    shorter = ""
    if failure.removed:
        shorter = (
            f"; {failure.removed} other decisions of the run did not matter, and steps are counted anew without them"
        )
    found = f"found by: {failure.found.aim}{shorter}"
    if files.problem:
        return [found, f"tape, story and diagram were not written: {files.problem}"]
    return [
        found,
        f"all of it: {files.story}",
        f"diagram:   {files.svg}, {files.mermaid}",
        f"replay:    {command(target, files.tape)}",
    ]
