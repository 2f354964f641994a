"""What is outside of a simulated system: services that its handlers call, and requests from its users.

An outside service is a plain class with plain methods; in a handler each of them is awaited and crosses the simulated
network, where the question or its answer may get lost. Read next: simulation.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from trunkline.testing.simulator.loop import Lane
from trunkline.testing.simulator.network import DELAYS_S, LATENCIES_S

if TYPE_CHECKING:
    from trunkline.testing.simulator.world import World

_encode = msgspec.json.Encoder(order="deterministic", enc_hook=lambda each: type(each).__qualname__).encode

Reply = Callable[[Any, BaseException | None], None]


class Outside:
    """One outside service in one run.

    Args:
        service: the object whose methods are called, at once and one after the other.
        name: for people.
    """

    def __init__(self, world: World, name: str, service: Any) -> None:
        self.world = world
        self.name = name
        self.service = service

    def seen_by(self, lane: Lane) -> Any:
        """Return what a process calls: an HTTP client for a service that has one, else its methods to be awaited."""
        client = getattr(self.service, "simulated_client", None)
        return Seen(self, lane) if client is None else client(self.world, lane, self.name)


class Seen:
    """An outside service as a process sees it: each method of it, to be awaited.

    A call raises what the method raises, or `unreachable` of the service (default ConnectionError) where the network
    fails: it was done or not.
    """

    def __init__(self, outside: Outside, lane: Lane) -> None:
        self._outside = outside
        self._lane = lane

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._outside.service, name)
        world, place = self._outside.world, self._outside.name
        unreachable = getattr(self._outside.service, "unreachable", ConnectionError)

        def call(*args: Any, **named: Any) -> Awaitable[Any]:
            def act(reply: Reply) -> None:
                try:
                    result = method(*args, **named)
                except Exception as error:  # noqa: BLE001 - its answer
                    reply(None, error)
                else:
                    if world.events is not None:
                        given = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in named.items())])
                        world.note(self._lane.name, "outside", f"{name}({given})", place)
                    reply(result, None)

            world.loop.mix(f"{self._lane.name} asks {place}.{name}", _plain([*args, named]))
            return exchange(world, self._lane, place, name, act, unreachable)

        return call


def _plain(arguments: list[Any]) -> bytes:
    """Return arguments as JSON, without addresses or the order of sets; nothing for what has no such form."""
    try:
        return _encode(arguments)
    except (TypeError, ValueError):
        return b""


async def exchange(
    world: World,
    lane: Lane,
    place: str,
    what: str,
    act: Callable[[Reply], None],
    unreachable: type[Exception],
    unanswered: type[Exception] | None = None,
) -> Any:
    """Ask once and wait for the answer.

    Args:
        act: done at the other end; calls what it is given with the result, or the error, when it is ready.
    Raises: `unreachable` if the question got lost, `unanswered` (default: the same) if the answer did; the error that
        is answered.
    """
    loop, faults = world.loop, world.faults
    answer = loop.create_future()
    where = f"{lane.name} → {place}: {what}"

    def took() -> float:
        seconds = world.latency(lane.name, LATENCIES_S)
        if faults.happens("delay", where):
            seconds += faults.choose("delay", DELAYS_S)
        return seconds

    def arrive() -> None:
        world.sent(lane.name, place, where)
        act(reply)

    def reply(result: Any, error: BaseException | None) -> None:
        if faults.happens("answer_lost", where):
            result, error = None, (unanswered or unreachable)(f"{where}: no answer; it was done or not")
        loop.call_on_host(took(), end, result, error)

    def end(result: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    if faults.happens("outside_error", where):
        loop.call_on_host(took(), end, None, unreachable(f"{where}: not reached"))
    else:
        loop.call_on_host(took(), arrive)
    return await answer
