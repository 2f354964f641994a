"""Runs of a search in one process or several.

Invariant: results come in the order of the attempts. Read next: search.py.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from trunkline.errors import SimulationError
from trunkline.testing.simulator.interception import interception
from trunkline.testing.simulator.search import Attempt, runs
from trunkline.testing.simulator.simulation import Simulation
from trunkline.testing.simulator.world import Result

CHUNK = 20
"""Runs that a process is given at a time."""

_of_this_process: list[Simulation] = []

Ended = list[tuple[Attempt, Result]]


def run_all(
    simulation: Simulation, attempts: Iterable[Attempt], processes: int
) -> Generator[tuple[Attempt, Result], None, None]:
    """Yield each attempt with its result, in order.

    Raises: SimulationError E702 and E704 as a run does, with the attempt in its text; E709 if a process ended.
    """
    if processes == 1:
        yield from runs(simulation, attempts)
        return
    # A fork, so that the simulation need not be pickled: it is functions and classes of the user.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _begin, (simulation,))
    under_way: deque[tuple[list[Attempt], Future[Ended | tuple[str, str, str]]]] = deque()
    chunks, refused = _chunks(attempts), None
    try:
        while True:
            while not refused and len(under_way) < 2 * processes and (chunk := next(chunks, None)):
                try:
                    under_way.append((chunk, pool.submit(_chunk, chunk)))
                except BrokenProcessPool as error:
                    refused = _lost(chunk)  # what was done before is told first
                    refused.__cause__ = error
            if not under_way:
                break
            yield from _ended(*under_way.popleft())
        if refused:
            raise refused
    finally:
        pool.shutdown(cancel_futures=True)


def _ended(chunk: list[Attempt], future: Future[Ended | tuple[str, str, str]]) -> Ended:
    try:
        ended = future.result()
    except BrokenProcessPool as error:
        raise _lost(chunk) from error
    if isinstance(ended, list):
        return ended
    raise SimulationError(*ended)


def _lost(chunk: list[Attempt]) -> SimulationError:
    return SimulationError(
        "E709",
        f"a process that ran schedules ended, at {chunk[0].aim} or soon after",
        "killed, out of memory, or ended by what it ran; with -j 1 it is seen where",
    )


def _chunks(attempts: Iterable[Attempt]) -> Iterator[list[Attempt]]:
    rest = iter(attempts)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _begin(simulation: Simulation) -> None:
    _of_this_process[:] = [simulation]
    interception.prepare()
    gc.freeze()  # as `runs` does where nobody has, which would be for each chunk
    gc.disable()


def _chunk(attempts: list[Attempt]) -> Ended | tuple[str, str, str]:
    """Run some attempts in a process of the pool; an error as what makes it again: ours cannot be pickled."""
    try:
        return list(runs(_of_this_process[0], attempts))
    except SimulationError as error:
        return error.code, error.message, error.hint
