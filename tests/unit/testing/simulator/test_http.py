"""Outside services over HTTP."""

import httpx

from trunkline import Context, Queue, Service, Struct
from trunkline.testing.simulator import HttpService, Simulation, Tape, World

jobs = Queue("http-jobs")


@jobs.command
class Fetch(Struct):
    number: int


service = Service("fetcher")
service.provide(httpx.AsyncClient, httpx.AsyncClient)


@service.handle
async def fetch(job: Fetch, client: httpx.AsyncClient, ctx: Context) -> None:
    response = await client.post("/numbers", json={"number": job.number, "id": ctx.message.id})
    response.raise_for_status()


class Numbers(HttpService):
    base_url = "https://numbers.example"

    def __init__(self):
        self.got = []
        self.asked = 0

    def answer(self, request):
        assert request.url.host == "numbers.example"
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("not yet")
        self.got.append(request.content)
        return httpx.Response(201)


async def two_jobs(sim):
    for number in (1, 2):
        await sim.publish(Fetch(number))


def make_world(tape):
    simulation = Simulation(service, two_jobs, override={httpx.AsyncClient: Numbers})
    return World(simulation, tape, random=False)


def test_a_request_crosses_the_simulated_network_and_an_error_of_the_service_is_its_status():
    world = make_world(Tape())
    result = world.run()
    assert not result.violations
    assert len(world.outside_of(httpx.AsyncClient).service.got) == 2


def test_an_answer_that_gets_lost_is_asked_for_again_and_was_done():
    world = make_world(Tape({"answer_lost": {1: 1}}))
    result = world.run()
    assert not result.violations
    assert result.fired == {"answer_lost": 1}
    assert len(world.outside_of(httpx.AsyncClient).service.got) == 3
