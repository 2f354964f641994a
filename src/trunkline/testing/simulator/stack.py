"""Where user code is: the file and line that people look for, in a stack or in a task that waits.

Never does: print addresses; what is said here is the same in every run. Read next: border.py.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import trunkline

_OTHERS = tuple(
    os.path.join(path, "")  # noqa: PTH118 - compared with what code objects hold
    for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
)
_OWN = os.path.join(os.path.dirname(trunkline.__file__), "")  # noqa: PTH118, PTH120

_ABOVE = _OWN.removesuffix(os.path.join("trunkline", ""))  # noqa: PTH118


@functools.cache
def is_user(file: str) -> bool:
    """Return whether a file is the user's: of no library, and not Trunkline's."""
    return not file.startswith((*_OTHERS, _OWN, "<")) and "site-packages" not in file


def place(frame: FrameType | None) -> str:
    """Return where user code is: `shop.py:41 in charge`, of the innermost frame that is the user's; else ``."""
    while frame is not None:
        if is_user(frame.f_code.co_filename):
            return _place(frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return ""


def _place(code: CodeType, line: int) -> str:
    file = code.co_filename
    inside = os.path.join(os.getcwd(), "")  # noqa: PTH109, PTH118 - as above
    return f"{file.removeprefix(inside).removeprefix(_ABOVE)}:{line} in {code.co_name}"


def stack(frame: FrameType | None, outside: str) -> str:
    """Return a stack for people, outermost first, without what is outside of the innermost function `outside`."""
    frames = [(each, line) for each, line in traceback.walk_stack(frame)]
    for index, (each, _) in enumerate(frames):
        if each.f_code.co_qualname == outside:
            del frames[index:]
            break
    return "".join(traceback.StackSummary.extract(reversed(frames)).format())


def describe(callback: Callable[..., Any]) -> str:
    """Return what a step did: `task charge at shop.py:41 in charge`, where the task waits now; or a function's name."""
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        coroutine: Any = owner.get_coro()
        waits = list(_frames(coroutine))
        if not waits:
            return f"task {coroutine.__qualname__} has ended"
        found = next((each for each in reversed(waits) if is_user(each[0].co_filename)), None) or next(
            (each for each in reversed(waits) if not each[0].co_filename.startswith(_OTHERS)), waits[-1]
        )
        return f"task {waits[0][0].co_qualname} at {_place(*found)}"
    while isinstance(callback, functools.partial):
        callback = callback.func
    name = getattr(callback, "__qualname__", type(callback).__qualname__)
    return name if isinstance(name, str) else type(callback).__qualname__


def _frames(coroutine: Any) -> Iterator[tuple[CodeType, int]]:
    """Yield where a coroutine waits, and where what it waits for does, outermost first."""
    while coroutine is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(coroutine, f"{kind}_frame", None)
            if frame is not None:
                yield frame.f_code, frame.f_lineno
                break
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
