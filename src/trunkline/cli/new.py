"""`trunkline new`: a project that runs and passes its own tests.

Invariant: nothing that exists is overwritten. Read next: skeleton.py.
"""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from trunkline.errors import ConfigurationError

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits, - and _; also the folder.")],
    *,
    folder: Annotated[Path, typer.Option("--in", metavar="FOLDER", help="Where to make it.")] = Path(),
) -> None:
    """Make a project that runs.

    It has a service with a handler and a table, tests, settings and a README. It runs with `trunkline run`
    and is tested with `pytest`, both in the new folder.
    """
    from trunkline.cli.skeleton import files

    module = name.replace("-", "_")
    taken = keyword.iskeyword(module) or module in sys.stdlib_module_names or module in {"trunkline", "pytest", "tests"}
    if not _NAME.fullmatch(name) or len(name) > 60:  # noqa: PLR2004 - room for what channels add
        raise ConfigurationError(
            "E218",
            f"project name {name[:80]!r} does not fit",
            "use lower-case letters, digits, - and _, beginning with a letter, such as order-desk",
        )
    if taken:
        why = "a word of Python" if keyword.iskeyword(module) else "the name of a Python module"
        raise ConfigurationError("E218", f"project name {name!r} is {why}", f"use another, such as {name}-service")
    place = folder / name
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigurationError("E219", f"{place} exists", "use another name; nothing was written")
    try:
        for path, text in files(name, module).items():
            target = place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            typer.echo(f"  {target}")
    except OSError as error:
        raise ConfigurationError(
            "E219", f"{error.filename} cannot be written: {error.strerror}", "choose another folder"
        ) from error
    typer.echo(f"\ncd {place} && trunkline run")
