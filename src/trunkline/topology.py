"""The topology of a system: who publishes what where and who handles it, from types alone.

Invariant: nothing is connected and no handler runs; the same declarations give the same drawing.
Read next: cli/topology.py, cli/drawing.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from trunkline.channel import Channel, message_type
from trunkline.service import Service, System

EVERY = "every message"
"""What stands for the type of a handler that takes Message."""


class Link(msgspec.Struct, frozen=True):
    """One type of message between a service and a channel.

    Attributes:
        message: CloudEvents type.
        handler: `module.function`; of a publication it may be a background function.
        subscription: name of the reader; empty for a publication.
    """

    service: str
    channel: str
    message: str
    handler: str
    subscription: str = ""


class ChannelNode(msgspec.Struct, frozen=True):
    """A channel with the types declared on it, by name and version."""

    name: str
    kind: str
    key: str | None
    partitions: int | None
    types: dict[str, int]


class ServiceNode(msgspec.Struct, frozen=True):
    """A service.

    Attributes:
        resources: types it provides to its handlers.
        background: functions that run beside the handlers, `module.function`; what they publish is known as far as
            `background(publishes=...)` says it.
    """

    name: str
    resources: list[str]
    background: list[str]


class Topology(msgspec.Struct, frozen=True):
    """A system taken apart."""

    system: str
    services: list[ServiceNode]
    channels: list[ChannelNode]
    publishes: list[Link]
    handles: list[Link]

    def ends(self, channel: str, message: str) -> tuple[list[str], list[str]]:
        """Return (services that publish, services that handle) a type of a channel."""
        senders = dict.fromkeys(
            link.service for link in self.publishes if (link.channel, link.message) == (channel, message)
        )
        takers = dict.fromkeys(
            link.service for link in self.handles if link.channel == channel and link.message in (message, EVERY)
        )
        return list(senders), list(takers)


def describe(system: System) -> Topology:
    """Return the topology of `system`."""
    publishes: list[Link] = []
    handles: list[Link] = []
    channels: dict[str, Channel] = {}
    for service in system.services:
        for handler in service.handlers:
            channels.setdefault(handler.channel.name, handler.channel)
            reader, channel_name = service.reader_of(handler)
            names = [declared.name for declared in handler.types] or [EVERY]
            handles += [Link(service.name, channel_name, name, handler.name, reader) for name in names]
            publishes += _publications(service, handler.name, handler.gives, channels)
        for background in service.backgrounds:
            publishes += _publications(service, background.name, background.gives, channels)
    return Topology(
        system.name,
        [_service(service) for service in system.services],
        [_channel(channel) for channel in channels.values()],
        list(dict.fromkeys(publishes)),  # a function that is declared several times publishes each type once
        handles,
    )


def _publications(
    service: Service, function: str, gives: Iterable[type], channels: dict[str, Channel]
) -> Iterator[Link]:
    """Yield what a function publishes; add where it goes to `channels`."""
    for declared in filter(None, map(message_type, gives)):
        channels.setdefault(declared.channel.name, declared.channel)
        yield Link(service.name, declared.channel.name, declared.name, function)


def _service(service: Service) -> ServiceNode:
    return ServiceNode(
        service.name,
        [getattr(cls, "__name__", repr(cls)) for cls in service.factories],
        [background.name for background in service.backgrounds],
    )


def _channel(channel: Channel) -> ChannelNode:
    types = {declared.name: declared.version for declared in channel.types.values()}
    return ChannelNode(channel.name, channel.kind, channel.key, getattr(channel, "partitions", None), types)


def edges(links: Iterable[Link]) -> dict[tuple[str, str], list[str]]:
    """Return (service, channel) → messages between them, each once, in order."""
    found: dict[tuple[str, str], list[str]] = {}
    for link in links:
        messages = found.setdefault((link.service, link.channel), [])
        if link.message not in messages:
            messages.append(link.message)
    return found


_SHAPES = {"queue": ("[[", "]]"), "topic": ("{{", "}}"), "stream": ("([", "])")}


def to_mermaid(topology: Topology) -> str:
    """Return a Mermaid flowchart: services as boxes, channels by kind, messages on the arrows."""
    lines = ["flowchart LR"]
    services = {node.name: f"s{number}" for number, node in enumerate(topology.services)}
    channels = {node.name: f"c{number}" for number, node in enumerate(topology.channels)}
    lines += [f'    {services[node.name]}["{node.name}"]' for node in topology.services]
    for channel in topology.channels:
        opening, closing = _SHAPES[channel.kind]
        lines.append(f'    {channels[channel.name]}{opening}"{channel.name}<br/><i>{channel.kind}</i>"{closing}')
    for (service, name), messages in edges(topology.publishes).items():
        lines.append(f'    {services[service]} -- "{"<br/>".join(messages)}" --> {channels[name]}')
    for (service, name), messages in edges(topology.handles).items():
        lines.append(f'    {channels[name]} -- "{"<br/>".join(messages)}" --> {services[service]}')
    return "\n".join(lines) + "\n"
