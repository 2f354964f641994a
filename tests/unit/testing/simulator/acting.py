"""A system of one service that does what a test gives it to do, in a simulated process.

Read next: test_interception.py.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from trunkline import Queue, Service, Struct, System
from trunkline.testing.simulator import Result, Simulation, Tape, World

on_loop = Queue("on-loop")
in_thread = Queue("in-thread")


@on_loop.command
class Act(Struct):
    number: int


@in_thread.command
class ActInThread(Struct):
    number: int


class Acting:
    """Runs `function` in a handler.

    Attributes:
        given: what the function returned, each time.
    """

    def __init__(self, function: Callable[[], Any], *, threaded: bool = False, **options: Any) -> None:
        self.given: list[Any] = []
        service, command = Service("actor"), ActInThread if threaded else Act

        @service.handle
        async def act(message: Act) -> None:
            result = function()
            self.given.append(await result if asyncio.iscoroutine(result) else result)

        @service.handle
        def act_in_thread(message: ActInThread) -> None:
            self.given.append(function())

        async def workload(client: Any) -> None:
            await client.publish(command(1))

        self.simulation = Simulation(System("acting", [service]), workload, **options)

    def run(self, seed: int = 0, tape: Tape | None = None) -> Result:
        """Make one run."""
        return World(self.simulation, tape or Tape(seed=seed), random=False).run()


def seen(function: Callable[[], Any], seed: int = 0, **options: Any) -> Any:
    """Return what `function` returns in a simulated process."""
    acting = Acting(function, **options)
    result = acting.run(seed)
    assert result.violations == []
    return acting.given[0]
