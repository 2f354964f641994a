"""The broker that carries the demo's messages: none for the embedded engine, a real one on loopback, or the user's own.

Invariant: every run uses names of its own on the broker, so nothing of an earlier run is in its way.
Read next: processes.py.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from examples.shop.processes import DATABASE, ROOT, DemoError

EMBEDDED = "sqlite"
LOCAL = ("rabbitmq", "kafka", "nats", "redis", "postgres")
"""Brokers that `python -m scripts.brokers` installs and starts."""


class Broker:
    """Where the messages go.

    Args:
        transport: `sqlite`, a name of `LOCAL`, or the URL of a broker that runs already.
        folder: of the demo; the embedded engine's file is in it.

    Attributes:
        name: for people.
        can_restart: whether the demo may restart it.
    """

    def __init__(self, transport: str, folder: Path) -> None:
        self.can_restart = transport in LOCAL
        self.name = "one SQLite file" if transport == EMBEDDED else transport
        self._transport = transport
        self._folder = folder

    def start(self) -> str:
        """Return the URL of the transport; a broker of `LOCAL` runs when this returns.

        Raises: DemoError.
        """
        if self._transport == EMBEDDED:
            return f"sqlite:///{self._folder / DATABASE}"
        if not self.can_restart:
            return self._transport
        url = _command("start", self._transport).split("\t")[1]
        separator = "&" if "?" in url else "?"
        return f"{url}{separator}prefix=shop{int(time.time())}-{os.getpid()}"

    async def restart(self) -> None:
        """Stop and start the broker.

        Raises: DemoError.
        """
        await asyncio.to_thread(_command, "restart", self._transport)


def _command(*arguments: str) -> str:
    """Run `python -m scripts.brokers` and return the first line of what it says."""
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "scripts.brokers", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise DemoError(f"python -m scripts.brokers {' '.join(arguments)} failed:\n{done.stderr.strip()}")
    return done.stdout.splitlines()[0] if done.stdout else ""
