"""Where in the user's code the tasks of a process wait, which a crash cuts short, and where a handler raised.

What is said here is for the story of a run.

Read next: story.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import trunkline
from trunkline.lanes import Resume
from trunkline.testing.simulator.loop import LANE, Lane

_NOT_OURS = tuple(
    folder + os.sep
    for folder in (str(Path(trunkline.__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
)
_RESUME = Resume.__await__.__code__


class Whereabouts:
    """The tasks of one run, by process.

    Args:
        make: makes tasks.
    """

    def __init__(self, make: Callable[..., asyncio.Task[Any]]) -> None:
        self._make = make
        self._tasks: list[tuple[Lane | None, asyncio.Task[Any]]] = []

    def make(self, loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        """Make a task and note whose it is."""
        task = self._make(loop, coroutine, **options)
        context = options.get("context") or contextvars.copy_context()
        self._tasks.append((context.get(LANE, None), task))
        return task

    def of(self, lane: Lane) -> list[str]:
        """Return where the tasks of a process wait, such as `charge (shop.py:31)`."""
        found = [_deepest(task.get_coro()) for owner, task in self._tasks if owner is lane and not task.done()]
        return sorted({place for place in found if place})


def _deepest(coroutine: Any) -> str:
    """Return the last frame of the user's own, of those that wait for each other; nothing if there is none."""
    return _last((frame, frame.f_lineno) for frame in _frames(coroutine))


def raised_at(error: BaseException) -> str:
    """Return the last frame of the user's own that an error came through, such as `charge (shop.py:31)`."""
    return _last(traceback.walk_tb(error.__traceback__))


def _last(frames: Iterable[tuple[FrameType, int]]) -> str:
    place = ""
    for frame, line in frames:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_OURS) and not name.startswith("<"):
            place = f"{frame.f_code.co_name} ({Path(name).name}:{line})"
    return place


def _frames(waiting: Any) -> Iterator[FrameType]:
    while waiting is not None:
        for frame, inner in (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await")):
            if hasattr(waiting, frame):
                found = getattr(waiting, frame)
                if found is not None:
                    yield found
                waiting = getattr(waiting, inner)
                if waiting is None and found is not None and found.f_code is _RESUME:
                    waiting = found.f_locals["driver"]  # what lanes.py steps by hand
                break
        else:
            return
