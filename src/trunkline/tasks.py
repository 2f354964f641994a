"""Tasks that do not end unseen.

Invariant: an error that ends one is told. Read next: inflow.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


def spawn(coroutine: Coroutine[Any, Any, None], failed: Callable[[BaseException], None]) -> asyncio.Task[None]:
    """Run a task without which there is no going on: `failed` is told the error that ends it."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            failed(error)

    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(ended)
    return task
