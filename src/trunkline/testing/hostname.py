"""A host name that processes of a test resolve or not, as the test says, whatever resolves it in them: Python or C.

Each runs in a mount namespace with a hosts file of its own and no name server, so the system's own resolver answers.
Needs Linux and `unshare` (util-linux), as root or where user namespaces are allowed. Read next: processes.py.
Source: RFC 6761 §6.2 for names under `.test`.
"""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

NAME = "broker.test"
_HOSTS = Path("/etc/hosts")
# The last file is there on most machines; without it the resolver asks 127.0.0.1 anyway.
_MOUNT = (
    'mount --bind "$1" /etc/hosts && { [ ! -e /etc/resolv.conf ] || mount --bind "$2" /etc/resolv.conf; }'
    ' && shift 2 && exec "$@"'
)


class HostName:
    """A name for `address`, not known at first.

    Args:
        folder: for the files that its processes see; no other name may be in it.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name = name
        self._hosts, self._servers = folder / "hosts", folder / "resolv.conf"
        folder.mkdir()
        others = [line for line in _HOSTS.read_text().splitlines() if name not in line.split()]
        self._hosts.write_text("\n".join([f"#{address} {name}", *others, ""]))
        self._servers.write_text("nameserver 127.0.0.1\n")

    def learn(self) -> None:
        """Have it resolved from now on."""
        self._write(b" ")

    def forget(self) -> None:
        """Have it unknown from now on."""
        self._write(b"#")

    def _write(self, sign: bytes) -> None:
        # One byte in place: another file would not be the one that is mounted, half a file would name nothing.
        with self._hosts.open("r+b") as file:
            file.write(sign)

    def command(self) -> list[str]:
        """Return what to put before the command of a process that is to know the name by this only.

        Raises: OSError where processes can have no hosts file of their own.
        """
        own = namespace()
        if own is None:
            raise OSError("unshare gives no mount namespace here")
        return [*own, "sh", "-c", _MOUNT, "sh", str(self._hosts), str(self._servers)]


@functools.cache
def namespace() -> tuple[str, ...] | None:
    """Return the command that runs another one with mounts of its own, or None where that is not possible; blocks."""
    for command in (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount")):
        if not hasattr(os, "geteuid"):
            return None
        try:
            tried = subprocess.run(  # noqa: S603 - nothing of it is a user's
                [*command, "mount", "--bind", "/etc/hosts", "/etc/hosts"], capture_output=True, check=False
            )
        except OSError:
            return None
        if not tried.returncode:
            return command
    return None
