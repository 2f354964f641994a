"""What user code sees of the machine while a simulation runs: virtual time, ids and randomness that the seed repeats.

Invariant: outside of a run, and in every other thread, all of it is as it was; what a run finds it leaves behind as it
was. Replaced are the C functions themselves (swap.py), so it does not matter under which name, or as whose default,
user code holds them. What escapes: `id()`, the order of a set of objects that hash by address, or of `str` without
PYTHONHASHSEED (determinism.py finds both), and C code with clocks or generators of its own, such as numpy's.
Read next: border.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import gc
import os
import random as _random
import sys
import threading
import time as _time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import apsw

from trunkline.clock import Draws
from trunkline.errors import SimulationError
from trunkline.testing.simulator import border
from trunkline.testing.simulator.swap import Swap, can_swap
from trunkline.testing.simulator.watchdog import watchdog

if TYPE_CHECKING:
    from trunkline.testing.simulator.loop import SimulatedLoop
    from trunkline.testing.simulator.world import World

random_bytes = os.urandom
"""The function itself, which a run has drawn from the seed."""

_here = threading.get_ident
_NODE = 0x02_00_5E_00_53_00
"""What stands for a network card's address in a UUIDv1: of a range for documentation (RFC 9542)."""
_UUID1_EPOCH = 0x01B2_1DD2_1381_4000
"""100 ns intervals from 1582-10-15 to 1970-01-01 (RFC 9562 §5.1)."""
_UUID_STATE = ("_node", "_last_timestamp", "_last_timestamp_v6", "_last_timestamp_v7", "_last_counter_v7")
_NOW = ("now", "utcnow")


class Interception:
    """The replacements of this process, and the run that they serve.

    Attributes:
        world: the run; None while there is none.
        thread: in which it runs.
    """

    def __init__(self) -> None:
        self.world: World | None = None
        self.thread = 0
        self._swaps: list[Swap] = []
        self._modules = 0
        self._entropy: _random.Random | None = None
        self._uuids = 0

    # --- around a run ---

    @contextlib.contextmanager
    def simulated(self, world: World) -> Iterator[None]:
        """Show this thread the simulated machine of `world`.

        Raises: SimulationError E707 inside of another simulation; E705 in place of the watchdog's interrupt.
        """
        if self.world is not None:
            raise SimulationError("E707", "a simulation begins while another one runs", "one at a time in a process")
        self.prepare()
        self._entropy, self._uuids = None, 0
        machine = _Machine(world.choices.tape.seed)
        watchdog.begin(world.loop)
        self.world, self.thread = world, _here()
        for swap in self._swaps:
            swap.on()
        try:
            yield
            watchdog.end()
        except KeyboardInterrupt:
            if world.loop.refused is not None:
                raise world.loop.refused from None
            raise
        finally:
            for swap in self._swaps:
                swap.off()
            self.world = None
            watchdog.end()
            machine.restore()

    def prepare(self) -> None:
        """Find what there is to replace; before gc.freeze, which hides it."""
        if self._modules != len(sys.modules):
            self._install()

    def _install(self) -> None:
        """Make what has to be made once, and find what has been imported since."""
        if not self._modules:
            sys.addaudithook(border.hook(self._process))
            self._seed_unseeded()
            for name in _NOW:
                self._replace_method(dt.datetime, name)
            self._swaps += [Swap(function, partial(make, self)) for function, make in functions()]
            apsw.connection_hooks.append(self._opened)
            self._wrap_fork_exec()
        known = {id(each) for swap in self._swaps for each in (swap.function, swap.original)}
        bound = [each for each in gc.get_objects() if type(each) is types.BuiltinMethodType]
        for alias in bound:  # datetime.now, held by whoever took it before it was replaced
            if alias.__name__ in _NOW and _is_datetime(alias.__self__) and id(alias) not in known and can_swap(alias):
                self._swaps.append(Swap(alias, partial(_alias, self)))
        self._modules = len(sys.modules)

    def _process(self) -> SimulatedLoop | None:
        """Return the loop if a simulated process runs in this thread now."""
        world = self.world
        if world is None or _here() != self.thread:
            return None
        loop = world.loop
        return None if loop.running is loop.host and not loop.buried else loop

    # --- what is seen ---

    def now(self) -> float:
        """Return seconds since the epoch on the clock of the process that runs."""
        assert self.world is not None  # noqa: S101 - asked during a run only
        return self.world.now()

    def monotonic(self) -> float:
        """Return virtual seconds since the run began."""
        assert self.world is not None  # noqa: S101 - as above
        loop = self.world.loop
        return loop.time() + (loop.slept or 0.0)

    def sleep(self, seconds: float) -> None:
        """Let a `def` handler sleep; refuse it on the loop.

        Raises: SimulationError E702.
        """
        assert self.world is not None  # noqa: S101 - as above
        loop = self.world.loop
        if loop.slept is None:
            loop.refuse(f"time.sleep({seconds!r}) on the event loop", border.WAITS)
        else:
            loop.slept += seconds

    def draw(self, size: int) -> bytes:
        """Return `size` random bytes that the seed repeats."""
        if self._entropy is None:
            assert self.world is not None  # noqa: S101 - as above
            self._entropy = Draws(f"{self.world.choices.tape.seed} entropy")
        return self._entropy.randbytes(size)

    def uuid1(self) -> tuple[bytes, None]:
        """Return the bytes of a UUIDv1 (RFC 9562 §5.1), and that nobody knows whether it is safe."""
        self._uuids += 1
        ticks = int(self.now() * 10_000_000) + _UUID1_EPOCH + self._uuids
        fields = (ticks & 0xFFFF_FFFF, ticks >> 32 & 0xFFFF, 0x1000 | ticks >> 48 & 0x0FFF, 0x8000)
        low, middle, high, sequence = fields
        return (low << 96 | middle << 80 | high << 64 | sequence << 48 | _NODE).to_bytes(16, "big"), None

    def start_thread(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse to start a thread in a simulated process."""

        def start(*args: Any, **named: Any) -> Any:
            loop = self._process()
            if loop is not None:
                loop.refuse("threading.Thread.start", border.THREADS)
            return original(*args, **named)

        return start

    # --- what is no C function, and is replaced for good ---

    def _seed_unseeded(self) -> None:
        """Give `random.Random()` a seed from the run's."""
        seed = _random.Random.seed

        def seeded(generator: _random.Random, a: Any = None, version: int = 2) -> None:
            if a is None and self.world is not None and _here() == self.thread:
                a = int.from_bytes(self.draw(32), "big")
            seed(generator, a, version)

        _random.Random.seed = seeded  # type: ignore[method-assign,assignment]

    def _wrap_fork_exec(self) -> None:
        """Refuse what multiprocessing starts: it tells no audit hook."""
        with contextlib.suppress(ImportError):
            import _posixsubprocess

            original = _posixsubprocess.fork_exec

            def fork_exec(*args: Any) -> Any:
                loop = self._process()
                if loop is not None:
                    loop.refuse("multiprocessing.Process.start", border.PROCESSES)
                return original(*args)

            _posixsubprocess.fork_exec = fork_exec

    def _opened(self, connection: apsw.Connection) -> None:
        """Refuse a file that is opened with apsw: it tells no audit hook."""
        loop = self._process()
        if loop is not None and connection.filename:
            loop.refuse(f"apsw.Connection({connection.filename!r})", border.FILES)

    def _replace_method(self, cls: type, name: str) -> None:
        """Replace a class method of a C type, in the type's own dictionary: whatever is bound later finds it there.

        Source: CPython Objects/typeobject.c: after a change PyType_Modified has to be called.
        """
        own = gc.get_referents(cls.__dict__)[0]
        original = own[name]

        def method(cls: Any, *args: Any, **named: Any) -> Any:
            if self.world is None or _here() != self.thread:
                return original.__get__(None, cls)(*args, **named)
            return _datetime_at(self.now(), cls, name, *args, **named)

        method.__name__ = name
        method.__qualname__ = f"{cls.__qualname__}.{name}"
        own[name] = classmethod(method)
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))


class _Machine:
    """What a run changes of the modules' own state, to be put back."""

    def __init__(self, seed: int) -> None:
        generator: Any = _random._inst  # noqa: SLF001 - the functions of `random` are its methods
        base = _random.Random.__base__
        self._generator, self._base = generator, base
        self._state = base.getstate(generator), generator.gauss_next  # type: ignore[union-attr]
        base.seed(generator, seed)  # type: ignore[union-attr]
        generator.gauss_next = None
        self._bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # an import writes no files
        self._uuid: dict[str, Any] = {}
        uuid = sys.modules.get("uuid")
        if uuid is not None:
            for name in _UUID_STATE:
                if hasattr(uuid, name):
                    self._uuid[name] = getattr(uuid, name)
                    setattr(uuid, name, 0 if name == "_last_counter_v7" else None)

    def restore(self) -> None:
        """Put it back."""
        state, gauss = self._state
        self._base.setstate(self._generator, state)  # type: ignore[union-attr]
        self._generator.gauss_next = gauss
        sys.dont_write_bytecode = self._bytecode
        for name, value in self._uuid.items():
            setattr(sys.modules["uuid"], name, value)


Made = Callable[["Interception", Any], Callable[..., Any]]


def functions() -> Iterator[tuple[Any, Made]]:
    """Yield each C function and how its replacement is made."""
    yield _time.time, _reads(Interception.now)
    for name in ("monotonic", "perf_counter", "process_time", "thread_time"):
        yield getattr(_time, name), _reads(Interception.monotonic)
        yield getattr(_time, f"{name}_ns"), _reads_ns(Interception.monotonic)
    yield _time.time_ns, _reads_ns(Interception.now)
    for name in ("localtime", "gmtime", "ctime"):
        yield getattr(_time, name), _now_unless_given
    for name, given in (("asctime", 0), ("strftime", 1)):
        yield getattr(_time, name), partial(_local_unless_given, given)
    if hasattr(_time, "clock_gettime"):
        yield _time.clock_gettime, partial(_clock, 1)
        yield _time.clock_gettime_ns, partial(_clock, 1_000_000_000)
    yield _time.sleep, _passes_other_threads(lambda it, _original: it.sleep)
    yield os.urandom, _passes_other_threads(lambda it, _original: it.draw)
    thread: Any = sys.modules["_thread"]
    for name in ("start_new_thread", "start_joinable_thread"):
        if hasattr(thread, name):
            yield getattr(thread, name), Interception.start_thread
    with contextlib.suppress(ImportError):
        import _uuid  # type: ignore[import-not-found]

        if hasattr(_uuid, "generate_time_safe"):
            yield _uuid.generate_time_safe, _passes_other_threads(lambda it, _original: it.uuid1)


def _passes_other_threads(make: Made) -> Made:
    def made(it: Interception, original: Any) -> Callable[..., Any]:
        replacement = make(it, original)

        def call(*args: Any) -> Any:
            return replacement(*args) if _here() == it.thread else original(*args)

        return call

    return made


def _reads(read: Callable[[Interception], float]) -> Made:
    return _passes_other_threads(lambda it, _original: partial(read, it))


def _reads_ns(read: Callable[[Interception], float]) -> Made:
    return _passes_other_threads(lambda it, _original: lambda: int(read(it) * 1_000_000_000))


def _now_unless_given(it: Interception, original: Any) -> Callable[..., Any]:
    def convert(*args: Any) -> Any:
        if _here() == it.thread and (not args or args[0] is None):
            args = (it.now(),)
        return original(*args)

    return convert


def _local_unless_given(given: int, it: Interception, original: Any) -> Callable[..., Any]:
    def convert(*args: Any) -> Any:
        if _here() == it.thread and len(args) == given:
            args = (*args, _time.localtime(it.now()))
        return original(*args)

    return convert


def _clock(per_s: int, it: Interception, original: Any) -> Callable[..., Any]:
    def read(clock: int) -> Any:
        if _here() != it.thread:
            return original(clock)
        seconds = it.now() if clock == _time.CLOCK_REALTIME else it.monotonic()
        return seconds if per_s == 1 else int(seconds * per_s)

    return read


def _datetime_at(now: float, cls: Any, name: str, *args: Any, **named: Any) -> Any:
    if name == "now":
        return cls.fromtimestamp(now, *args, **named)
    return cls.fromtimestamp(now, dt.UTC, *args, **named).replace(tzinfo=None)


def _alias(it: Interception, original: Any) -> Callable[..., Any]:
    cls, name = original.__self__, original.__name__

    def call(*args: Any, **named: Any) -> Any:
        if _here() != it.thread:
            return original(*args, **named)
        return _datetime_at(it.now(), cls, name, *args, **named)

    return call


def _is_datetime(bound: object) -> bool:
    return isinstance(bound, type) and issubclass(bound, dt.datetime)


interception = Interception()
"""The one of this process."""
