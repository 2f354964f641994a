"""The environment of peers: libraries that side-by-side cases run against, apart from Trunkline's own.

Invariant: exactly what requirements.txt locks, by hash; nothing of it enters .venv. Read next: contestants/peers.py.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "bench-venv"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NAMED = (
    "aiormq", "asyncpg", "confluent-kafka", "faststream", "huey", "litequeue", "nats-py", "persist-queue", "redis",
)  # fmt: skip


class PeersError(Exception):
    """The environment cannot be made; the cases that need it are skipped."""


@functools.cache
def python_of_peers() -> str:
    """Return its interpreter, making the environment when requirements.txt has changed.

    Raises: PeersError.
    """
    python = FOLDER / "bin" / "python"
    stamp = FOLDER / ".made-from"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return str(python)
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise PeersError("uv is not installed; run make setup")
    commands = (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(FOLDER)],
        [uv, "pip", "sync", "--quiet", "--require-hashes", "--python", str(python), str(REQUIREMENTS)],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeersError(f"benchmarks/requirements.txt cannot be installed: {done.stderr.strip()}")
    stamp.write_text(wanted)
    return str(python)


def versions_of_peers() -> dict[str, str]:
    """Return the version of each peer that is installed."""
    folders = [str(path) for path in FOLDER.glob("lib/python3*/site-packages")]
    found = {found.metadata["Name"].lower(): found.version for found in distributions(path=folders)} if folders else {}
    return {name: found[name] for name in NAMED if name in found}
