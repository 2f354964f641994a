"""An event loop in virtual time that runs several processes and decides which of them goes on.

Invariant: within a process callbacks run in the order of `call_soon`, as asyncio promises; the tape decides which
process is next. What a dead process still had to do is never done, not even its `finally`. Same decisions, same run:
nothing depends on addresses, for tasks and futures hash by the order in which they were made.
Never does: open sockets, signals, subprocesses, threads. Source: CPython 3.11 Lib/asyncio/base_events.py for what a
loop has to offer. Read next: world.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from asyncio import events
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any, NoReturn
from zlib import crc32

from trunkline.errors import SimulationError
from trunkline.testing.simulator.border import OUTSIDE
from trunkline.testing.simulator.stack import describe, place
from trunkline.testing.simulator.tape import Chooser

STEPS = 200_000
"""After so many steps a run that has not ended is taken for one that never will."""


CLOSES = 50
"""How often what a dead process had under way is told to end."""


class EndlessError(Exception):
    """A run has taken STEPS steps and not ended: something goes round in circles."""


class Lane:
    """What one process has to run, in order.

    Attributes:
        name: of its process. service: whose process it is.
        steps: how many callbacks have run.
        world: the run that it is part of.
        fuse: the step before which it dies; 0 never.
        alive: whether it still runs. paused: whether it does nothing for a while.
        context: of callbacks that come from outside of it.
    """

    __slots__ = ("alive", "context", "fuse", "name", "number", "paused", "queue", "service", "steps", "world")

    def __init__(self, name: str, number: int, world: Any, service: str = "") -> None:
        self.name = name
        self.service = service or name
        self.world = world
        self.number = number
        self.queue: deque[Scheduled] = deque()
        self.steps = 0
        self.fuse = 0
        self.alive = True
        self.paused = False
        self.context = contextvars.Context()
        self.context.run(LANE.set, self)


LANE: contextvars.ContextVar[Lane] = contextvars.ContextVar("lane")


class Scheduled:
    """A callback that is to run: what asyncio.Handle is, in half the time.

    Attributes:
        context: in which it runs; None for what happens outside of every process.
    """

    __slots__ = ("args", "callback", "context", "gone")

    def __init__(
        self, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.gone = False

    def cancel(self) -> None:
        """Do not run it."""
        self.gone = True

    def cancelled(self) -> bool:
        """Return whether it was cancelled."""
        return self.gone


class Timer(Scheduled):
    """The same at a time: what asyncio.TimerHandle is."""

    __slots__ = ("time",)
    time: float

    def when(self) -> float:
        """Return when it is to run, in virtual seconds."""
        return self.time


class SimulatedTask(asyncio.Task):  # type: ignore[type-arg]
    """A task of a simulated process."""

    _number = 0

    def __hash__(self) -> int:
        return self._number or _number(self)


class SimulatedFuture(asyncio.Future):  # type: ignore[type-arg]
    """A future of a simulated process."""

    _number = 0

    def __hash__(self) -> int:
        return self._number or _number(self)


def _number(numbered: Any) -> int:
    """Give a task or future its number: by the first time it is put into a set, which no address has a part in."""
    number: int = numbered.get_loop().next_number()
    numbered._number = number  # noqa: SLF001
    return number


class SimulatedLoop(asyncio.BaseEventLoop):
    """The loop of one run.

    Args:
        order: decides which of the processes that have something to do goes on.
        died: called when a lane's fuse has burnt down, instead of the step.
        idle: called before time goes on; returns whether the run is over.

    Attributes:
        host: the lane of everything that is not part of a process: network, broker, disks.
        running: the lane whose callback runs now.
        now: virtual seconds since the run began. steps: how many callbacks have run.
        trace: a hash over which lane ran when and what was sent; equal in equal runs.
        next_number: returns a number never given before.
        log: told of what is done, and of each step once it is made; see determinism.py.
        slept: virtual seconds that the `def` handler which runs now has slept; None on the loop itself.
        refused: what ends the run. buried: the run is over, and what is closed must do nothing more.
    """

    def __init__(self, order: Chooser, died: Callable[[Lane], None], idle: Callable[[], bool]) -> None:
        super().__init__()
        self._order = order
        self._died = died
        self._idle = idle
        self.now = 0.0
        self.next_number = count(1).__next__
        self._timers: list[tuple[float, int, Scheduled, Lane]] = []
        self._lanes: list[Lane] = []
        self.tasks: list[SimulatedTask] = []
        self.host = Lane("host", 0, None)
        self.running = self.host
        self.steps = 0
        self.trace = 0
        self.errors: list[dict[str, Any]] = []
        self.refused: SimulationError | None = None
        self.buried = False
        self.slept: float | None = None
        self.log: Any = None
        self.set_exception_handler(lambda _loop, context: self.errors.append(context))

    def time(self) -> float:
        """Return virtual seconds since the run began."""
        return self.now

    get_debug = staticmethod(bool)  # asked for each future: False, without a frame

    def create_future(self) -> SimulatedFuture:
        """Return a future of this loop."""
        return SimulatedFuture(loop=self)

    def create_task(  # type: ignore[override]
        self, coroutine: Any, **options: Any
    ) -> asyncio.Task[Any]:
        """Make a task, as whoever has set a factory wants it, else one that hashes by its number."""
        if self.get_task_factory() is None:
            return make_task(self, coroutine, **options)
        return super().create_task(coroutine, **options)

    # --- what is to run ---

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Scheduled:
        """Run `callback` after what its process already has to run."""
        if context is None:
            lane, context = self.running, contextvars.copy_context()
        else:
            lane = context.get(LANE, self.host)
        scheduled = Scheduled(callback, args, context)
        if lane.alive:
            self._add(lane, scheduled)
        return scheduled

    def _add(self, lane: Lane, scheduled: Scheduled) -> None:
        if not lane.queue and not lane.paused:
            self._lanes.append(lane)
        lane.queue.append(scheduled)

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Timer:
        """Run `callback` at a virtual time."""
        if context is None:
            lane, context = self.running, contextvars.copy_context()
        else:
            lane = context.get(LANE, self.host)
        timer = Timer(callback, args, context)
        timer.time = when
        heappush(self._timers, (when, self.next_number(), timer, lane))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> Timer:
        """Run `callback` in so many virtual seconds."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_on_host(self, delay: float, callback: Callable[..., Any], *args: Any) -> None:
        """Run `callback` outside of every process, in so many virtual seconds."""
        timer = self.now + delay, self.next_number(), Scheduled(callback, args, None), self.host
        heappush(self._timers, timer)

    def call_on_host_at(self, when: float, callback: Callable[..., Any], *args: Any) -> None:
        """Run `callback` outside of every process, at a virtual time."""
        heappush(self._timers, (when, self.next_number(), Scheduled(callback, args, None), self.host))

    def call_in(self, lane: Lane, callback: Callable[..., Any], *args: Any) -> None:
        """Run `callback` in a process, after what it already has to run; never if it is dead."""
        if lane.alive:
            self._add(lane, Scheduled(callback, args, lane.context))

    def pause(self, lane: Lane) -> None:
        """Let a process do nothing until `resume`, as SIGSTOP does."""
        lane.paused = True
        if lane in self._lanes:
            self._lanes.remove(lane)

    def resume(self, lane: Lane) -> None:
        """Let a process go on."""
        lane.paused = False
        if lane.alive and lane.queue and lane not in self._lanes:
            self._lanes.append(lane)

    def kill(self, lane: Lane) -> None:
        """Drop everything that a process had to do."""
        lane.alive = False
        for scheduled in lane.queue:
            for argument in scheduled.args:
                if isinstance(argument, SimulatedTask):
                    argument._log_traceback = False  # noqa: SLF001 - who was to be told died
        lane.queue.clear()
        if lane in self._lanes:
            self._lanes.remove(lane)

    def mix(self, text: str, data: bytes = b"") -> None:
        """Take what was done into the trace."""
        self.trace = hash((self.trace, crc32(data, crc32(text.encode()))))
        if self.log is not None:
            self.log.done(text, data)

    def bury(self) -> None:
        """Drop all tasks, after the run: whatever they do when they are closed has no effect and is not told."""
        self.buried = True
        told, sys.unraisablehook = sys.unraisablehook, lambda _unraisable: None
        # What is closed may begin to stop an App; the tasks of that are ours too, and are closed in their turn: left
        # alone they would be told of as never awaited, whenever garbage is next collected.
        events._set_running_loop(self)  # noqa: SLF001 - as in `run`
        try:
            for task in self.tasks:
                if task.done():
                    continue
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - left behind by design
                _close(task.get_coro())
            self.tasks.clear()
            self._timers.clear()
        finally:
            events._set_running_loop(None)  # noqa: SLF001 - as in `run`
            sys.unraisablehook = told

    # --- running ---

    def run(self, seconds: float) -> None:
        """Run until `idle` says so, or nothing is left to do, or so many virtual seconds have passed.

        Raises: EndlessError after STEPS steps; SimulationError for what a process was refused.
        """
        lanes, order = self._lanes, self._order
        events._set_running_loop(self)  # noqa: SLF001 - what BaseEventLoop.run_forever does
        try:
            while self.refused is None and (lanes or self._advance(seconds)):
                ready = len(lanes)
                index = order(ready) if ready > 1 else 0
                lane = lanes[index]
                scheduled = lane.queue.popleft()
                if not lane.queue:
                    del lanes[index]
                if not scheduled.gone:
                    self._step(lane, scheduled)
        finally:
            events._set_running_loop(None)  # noqa: SLF001
            self.running = self.host
        if self.refused is not None:
            raise self.refused

    def _advance(self, until: float) -> bool:
        """Let time go on to the next timer; return False when the run is over."""
        if self._idle():
            return False
        timers = self._timers
        while timers:
            when, _, timer, lane = timers[0]
            if timer.gone or not lane.alive:
                heappop(timers)
                continue
            if when > until:
                return False
            now = self.now = max(self.now, when)
            while timers and timers[0][0] <= now:
                _, _, due, lane = heappop(timers)
                if lane.alive and not due.gone:
                    self._add(lane, due)
            if self._lanes:  # else they are of processes that are paused
                return True
        return False

    def _step(self, lane: Lane, scheduled: Scheduled) -> None:
        self.steps += 1
        if self.steps > STEPS:
            raise EndlessError
        lane.steps += 1
        self.trace = hash((self.trace, lane.number, self.now))
        if lane.steps == lane.fuse:
            lane.queue.append(scheduled)  # it had to do that still
            self._died(lane)
            return
        self.running = lane
        try:
            if scheduled.context is None:
                scheduled.callback(*scheduled.args)
            else:
                scheduled.context.run(scheduled.callback, *scheduled.args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - as asyncio does: told to the handler, and the loop goes on
            self.call_exception_handler({"message": f"exception in {describe(scheduled.callback)}", "exception": error})
        if self.log is not None:
            self.log.step(lane.name, scheduled.callback)
        self.running = self.host

    # --- what a simulated process cannot do ---

    def run_in_executor(  # type: ignore[override]
        self, _executor: Any, function: Callable[..., Any], *args: Any
    ) -> Any:
        """Run `function` in a step of its own, in place of a thread."""
        future = self.create_future()

        def run() -> None:
            result: Any = None
            failed: BaseException | None = None
            self.slept = 0.0
            try:
                result = function(*args)
            except BaseException as error:  # noqa: BLE001 - handed to whoever awaits it
                failed = error
            slept, self.slept = self.slept, None
            if slept:
                self.call_later(slept, end, result, failed)
            else:
                end(result, failed)

        def end(result: Any, failed: BaseException | None) -> None:
            if future.cancelled():
                return
            if failed is None:
                future.set_result(result)
            else:
                future.set_exception(failed)

        self.call_soon(run)
        return future

    def refuse(self, what: str, how: str) -> NoReturn:
        """Refuse what leaves the simulation, and end the run, whatever the caller does with the error.

        Args:
            what: was called. how: to do it instead.
        Raises: SimulationError E702, always; GeneratorExit once the run is over, for what a `finally` tries then.
        """
        if self.buried:
            raise GeneratorExit
        where = place(sys._getframe(1))  # noqa: SLF001 - the public way to one's own stack
        error = SimulationError(
            "E702", f"{self.running.name} calls {what}{where and f' at {where}'}, which leaves the simulation", how
        )
        if self.refused is None:
            self.refused = error
        raise error


def _close(coroutine: Any) -> None:
    """Close what a process had under way; what catches GeneratorExit and goes on is told so again."""
    for _ in range(CLOSES):
        try:
            coroutine.close()
        except BaseException:  # noqa: BLE001, S112 - whatever it does now has no effect
            continue
        return


def make_task(loop: SimulatedLoop, coroutine: Any, **options: Any) -> SimulatedTask:
    """Make a task of a simulated process."""
    task = SimulatedTask(coroutine, loop=loop, **options)
    # A task that nobody refers to any more would be closed, and its `finally` run, in the middle of a run.
    loop.tasks.append(task)
    return task


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: SimulatedLoop, *_args: Any, **_options: Any) -> Any:
        self.refuse(name, OUTSIDE)

    return refuse


for _name in (
    "create_connection", "create_server", "create_datagram_endpoint", "create_unix_connection", "create_unix_server",
    "subprocess_exec", "subprocess_shell", "getaddrinfo", "getnameinfo", "add_signal_handler", "add_reader",
    "add_writer", "sock_connect", "sock_recv", "sock_sendall", "connect_read_pipe", "connect_write_pipe",
    "start_tls", "sendfile", "sock_accept",
):  # fmt: skip
    setattr(SimulatedLoop, _name, _refuse(_name))
