"""The transports under test, and how each is set up: one place to turn one on."""

import asyncio
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from tests import brokers
from tests.conformance import foreign, rotation
from trunkline.testing.conformance import Bench, Case, Controls
from trunkline.testing.hostname import NAME


@dataclass(frozen=True)
class Setup:
    """How a transport is tested.

    Attributes:
        scheme: of its URL.
        broker: its name for scripts/brokers, with a label, for the suite restarts and kills it; None needs no server.
        signed_in: the same for one that asks for a password.
        named: the same for one that tells clients its host name; None where clients are told no address.
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
    signed_in: str | None = None
    named: str | None = None


KNOWN = {
    "memory": Setup("memory", store=None),
    "sqlite": Setup("sqlite", store=None),
    "rabbitmq": Setup(
        "amqp", "rabbitmq@suite", setting="quorum queues, publisher confirms", signed_in="rabbitmq@suite-faults"
    ),
    "kafka": Setup(
        "kafka", "kafka@suite", setting="one node, `acks=all`, idempotence",
        signed_in="kafka:sasl@suite-faults", named="kafka:named@suite-faults",
    ),
    "nats": Setup(
        "nats", "nats@suite", options="lease_s=2", setting="JetStream, one node, file storage",
        signed_in="nats:password@suite-faults",
    ),
    "redis": Setup(
        "redis", "redis@suite", options="lease_s=2&timeout_s=10", setting="AOF, `appendfsync always`",
        signed_in="redis@suite-faults",
    ),
    "postgres": Setup(
        "postgresql", "postgres@suite", None, "lease_s=2", setting="`synchronous_commit=on`",
        signed_in="postgres:password@suite-faults",
    ),
}  # fmt: skip

# What is tested: a transport that is here must pass.
ON = ("memory", "sqlite", "redis", "nats", "rabbitmq", "kafka", "postgres")

TRANSPORTS = {name: KNOWN[name] for name in ON}


def broker_of(setup: Setup, case: Case | None) -> str | None:
    """The broker a case works on: one that is killed has few channels, for it reads them all when it comes back."""
    needs = set() if case is None else set(case.needs)
    if "rotate" in needs:
        return setup.signed_in
    if "name" in needs and setup.named is not None:
        return setup.named
    if setup.broker is not None and {"kill", "restart"} & needs:
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

    return Controls(
        restart, kill, resume, foreign.PUBLISHERS.get(setup.scheme),
        rotate=partial(rotation.ROTATIONS[setup.scheme], name, rotation.USER) if name == setup.signed_in else None,
        name=NAME if name == setup.named else None,
    )  # fmt: skip


async def make_bench(setup: Setup, folder, case: Case | None = None) -> Bench:
    """Return a bench on a transport; its broker runs then."""
    url, broker = f"{setup.scheme}:", broker_of(setup, case)
    if broker is not None:
        url = await asyncio.to_thread(brokers.broker_url, broker)
        if case is not None and "rotate" in case.needs:
            url = await signed_in(setup, broker, url)
        if setup.options:
            url += ("&" if "?" in url else "?") + setup.options
    return Bench(url, setup.store, folder=folder, controls=controls(setup, broker), slow=setup.slow)


async def signed_in(setup: Setup, broker: str, url: str) -> str:
    """Return the URL of a user of the suite's own, whose password is known: a run before may have ended halfway."""
    await rotation.ROTATIONS[setup.scheme](broker, rotation.USER, rotation.PASSWORD)
    parts = urlsplit(url)
    places = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{rotation.USER}:{rotation.PASSWORD}@{places}").geturl()
