"""Every code block of the README and of docs/ runs and prints what the page says."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("code_blocks.py")
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.is_file()]
ON_SERVERS = {ROOT / "docs/how-to/postgresql.md"}
"""Pages that need a broker; a test of its transport runs them."""


@pytest.mark.timeout(180)  # the page of the command line runs some fifty commands
@pytest.mark.parametrize("page", sorted(set(PAGES) - ON_SERVERS), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_of_the_page_run(page, tmp_path):
    run_blocks(page, tmp_path, {})


def run_blocks(page: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run a page in a process of its own."""
    # A session of its own: whatever a page leaves running in the background ends with the test.
    runner = subprocess.Popen(
        [sys.executable, "-W", "error", RUNNER, page],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if "TRUNKLINE" not in name} | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = runner.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, signal.SIGKILL)
    assert runner.returncode == 0, output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_line_before_each_file_of_the_page_names_it(page):
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line]
    files = {number: found[1] for number, line in enumerate(lines) if (found := re.match(r"<!-- file: (.*) -->", line))}
    assert [name for number, name in files.items() if f"`{name}`" not in lines[number - 1]] == []
