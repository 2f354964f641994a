"""Shell completion of names that only the file knows: channels and subscriptions.

Invariant: what cannot be read completes to nothing; a completion never writes, creates or prints.
Read next: embedded.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trunkline.errors import TrunklineError

if TYPE_CHECKING:
    from trunkline.cli.embedded import EmbeddedFile


def channels(incomplete: str) -> list[str]:
    """Return the channels in the file whose names begin so."""
    return _names(incomplete, lambda file: [channel.name for channel in file.channels()])


def subscriptions(incomplete: str) -> list[str]:
    """Return the subscriptions in the file whose labels begin so."""
    return _names(incomplete, lambda file: file.labels())


def _names(incomplete: str, read: Callable[[EmbeddedFile], list[str]]) -> list[str]:
    from trunkline.cli.embedded import open_file
    from trunkline.config import load_settings

    try:
        with open_file(load_settings().transport) as file:
            return [name for name in read(file) if name.startswith(incomplete)]
    except TrunklineError:
        return []
