"""A tape as a file: what repeats a failure on another day, and what it was.

Read next: campaign.py.
"""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec

from trunkline import __version__
from trunkline.errors import ConfigurationError
from trunkline.testing.simulator.tape import Tape
from trunkline.testing.simulator.world import Result

FORMAT = 1


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """A failure on a tape.

    Attributes:
        target: what was simulated: `shop:simulation`, or a test such as `tests/test_shop.py::test_orders`.
        broker: whose promises the simulated one kept.
        promise: what was broken. text: how.
        found: in which run it was found, such as `crash payment before step 17 of 54`.
        tape: repeats it.
        trunkline, python: versions that made the tape.
        format: of the file.
    """

    target: str
    broker: str
    promise: str
    text: str
    found: str
    tape: Tape
    trunkline: str = __version__
    python: str = platform.python_version()
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    def remarks(self, result: Result) -> list[str]:
        """Return what may let a run of the tape come out otherwise than when it was made."""
        missing = self.tape.size() - result.tape.size()
        changed = [
            f"{missing} of {self.tape.size()} decisions on the tape were not reached: the services take other steps"
        ]
        now = {"trunkline": __version__, "python": platform.python_version()}
        return (changed if missing > 0 else []) + [
            f"the tape was made with {name} {getattr(self, name)}, and this is {version}"
            for name, version in now.items()
            if getattr(self, name) != version
        ]


def load(path: Path) -> Recording:
    """Read a tape.

    Raises: ConfigurationError E711 if it is none.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Recording)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigurationError("E711", f"{path} is no tape: {error}", "name a file that a failure wrote") from error
    if found.format != FORMAT:
        raise ConfigurationError(
            "E711", f"{path} is a tape of format {found.format}", f"this version reads {FORMAT}; find the failure again"
        )
    return found
