"""Every transport passes the suite that we give to the writers of transports."""

import asyncio
from dataclasses import dataclass

import pytest

from tests import brokers
from tests.conformance import foreign
from trunkline.testing.conformance import Bench, Controls, cases, run_case


@dataclass(frozen=True)
class Setup:
    """How a transport is tested.

    Attributes:
        broker: its name for scripts/brokers; None needs no server.
        store: None takes the transport's own, `same` the transport's URL.
        options: of the URL.
    """

    broker: str | None = None
    store: str | None = "sqlite:///store.db"
    options: str = ""


# One line turns a transport on.
TRANSPORTS = {
    "memory": Setup(store=None),
    "sqlite": Setup(store=None),
}


def controls(setup: Setup, scheme: str) -> Controls:
    """What the suite may do to the broker of a setup: to one of its own, for others use the usual one."""
    if setup.broker is None:
        return Controls()

    async def restart() -> None:
        await asyncio.to_thread(brokers.restart, setup.broker)

    async def kill() -> None:
        await asyncio.to_thread(brokers.kill, setup.broker)

    async def resume() -> None:
        await asyncio.to_thread(brokers.resume, setup.broker)

    return Controls(restart, kill, resume, foreign.PUBLISHERS.get(scheme))


@pytest.fixture(params=TRANSPORTS)
async def bench(request, tmp_path):
    setup = TRANSPORTS[request.param]
    url = f"{request.param}:"
    if setup.broker is not None:
        url = await asyncio.to_thread(brokers.broker_url, setup.broker)
        url += ("&" if "?" in url else "?") + setup.options if setup.options else ""
    made = Bench(url, setup.store, folder=tmp_path, controls=controls(setup, request.param))
    async with made:
        yield made


@pytest.mark.timeout(150)
@pytest.mark.parametrize("case", cases(), ids=str)
async def test_conformance(case, bench):
    if reason := case.not_applicable(bench):
        pytest.skip(reason)
    await run_case(case, bench)
