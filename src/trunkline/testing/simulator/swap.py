"""C functions that call a Python function in their place for a while, whoever holds them under whatever name.

`from time import time`, a default argument and `field(default_factory=time.time)` hold the function object itself, so
to replace `time.time` in its module would not reach them. A function object of C points to a definition and to what
it is bound to; `on` points it to a definition whose C code is that of `PyObject_Call…`, bound to the Python function.
Its own calling convention stays, and so do exceptions. Source: time-machine (adamchainz) replaces C functions by their
definitions too; CPython Include/cpython/methodobject.h, the same from 3.11 to 3.14.

Invariant: both pointers change at once for other threads (one C call under the interpreter's lock), and what is bound
lives for ever, so that no garbage collection finds a count that is wrong. Read next: interception.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_API = ctypes.pythonapi
_HEAD = object.__basicsize__
_VARARGS, _KEYWORDS, _NOARGS, _O, _FASTCALL = 0x1, 0x2, 0x4, 0x8, 0x80
_CONVENTION = _VARARGS | _KEYWORDS | _NOARGS | _O | _FASTCALL
_CALLS = {
    _NOARGS: "PyObject_CallNoArgs",
    _O: "PyObject_CallOneArg",
    _VARARGS: "PyObject_CallObject",
    _VARARGS | _KEYWORDS: "PyObject_Call",
    _FASTCALL | _KEYWORDS: "PyObject_Vectorcall",
}
"""Calling convention → the function of the C API that takes the same arguments after what is to be called."""

_new_function = _API.PyCMethod_New
_new_function.restype = ctypes.py_object
_new_function.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.py_object, ctypes.c_void_p]


class _Definition(ctypes.Structure):
    """PyMethodDef, part of the stable ABI."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("code", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


class Swap:
    """One C function.

    Args:
        function: a function or bound method of C.
        replacement: is given `original`, and returns what is called while the swap is on.

    Attributes:
        original: another object for the same function, which is never swapped.
    """

    __slots__ = ("_definition", "_off", "_on", "_place", "function", "original")

    def __init__(self, function: Any, replacement: Callable[[Any], Callable[..., Any]]) -> None:
        self.function = function  # and keeps it: its memory is written to
        self._place = (ctypes.c_void_p * 2).from_address(id(function) + _HEAD)
        was = _Definition.from_address(self._place[0] or 0)
        code = ctypes.cast(getattr(_API, _CALLS[was.flags & _CONVENTION]), ctypes.c_void_p).value
        self._definition = _Definition(was.name, code, was.flags, was.doc)
        self.original = _new_function(self._place[0], function.__self__, function.__module__, None)
        called = replacement(self.original)
        _API.Py_IncRef(ctypes.py_object(called))
        self._off: list[Any] = [self._place[0], self._place[1]]
        self._on: list[Any] = [ctypes.addressof(self._definition), id(called)]

    def on(self) -> None:
        """Have the replacement called from now on."""
        self._place[:] = self._on

    def off(self) -> None:
        """Have the function called from now on."""
        self._place[:] = self._off


def can_swap(function: Any) -> bool:
    """Return whether a C function can be swapped: it is one, of a calling convention that is known."""
    if type(function) is not type(len):
        return False
    place = (ctypes.c_void_p * 2).from_address(id(function) + _HEAD)
    definition = _Definition.from_address(place[0] or 0)
    return definition.name == function.__name__.encode() and definition.flags & _CONVENTION in _CALLS
