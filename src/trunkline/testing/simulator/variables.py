"""Variables of the modules in which services are written: really each process has its own, here they share them.

Invariant: a run leaves them as it found them. At a crash those are put back that only the crashed
service can see; what several share lives on, and is told. Never does: objects of other types than Python's own
containers, numbers and texts. Read next: world.py.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.service import Service, System

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, tuple, frozenset})
_MAPPINGS = frozenset({dict, defaultdict, OrderedDict, Counter})
_CONTAINERS = _MAPPINGS | {list, set, deque, bytearray}
_KEPT = _PLAIN | _CONTAINERS | {count}


class Variables:
    """The variables of a system's modules.

    Args:
        alone: whether each service has one process.
    """

    def __init__(self, system: System, *, alone: bool) -> None:
        users: dict[str, set[str]] = {}
        for service in system.services:
            for module in _modules_of(service):
                users.setdefault(module, set()).add(service.name)
        self._owner = {module: min(names) if alone and len(names) == 1 else "" for module, names in users.items()}
        self._shared: list[_Variable] = []
        self._own: dict[str, list[_Variable]] = {}

    def begin(self) -> None:
        """Note how they are before a run."""
        self._shared, self._own = [], {}
        for module, owner in self._owner.items():
            kept = self._own.setdefault(owner, []) if owner else self._shared
            kept.extend(_variables(sys.modules[module]))

    def crashed(self, service: str) -> None:
        """Put back what only the processes of `service` can see: they have none now."""
        for one in self._own.get(service, ()):
            one.put_back()

    def ended(self) -> list[str]:
        """Put everything back after a run; return the names of those that changed and outlived a crash."""
        for service in self._own:
            self.crashed(service)
        return [one.name for one in self._shared if one.put_back()]


class _Variable:
    """One variable of a module or class.

    Attributes:
        name: `module.variable` or `module.Class.variable`.
    """

    __slots__ = ("_cells", "_holder", "_key", "_value", "name")

    def __init__(self, holder: Any, key: str, value: Any, name: str) -> None:
        self.name = name
        self._holder = holder
        self._key = key
        self._value = value
        self._cells = [(cell, copy.copy(cell)) for cell in _cells(value, set())]

    def put_back(self) -> bool:
        """Make it what it was; return whether it was something else."""
        now = vars(self._holder).get(self._key)
        moved = not _alike(now, self._value)
        if moved:
            setattr(self._holder, self._key, self._value)
        changed = [(cell, was) for cell, was in self._cells if not _same(cell, was)]
        for cell, was in changed:
            cell.clear()
            if isinstance(cell, list | deque | bytearray):
                cell.extend(was)
            else:
                cell.update(was)
        return moved or bool(changed)


class _Counter(_Variable):
    """An itertools.count, which cannot be put back, only made anew."""

    __slots__ = ()

    def put_back(self) -> bool:
        """As _Variable."""
        now = vars(self._holder).get(self._key)
        if repr(now) == self._value:
            return False
        arguments = self._value.partition("(")[2].rstrip(")").split(", ")
        setattr(self._holder, self._key, count(*map(float if "." in self._value else int, arguments)))
        return True


def _modules_of(service: Service) -> Iterator[str]:
    """Return the modules of a service's functions, and those next to them from which these take something."""
    functions: list[Callable[..., Any]] = [one.function for one in service.handlers]
    functions += [one.function for one in service.backgrounds]
    functions += list(service.factories.values())
    found = {getattr(function, "__module__", None) for function in functions}
    homes = [sys.modules[name] for name in sorted(name for name in found if name) if _is_users(name)]
    names = {home.__name__ for home in homes}
    for home in homes:
        folder = Path(home.__file__ or "").parent
        for value in vars(home).values():
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and _is_users(name) and Path(sys.modules[name].__file__ or "").parent == folder:
                names.add(name)
    yield from sorted(names)


def _is_users(module: str) -> bool:
    """Return whether a module is the user's own and has a file."""
    found = sys.modules.get(module)
    path = getattr(found, "__file__", None)
    return path is not None and module.partition(".")[0] != "trunkline" and "site-packages" not in path


def _variables(module: ModuleType) -> Iterator[_Variable]:
    holders: list[Any] = [module]
    holders += [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    for holder in holders:
        prefix = module.__name__ if holder is module else f"{module.__name__}.{holder.__qualname__}"
        for key, value in list(vars(holder).items()):
            if type(value) not in _KEPT or (key.startswith("_") and key.endswith("_")):
                continue
            if type(value) is count:
                yield _Counter(holder, key, repr(value), f"{prefix}.{key}")
            else:
                yield _Variable(holder, key, value, f"{prefix}.{key}")


def _cells(value: Any, seen: set[int]) -> Iterator[Any]:
    """Return the containers of which a value is made, once each: itself, and those in it."""
    if type(value) in _CONTAINERS and id(value) not in seen:
        seen.add(id(value))
        yield value
        for one in value.values() if type(value) in _MAPPINGS else value:
            yield from _cells(one, seen)


def _alike(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in _PLAIN and bool(one == other))


def _same(cell: Any, was: Any) -> bool:
    """Return whether a container has what it had."""
    if len(cell) != len(was):
        return False
    if type(cell) in _MAPPINGS:
        return all(key in cell and _alike(cell[key], value) for key, value in was.items())
    return cell == was if isinstance(cell, set | bytearray) else all(map(_alike, cell, was))
