"""Outside services that handlers reach over HTTP, with an `httpx.AsyncClient`.

Invariant: no socket is opened; each request crosses the simulated network once, and what httpx raises where a real
network fails is raised here. Read next: outside.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from trunkline.testing.simulator.outside import Reply, exchange

if TYPE_CHECKING:
    from trunkline.testing.simulator.loop import Lane
    from trunkline.testing.simulator.world import World


class HttpService:
    """An outside service that answers HTTP requests; derive from it, write `answer`, and override the client with it.

    Attributes:
        base_url: before which paths of requests are put, as for `httpx.AsyncClient`.
    """

    base_url = ""

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Return the answer to a request; its body is there (`request.content`).

        Raises: anything: it is answered with status 500.
        """
        raise NotImplementedError

    def simulated_client(self, world: World, lane: Lane, name: str) -> httpx.AsyncClient:
        """Return the client of one process."""
        return httpx.AsyncClient(transport=_SimulatedHttp(self, world, lane, name), base_url=self.base_url)


class _SimulatedHttp(httpx.AsyncBaseTransport):
    def __init__(self, service: HttpService, world: World, lane: Lane, name: str) -> None:
        self._service = service
        self._world = world
        self._lane = lane
        self._name = name

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; see httpx."""
        await request.aread()

        def act(reply: Reply) -> None:
            try:
                response = self._service.answer(request)
            except Exception as error:  # noqa: BLE001 - as a server would
                response = httpx.Response(500, text=f"{type(error).__name__}: {error}")
            response.request = request
            reply(response, None)

        what = f"{request.method} {request.url.path}"
        self._world.loop.mix(f"{self._lane.name} asks {self._name}: {what}", request.content)
        response: httpx.Response = await exchange(
            self._world, self._lane, self._name, what, act, httpx.ConnectError, httpx.ReadError
        )
        return response
