"""Imports go down only; the contracts are in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from tests.structure.source import ROOT


def test_imports_keep_the_contracts():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
