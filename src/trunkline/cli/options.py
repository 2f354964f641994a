"""Arguments and options that several commands share.

Read next: commands.py.
"""

from __future__ import annotations

from typing import Annotated

import typer

from trunkline.cli import completion

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
    ),
]
OnlyType = Annotated[
    str | None,
    typer.Option(
        "--type", metavar="TYPE", help="Only messages of this type, such as order.created.", show_default=False
    ),
]
