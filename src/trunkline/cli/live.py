"""Live brokers and databases as an operator sees them, through their inspectors.

Invariant: an inspector is always closed; a server that cannot be reached is a finding, not an end.
Read next: ../inspection.py, doctor.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Sequence

import msgspec

from trunkline.app import channels_of, known_channels, plans_of
from trunkline.channel import Channel
from trunkline.cli.actions import one_place
from trunkline.cli.checks import Check
from trunkline.cli.embedded import SubscriptionBacklog, open_transport, standing
from trunkline.cli.letters import opened_letters
from trunkline.cli.target import load_target
from trunkline.clock import system_clock
from trunkline.config import Settings
from trunkline.errors import ConfigurationError, DefinitionError, TrunklineError
from trunkline.inspection import RUN_ON_IT, Finding, Inspector, left_over, load_inspector
from trunkline.service import System
from trunkline.store import SetAside, Store, dead_letter_queue
from trunkline.transport import Subscription, adapters, load_adapter, parse_address

_STATUS = {"kept": "ok", "weak": "warn", "unknown": "warn", "broken": "fail"}
WITHOUT = ("sqlite", "memory", "none")
"""What is no server: files are looked at as files."""


class Wanted(msgspec.Struct, frozen=True):
    """What a system has on its broker.

    Attributes:
        held_s: how long a message may stay unsettled.
    """

    channels: Sequence[Channel] = ()
    subscriptions: Sequence[Subscription] = ()
    held_s: float = 0.0


def wanted(system: System, store_url: str) -> Wanted:
    """Return what `system` has on its broker.

    Raises: DefinitionError; ConfigurationError for a store that is not there.
    """
    subscriptions = [subscription for _, subscription, _ in plans_of(system)]
    channels = channels_of(system)
    options = [handler.options for service in system.services for handler in service.handlers]
    held_s = max((math.inf if option.timeout_s is None else option.timeout_s for option in options), default=0.0)
    store: Store = load_adapter("trunkline.stores", store_url, system_clock)
    if not store.keeps:
        for subscription in subscriptions:
            queue = dead_letter_queue(subscription.name)
            channels.setdefault(queue.name, queue)
        held_s += max((option.retry.longest_s for option in options), default=0.0)
    return Wanted(list(channels.values()), subscriptions, held_s)


def named(settings: Settings) -> tuple[Wanted, Settings]:
    """Return what the named system has on its broker, and where that is: an App says so itself.

    Raises: ConfigurationError E210 to E214; DefinitionError.
    """
    target = load_target(settings)
    if target.app is not None:
        settings = Settings(target.app.transport_url, target.app.store_url, settings.app, settings.origin)
    return wanted(target.system, settings.store), settings


def channel_named(settings: Settings, name: str) -> tuple[Channel, str]:
    """Return the channel of that name of the named system, and the URL of its transport.

    Raises: ConfigurationError E210 to E214, E233; DefinitionError.
    """
    if settings.app is None:
        inspector_of(settings.transport)
    target = load_target(settings)
    channels = known_channels(target.system)
    for _, subscription, _ in plans_of(target.system):
        queue = dead_letter_queue(subscription.name)  # there where no store keeps dead letters
        channels.setdefault(queue.name, queue)
    if name not in channels:
        have = ", ".join(sorted(channels)) or "none"
        raise ConfigurationError("E233", f"{target.name} has no channel {name!r}", f"there are: {have}")
    return channels[name], settings.transport if target.app is None else target.app.transport_url


async def backlogs(settings: Settings) -> list[SubscriptionBacklog]:
    """Return how each subscription stands: of a file all that are in it, on a broker those of the named system.

    Raises: ConfigurationError or TransportError where one of the places cannot be looked into.
    """
    now = system_clock.now()
    if parse_address(settings.transport).scheme == "sqlite":
        with open_transport(settings) as file:
            return file.backlogs(await _set_aside(settings), now)
    if settings.app is None:
        inspector_of(settings.transport)
    found, settings = named(settings)
    labelled = {subscription.label: subscription for subscription in found.subscriptions} | _letters(found)
    async with inspecting(settings.transport) as inspector:
        counts = await inspector.look(list(labelled.values()))
    aside = await _set_aside(settings)
    return [
        standing(
            [label], subscription.channel.name, subscription.channel.kind,
            None if count is None else count.waiting,
            None if count is None else count.in_flight,
            None, aside, now,
        )
        for (label, subscription), count in zip(labelled.items(), counts, strict=True)
    ]  # fmt: skip


def _letters(found: Wanted) -> dict[str, Subscription]:
    """Return the Queues of dead letters that the system fills and does not read itself, by their names."""
    read = {subscription.channel.name for subscription in found.subscriptions}
    return {
        queue.name: Subscription(name, queue)
        for name in dict.fromkeys(subscription.name for subscription in found.subscriptions)
        if (queue := dead_letter_queue(name)).name in {channel.name for channel in found.channels} - read
    }


async def _set_aside(settings: Settings) -> dict[str, SetAside] | None:
    """Return what the store holds, or None if there is no store."""
    if parse_address(settings.store).scheme == "none":
        return None
    async with opened_letters(settings) as letters:
        return await letters.set_aside()


def inspector_of(url: str) -> Inspector:
    """Return what looks at the broker of `url`, not yet opened.

    Raises: ConfigurationError E230 if nothing can; E201, E202, E240 to E242, E249.
    """
    load_adapter("trunkline.transports", url, system_clock)
    inspector = load_inspector(url, system_clock)
    if inspector is None:
        raise ConfigurationError(
            "E230", f"{parse_address(url).shown} cannot be looked into from outside",
            "name an embedded file or a broker: --transport sqlite:///shop.db",
        )  # fmt: skip
    return inspector


@contextlib.asynccontextmanager
async def inspecting(url: str) -> AsyncIterator[Inspector]:
    """Open what looks at the broker of `url`.

    Raises: ConfigurationError E230 if nothing can; E240 to E248; TransportError E520.
    """
    inspector = inspector_of(url)
    await inspector.open()
    try:
        yield inspector
    finally:
        await inspector.close()


async def left_over_checks(settings: Settings) -> list[Check]:
    """Return a warning if the store's database holds messages that came there when it was the transport too."""
    if one_place(settings):
        return []
    try:
        found = await left_over(settings.store, system_clock)
    except TrunklineError:
        return []  # other checks say what is wrong with it
    area = f"store {parse_address(settings.store).shown}"
    return [Check(area, "left over", "warn", f"{found}; nobody reads them", RUN_ON_IT)] if found else []


def _installed(scheme: str) -> bool:
    return any(scheme in adapters(group) for group in ("trunkline.transports", "trunkline.stores"))


async def examine(settings: Settings, system: System | None) -> tuple[list[Check], list[Finding]]:
    """Return what the servers of transport and store tell, as checks and as they told it."""
    try:
        found = Wanted() if system is None else wanted(system, settings.store)
    except (DefinitionError, ConfigurationError):
        found = Wanted()  # other checks say what is wrong with it
    checks: list[Check] = []
    told: list[Finding] = []
    for url in dict.fromkeys((settings.transport, settings.store)):
        address = parse_address(url)
        if address.scheme in WITHOUT or not _installed(address.scheme):
            continue
        area = f"server {address.shown}"
        try:
            inspector = load_inspector(url, system_clock)
        except TrunklineError:
            continue  # so is this
        if inspector is None:
            checks.append(Check(area, "settings", "warn", "nothing that is installed can look at them"))
            continue
        here = found if url == settings.transport else Wanted()
        failed, findings = await _findings(inspector, area, here)
        checks += failed or _checks(area, findings)
        told += findings
    return checks, told


async def _findings(inspector: Inspector, area: str, found: Wanted) -> tuple[list[Check], list[Finding]]:
    try:
        await inspector.open()
        return [], await inspector.examine(found.channels, found.subscriptions, found.held_s)
    except TrunklineError as error:
        return [Check(area, "connection", "fail", f"{error.code} {error.message}", error.hint)], []
    finally:
        await inspector.close()


def _checks(area: str, findings: Sequence[Finding]) -> list[Check]:
    """Return findings as checks; what is the same for several channels is said once."""
    same: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        same.setdefault((finding.setting, finding.value, finding.verdict, finding.meaning, finding.change), []).append(
            finding
        )
    return [
        Check(area, setting, _STATUS[verdict], f"{_shown(value, alike)}: {meaning}", change)  # type: ignore[arg-type]
        for (setting, value, verdict, meaning, change), alike in same.items()
    ]


def _shown(value: str, alike: Sequence[Finding]) -> str:
    subjects = [finding.subject for finding in alike if finding.subject != "server"]
    many = 4
    if not subjects:
        return value
    more = f", {len(subjects) - many + 1} more" if len(subjects) > many else ""
    return f"{value} ({', '.join(subjects[: many - 1] if more else subjects)}{more})"
