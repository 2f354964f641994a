"""Stand-ins for outside services."""

from trunkline import Queue, Service, Struct
from trunkline.testing.simulator import Simulation, Tape, World

visits = Queue("outside-visits")


@visits.command
class Visit(Struct):
    name: str


class Bureau:
    async def client(self, name: str) -> None:
        raise NotImplementedError


class StandIn:
    def __init__(self):
        self.clients = []

    def client(self, name):
        self.clients.append(name)


service = Service("desk")
service.provide(Bureau, Bureau)


@service.handle
async def receive(visit: Visit, bureau: Bureau) -> None:
    await bureau.client(visit.name)


async def one_visit(sim):
    await sim.publish(Visit("Ada"))


def test_a_stand_in_may_have_a_method_of_any_name():
    world = World(Simulation(service, one_visit, override={Bureau: StandIn}), Tape(), random=False)
    assert not world.run().violations
    assert world.outside_of(Bureau).service.clients == ["Ada"]
