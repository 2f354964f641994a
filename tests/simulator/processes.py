"""Workers of the conformance suite as simulated processes: started, killed, stopped and asked like real ones."""

import asyncio
import signal

from trunkline.testing.effects import EffectTable
from trunkline.testing.ledger import Entry, Kind
from trunkline.testing.processes import ProcessError
from trunkline.testing.simulator.loop import Lane
from trunkline.testing.simulator.world import NodeClock
from trunkline.testing.worker import Host, app_of


class SimulatedProcess:
    """Has the interface of trunkline.testing.processes.Process."""

    numbers = iter(range(1, 1_000_000))

    def __init__(self, world, plan):
        self._world = world
        self.pid = next(self.numbers)
        self._lane = Lane(f"{plan.name}-{self.pid}", self.pid, world, plan.name)
        self._said = []
        self._code = None
        clock = NodeClock(world, self._lane)
        self._app = app_of(plan, Host(clock, self._said.append, lambda: self.pid))
        self._task = world.spawn(self._lane, self._serve())

    async def _serve(self):
        await self._app.start()
        await self._app.ended()

    def alive(self):
        if self._code is None and self._task.done():
            self._code = 1
        return self._code is None

    def said(self, text):
        return text in self._said

    async def line(self, text, within_s=30.0):
        async with asyncio.timeout(within_s):
            while not self.said(text):
                if not self.alive():
                    raise ProcessError(f"ended before {text!r}")
                await asyncio.sleep(0.01)

    def send(self, number):
        if number is signal.SIGTERM:
            self._world.loop.call_in(self._lane, self._begin_stop)
        elif number is signal.SIGCONT:
            self._world.loop.resume(self._lane)
        else:
            raise ProcessError(f"no {number!r} here")

    async def freeze(self):
        self._world.pause(self._lane)

    def _begin_stop(self):
        self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(self._end())

    async def _end(self):
        await self._app.stop()
        self._code = 0

    async def wait(self, within_s=30.0):
        async with asyncio.timeout(within_s):
            while self.alive():
                await asyncio.sleep(0.01)
        return self._code

    async def kill(self):
        self.close()

    async def stop(self, within_s=30.0):
        self.send(signal.SIGTERM)
        if (code := await self.wait(within_s)) != 0:
            raise ProcessError(f"exit code {code}: {self.tail()}")

    def tail(self):
        return str(self._task)

    def close(self):
        if self.alive():
            self._code = -9
            self._world.crash(self._lane)


class SimulatedTable(EffectTable):
    """The effects on the disks of a world."""

    def __init__(self, world, name):
        super().__init__("sim:", name)
        self._world = world

    async def read(self):
        query = f"SELECT producer, key, seq FROM {self.name} ORDER BY n"
        exists = "SELECT 1 FROM sqlite_schema WHERE name = ?"
        rows = [row for disk in self._world.disks() if disk.rows(exists, (self.name,)) for row in disk.rows(query, ())]
        return [Entry(Kind.EFFECT, producer, key, seq) for producer, key, seq in rows]
