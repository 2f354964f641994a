"""Real brokers for tests: started once, shared by all tests and workers, left running for the next run.

Invariant: a broker that is not installed skips a test on a laptop and fails it in continuous integration.
What can be asked for: `python -m scripts.brokers --help`. A test that kills or fills a broker takes one with a label.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = 3


@functools.cache
def broker_url(name: str, *settings: str) -> str:
    """Return the URL of a running broker, starting it where needed; `settings` are KEY=VALUE for its configuration."""
    # A laptop's owner decides what is installed there: make brokers.
    install = [] if os.environ.get("CI") else ["--no-install"]
    chosen = [argument for setting in settings for argument in ("--set", setting)]
    return _urls("start", *install, *chosen, name)


def restart(name: str) -> str:
    """Stop it cleanly and start it on the same ports and data."""
    return _urls("restart", name)


def kill(name: str) -> None:
    """End it by kill -9; `kafka3/2` is the second node of a cluster."""
    command("kill", name)


def resume(name: str) -> str:
    """Start it again on the same ports and data, and wait until it answers."""
    return _urls("resume", name)


def stop(name: str, *, wipe: bool = False) -> None:
    """End it cleanly; `wipe` forgets its ports and data too, so the next start is a first one."""
    command("stop", *(["--wipe"] if wipe else []), name)
    if wipe:
        broker_url.cache_clear()


def certificate(name: str) -> Path:
    """Return the CA file of a broker with TLS."""
    return Path(record(name)["certificate"])


def record(name: str) -> dict:
    """Return what is known of a broker that was started: url, port, pid, version, nodes, …"""
    return json.loads((folder(name) / "server.json").read_text())


def folder(name: str) -> Path:
    """Return where its state is."""
    home = Path(os.environ.get("TRUNKLINE_BROKERS") or ROOT / "build" / "brokers")
    return home / name.translate(str.maketrans(":,@", "---"))


def command(*arguments: str) -> str:
    """Run `python -m scripts.brokers` and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.brokers", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == MISSING and not os.environ.get("CI"):
        pytest.skip(f"run `make brokers`: {done.stderr.strip()}")
    if done.returncode:
        raise RuntimeError(f"brokers {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _urls(*arguments: str) -> str:
    return command(*arguments).strip().partition("\t")[2]
