"""The password of the user in a URL, which changes on the broker and in the environment.

Invariant: at the end the broker takes the password it took before. Read next: bench.py.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from trunkline.transport import parse_address


class Secret:
    """A password that only an environment variable names.

    Args:
        url: with user and password.
        rotate: has the broker take another password; see Controls.
        tag: no other secret of this process may have it.

    Attributes:
        url: with the variable in place of the password.
    """

    def __init__(self, url: str, rotate: Callable[[str], Awaitable[None]], tag: str) -> None:
        parts = urlsplit(url)
        credentials, _, places = parts.netloc.rpartition("@")
        self._variable = f"TRUNKLINE_{tag.upper()}"
        self._rotate = rotate
        self._first = self._taken = parse_address(url).password or ""
        self._changes = 0
        user = credentials.partition(":")[0]
        self.url = parts._replace(netloc=f"{user}:${{{self._variable}}}@{places}").geturl()
        os.environ[self._variable] = self._first

    async def change(self) -> None:
        """Have the broker take a new password only, of which the variable says nothing; connections are cut."""
        self._changes += 1
        await self._take(f"{self._first}-{self._changes}")

    async def tell(self) -> None:
        """Put what the broker takes into the variable."""
        os.environ[self._variable] = self._taken

    async def restore(self) -> None:
        """Have the broker take what the variable says."""
        await self._take(os.environ[self._variable])

    async def end(self) -> None:
        """Leave everything as it was."""
        os.environ.pop(self._variable, None)
        if self._changes:
            await self._take(self._first)

    async def _take(self, password: str) -> None:
        await self._rotate(password)
        self._taken = password
