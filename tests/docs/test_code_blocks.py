"""Every code block of the README and of docs/ runs and prints what the page says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("code_blocks.py")
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.is_file()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_of_the_page_run(page, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", RUNNER, page],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "TRUNKLINE" not in name},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
