"""Pages whose blocks need a broker do what they say, on a broker."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.brokers import broker_url

ROOT = Path(__file__).parents[2]


@pytest.mark.xdist_group("redis")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", ["run-on-a-broker.md", "move-to-a-broker.md"])
def test_the_blocks_of_the_page_run_on_a_broker(page, tmp_path):
    url = f"{broker_url('redis:everysec')}?prefix=p{time.time_ns()}"
    kept = {name: value for name, value in os.environ.items() if "TRUNKLINE" not in name}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/docs/code_blocks.py", ROOT / "docs/how-to" / page],
        cwd=tmp_path,
        env={**kept, "BROKER": url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
