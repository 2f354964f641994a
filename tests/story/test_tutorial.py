"""The walk of docs/tutorial/shop.md, typed into one shell as a reader does."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.shop.processes import ROOT
from tests.docs.code_blocks import _commands, blocks, first_missing

pytestmark = [pytest.mark.xdist_group("shop"), pytest.mark.timeout(240)]

PAGE = ROOT / "docs" / "tutorial" / "shop.md"
PORTS = ("8100", "8101", "8102", "8103")
NEXT = "--- next ---"


def free_ports() -> dict[str, str]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return {port: str(probe.getsockname()[1]) for port, probe in zip(PORTS, probes, strict=True)}


def steps() -> Iterator[tuple[str, list[str]]]:
    """What is typed, and what has to be printed; with ports that are free now."""
    ports = free_ports()
    page = re.sub("|".join(PORTS), lambda found: ports[found[0]], PAGE.read_text("utf-8"))
    for block in blocks(page):
        if "tests/story walks it" not in block.markers.get("no-run", ""):
            continue
        if block.language == "console":
            yield from _commands(block.text, f"line {block.line}")
        else:
            yield block.text, []


def test_the_walk_does_what_the_tutorial_says(tmp_path):
    # The walk writes beside the example, so it runs on a copy.
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    walk = list(steps())
    assert len(walk) > 15
    script = "".join(f"{typed}\necho {shlex.quote(NEXT)}\n" for typed, _ in walk)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.Popen(
        ["bash", "-euc", script], cwd=tmp_path, env=os.environ | {"PATH": path, "NO_COLOR": "1", "COLUMNS": "100"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = shell.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    parts = printed.split(f"{NEXT}\n")
    assert shell.returncode == 0, printed
    assert len(parts) == len(walk) + 1, printed
    for (typed, expected), part in zip(walk, parts, strict=False):
        assert first_missing(expected, part) is None, f"$ {typed}\n{part}"
