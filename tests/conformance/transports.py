"""The transports under test, and how each is set up: one place to turn one on."""

import asyncio
from dataclasses import dataclass

from tests import brokers
from tests.conformance import foreign
from trunkline.testing.conformance import Bench, Case, Controls


@dataclass(frozen=True)
class Setup:
    """How a transport is tested.

    Attributes:
        scheme: of its URL.
        broker: its name for scripts/brokers, with a label, for the suite restarts and kills it; None needs no server.
        store: URL; None takes the transport's own.
        options: of the URL.
        setting: of the broker, for the support matrix.
        slow: patience: each deadline is so many times longer.
    """

    scheme: str
    broker: str | None = None
    store: str | None = "sqlite:///store.db"
    options: str = ""
    setting: str = ""
    slow: float = 1.0


KNOWN = {
    "memory": Setup("memory", store=None),
    "sqlite": Setup("sqlite", store=None),
    "rabbitmq": Setup("amqp", "rabbitmq@suite", setting="quorum queues, publisher confirms"),
    "kafka": Setup("kafka", "kafka@suite", setting="one node, `acks=all`, idempotence"),
    "nats": Setup("nats", "nats@suite", options="lease_s=2", setting="JetStream, one node, file storage"),
    "redis": Setup("redis", "redis@suite", options="lease_s=2", setting="AOF, `appendfsync always`"),
    "postgres": Setup("postgresql", "postgres@suite", None, "lease_s=2", setting="`synchronous_commit=on`"),
}

# What is tested: a transport that is here must pass.
ON = ("memory", "sqlite", "redis", "nats", "rabbitmq", "kafka", "postgres")

TRANSPORTS = {name: KNOWN[name] for name in ON}


def broker_of(setup: Setup, case: Case | None) -> str | None:
    """The broker a case works on: one that is killed has few channels, for it reads them all when it comes back."""
    if setup.broker is not None and case is not None and {"kill", "restart"} & set(case.needs):
        return f"{setup.broker}-faults"  # its own: other tests stop @faults, on another worker at the same time
    return setup.broker


def controls(setup: Setup, name: str | None) -> Controls:
    """What the suite may do to the broker of a setup."""
    if name is None:
        return Controls()

    async def restart() -> None:
        await asyncio.to_thread(brokers.restart, name)

    async def kill() -> None:
        await asyncio.to_thread(brokers.kill, name)

    async def resume() -> None:
        await asyncio.to_thread(brokers.resume, name)

    return Controls(restart, kill, resume, foreign.PUBLISHERS.get(setup.scheme))


async def make_bench(setup: Setup, folder, case: Case | None = None) -> Bench:
    """Return a bench on a transport; its broker runs then."""
    url, broker = f"{setup.scheme}:", broker_of(setup, case)
    if broker is not None:
        url = await asyncio.to_thread(brokers.broker_url, broker)
        if setup.options:
            url += ("&" if "?" in url else "?") + setup.options
    return Bench(url, setup.store, folder=folder, controls=controls(setup, broker), slow=setup.slow)
