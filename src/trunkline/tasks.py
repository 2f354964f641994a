"""Tasks that do not end unseen, and that do end.

Invariant: an error that ends one is told; so is that one goes on though it was cancelled. Read next: inflow.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any

log = logging.getLogger("trunkline.tasks")

STUBBORN_S = 5.0
"""Seconds between two warnings while a cancelled task goes on."""


def spawn(coroutine: Coroutine[Any, Any, None], failed: Callable[[BaseException], None]) -> asyncio.Task[None]:
    """Run a task without which there is no going on: `failed` is told the error that ends it."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            failed(error)

    task = asyncio.get_running_loop().create_task(coroutine)
    task.add_done_callback(ended)
    return task


async def cancel(tasks: Collection[asyncio.Task[None]], label: str) -> None:
    """Cancel tasks of a subscription and wait for their end; said aloud while a handler goes on all the same."""
    for task in tasks:
        task.cancel()
    going_on = set(tasks)
    while going_on:
        _, going_on = await asyncio.wait(going_on, timeout=STUBBORN_S)
        if going_on:
            log.warning(
                "%s: the stop waits for %d handlers that go on though they were cancelled: they swallow"
                " asyncio.CancelledError; a second signal ends the process",
                label, len(going_on),
            )  # fmt: skip
    await asyncio.gather(*tasks, return_exceptions=True)  # whatever they ended with is of no use now
