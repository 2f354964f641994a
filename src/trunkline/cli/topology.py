"""`trunkline topology`: what a system's types say, as text, Mermaid, SVG or JSON.

Read next: ../topology.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli import options
from trunkline.cli.target import load_target
from trunkline.cli.terminal import print_json, stdout
from trunkline.config import load_settings
from trunkline.errors import DefinitionError

if TYPE_CHECKING:
    from rich.tree import Tree

    from trunkline.service import System
    from trunkline.topology import Topology


class Format(StrEnum):
    """How a topology is written."""

    text = "text"
    mermaid = "mermaid"
    svg = "svg"


def topology(
    target: options.Target = None,
    *,
    form: Annotated[
        Format, typer.Option("--format", "-f", help="text for people, mermaid for Markdown, svg for documents.")
    ] = Format.text,
    as_json: options.AsJson = False,
) -> None:
    """Show services, channels and messages.

    They are read from the types alone: nothing is connected or started.
    """
    from trunkline.topology import describe, to_mermaid

    system = load_target(load_settings(app=target)).system
    _warn(system)
    found = describe(system)
    if as_json:
        print_json(found)
    elif form is Format.mermaid:
        typer.echo(to_mermaid(found), nl=False)
    elif form is Format.svg:
        from trunkline.cli.drawing import to_svg

        typer.echo(to_svg(found), nl=False)
    else:
        _write(found)


def _warn(system: System) -> None:
    """Say on stderr when these declarations cannot run; they can be drawn all the same."""
    try:
        system.check()
    except DefinitionError as error:
        typer.secho(f"warning: this cannot run: {error}", fg="yellow", err=True)


def _write(found: Topology) -> None:
    console = stdout()
    console.print(_services(found))
    console.print()
    console.print(_channels(found))


def _channels(found: Topology) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text("channels", style="bold"), guide_style="dim")
    for channel in found.channels:
        partitions = f", {channel.partitions} partitions" if channel.partitions else ""
        key = f", key {channel.key}" if channel.key else ""
        node = tree.add(Text.assemble((channel.name, "bold cyan"), (f"  {channel.kind}{partitions}{key}", "dim")))
        width = max(map(len, channel.types), default=0)
        for name in channel.types:
            senders, takers = found.ends(channel.name, name)
            node.add(
                Text.assemble(
                    f"{name:<{width}}  ",
                    (", ".join(senders) or "(outside)", "" if senders else "yellow"),
                    " → ",
                    (", ".join(takers) or "(nobody)", "" if takers else "yellow"),
                )
            )
    return tree


def _services(found: Topology) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(found.system, style="bold"), guide_style="dim")
    for service in found.services:
        node = tree.add(Text(service.name, style="bold cyan"))
        handles = [link for link in found.handles if link.service == service.name]
        for handler, channel, subscription in dict.fromkeys(
            (link.handler, link.channel, link.subscription) for link in handles
        ):
            takes = [
                link.message
                for link in handles
                if (link.handler, link.channel, link.subscription) == (handler, channel, subscription)
            ]
            text = Text(", ".join(dict.fromkeys(takes)))
            text.append(f"  from {_kind(found, channel)} {channel}", "dim")
            if subscription != service.name:
                text.append(f" as {subscription}", "dim")
            text.append(f"  {handler.rpartition('.')[2]}()", "green")
            _add_publications(node.add(text), found, service.name, handler)
        for background in service.background:
            text = Text.assemble((f"{background.rpartition('.')[2]}()", "green"), ("  in the background", "dim"))
            _add_publications(node.add(text), found, service.name, background)
    return tree


def _add_publications(branch: Tree, found: Topology, service: str, function: str) -> None:
    from rich.text import Text

    for link in found.publishes:
        if (link.service, link.handler) == (service, function):
            to = f"  to {_kind(found, link.channel)} {link.channel}"
            branch.add(Text.assemble("→ ", link.message, (to, "dim")))


def _kind(found: Topology, name: str) -> str:
    return next(channel.kind for channel in found.channels if channel.name == name)
