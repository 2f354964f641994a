"""The simulated transports pass the suite that real ones pass, in virtual time."""

import pytest

from tests.simulator.processes import SimulatedProcess, SimulatedTable
from trunkline import Service
from trunkline.testing.conformance import Bench, Controls, cases, run_case
from trunkline.testing.simulator import Simulation, Tape, World, border
from trunkline.testing.simulator.broker import PROFILES


class SimulatedBench(Bench):
    def __init__(self, world, url, **options):
        super().__init__(url, url, **options)
        self.world = world
        self.table = SimulatedTable(world, f"effect_{self.tag}")

    async def effects_in(self, table):
        return await SimulatedTable(self.world, table).read()

    def launch(self, plan, log, knows=None):
        return SimulatedProcess(self.world, plan)


def broker_controls(world, sim):
    async def kill():
        world.stop_broker()

    async def resume():
        world.start_broker()

    async def restart():
        world.stop_broker()
        await sim.sleep(0.5)
        world.start_broker()

    return Controls(restart, kill, resume)


def run_simulated(case, profile, folder):
    """Run a case within a simulation; return why it does not apply, or None."""
    if case.name == "slow_consumer_bounded_memory":
        return "memory: the broker is in the same process here"
    reasons = []

    async def workload(sim):
        url = f"sim:{profile}"
        world = sim.clock.world
        controls = broker_controls(world, sim)
        bench = SimulatedBench(world, url, folder=folder, lease_s=1.0, clock=sim.clock, controls=controls)
        if reason := case.not_applicable(bench):
            reasons.append(reason)
            return
        async with bench:
            await run_case(case, bench)

    simulation = Simulation(Service("beside"), workload, broker=profile, lease_s=1.0, dead_letters=True)
    World(simulation, Tape(), random=False).run()
    return reasons[0] if reasons else None


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_simulated_conformance(case, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(border, "refused", lambda _event, _arguments: None)  # workers keep journals in files
    if reason := run_simulated(case, profile, tmp_path):
        pytest.skip(reason)
