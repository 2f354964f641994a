"""What each link from service to service keeps, with these settings on this server.

Invariant: nothing is promised that a setting of the live server takes away. Read next: live.py, doctor.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from trunkline.channel import Channel
from trunkline.cli.actions import one_place
from trunkline.clock import system_clock
from trunkline.config import Settings
from trunkline.inspection import Finding
from trunkline.service import System
from trunkline.store import Store
from trunkline.topology import EVERY, describe
from trunkline.transport import Transport, load_adapter


class LinkPromise(msgspec.Struct, frozen=True):
    """What holds between one publisher and one handler.

    Attributes:
        sender: service, or `outside`.
        kind: of the channel.
        guarantee: what is kept now. limit: what is not. next_step: what would lift the limit.
    """

    sender: str
    channel: str
    kind: str
    receiver: str
    guarantee: str
    limit: str
    next_step: str


def promises(system: System, settings: Settings, findings: Sequence[Finding]) -> list[LinkPromise]:
    """Return what each link keeps.

    Args:
        findings: what the live servers told.
    """
    transport: Transport = load_adapter("trunkline.transports", settings.transport, system_clock)
    store: Store = load_adapter("trunkline.stores", settings.store, system_clock)
    topology = describe(system)
    channels = {handler.channel.name: handler.channel for service in system.services for handler in service.handlers}
    links: list[tuple[str, str, str]] = []
    for link in topology.handles:
        names = channels[link.channel].types if link.message == EVERY else (link.message,)
        for name in names:
            senders, _ = topology.ends(link.channel, name)
            links += [(sender, link.channel, link.service) for sender in senders or ("outside",)]
    return [
        LinkPromise(
            sender, name, channels[name].kind, receiver,
            _guarantee(channels[name], transport, store, settings), *_limit(name, transport, store, findings),
        )
        for sender, name, receiver in dict.fromkeys(links)
    ]  # fmt: skip


def _guarantee(channel: Channel, transport: Transport, store: Store, settings: Settings) -> str:
    capabilities = transport.capabilities
    parts = []
    if not capabilities.durable:
        parts.append("lost when the process ends")
    elif one_place(settings):
        parts.append("effects once: one commit")
    elif store.remembers:
        parts.append("effects once: outbox, inbox")
    else:
        parts.append("at least once: effects may happen twice")
    if channel.kind == "stream":
        parts.append(f"in order per {channel.key}" if channel.key and capabilities.ordered_streams else "kept in a log")
    elif channel.kind == "queue":
        urgent = getattr(channel, "priority", False) and capabilities.priority
        parts.append("by priority" if urgent else "first come, first served")
    else:
        parts.append("once per subscription")
    return "; ".join(parts)


def _limit(channel: str, transport: Transport, store: Store, findings: Sequence[Finding]) -> tuple[str, str]:
    """Return what is not kept, and what would lift that."""
    capabilities = transport.capabilities
    if not capabilities.processes:
        return "one process, not durable", "sqlite:///… keeps messages on disk and lets processes share them"
    if "SQLite" in capabilities.description:
        return "one machine, one disk", "a broker or PostgreSQL carries them between machines"
    ours = [finding for finding in findings if finding.channel in ("", channel)]
    lost = list(dict.fromkeys(finding.loses for finding in ours if finding.loses))
    steps = [finding.change for finding in ours if finding.loses and finding.change]
    if not store.remembers:
        lost.insert(0, "the memory of what was handled, when a process ends (none: has no inbox)")
        steps.insert(0, "a store: sqlite:///… or postgresql://…")
    return f"can be lost: {'; '.join(lost)}" if lost else "", "; ".join(dict.fromkeys(steps))
