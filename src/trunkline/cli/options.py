"""Arguments and options that several commands share.

Read next: commands.py.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from trunkline.cli import completion
from trunkline.errors import ConfigurationError

MOST = 2**53
"""Largest number that a command takes; all JSON readers have it exactly."""


def utf8(name: str, text: str) -> str:
    """Return an argument that is UTF-8; the system hands over other bytes as lone surrogates.

    Raises: ConfigurationError E226.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(text).decode("utf-8", "backslashreplace")
        raise ConfigurationError("E226", f"{name} {shown} is not UTF-8", "give it as UTF-8") from error
    return text


def as_utf8(param: typer.CallbackParam, value: str | None) -> str | None:
    """Check an option's text; see `utf8`."""
    return None if value is None else utf8(param.opts[0], value)


Target = Annotated[
    str | None,
    typer.Argument(
        metavar="MODULE:OBJECT",
        help="A System, Service or App, such as shop:system. Default: `app` in trunkline.toml.",
        show_default=False,
    ),
]
Transport = Annotated[
    str | None,
    typer.Option("--transport", "-t", metavar="URL", help="Transport, such as sqlite:///shop.db.", show_default=False),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store", "-s", metavar="URL", help="Store, where it is not the transport's database.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for scripts.")]
OnlySubscription = Annotated[
    str | None,
    typer.Option(
        "--subscription",
        metavar="NAME",
        help="Only of this subscription: payment, or payment@order-events.",
        show_default=False,
        autocompletion=completion.subscriptions,
        callback=as_utf8,
    ),
]
OnlyType = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="Only messages of this type, such as order.created.",
        show_default=False,
        callback=as_utf8,
    ),
]
