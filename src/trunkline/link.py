"""The connection to a broker: made, watched, made again.

Invariant: while it is down, whoever needs it waits up to a time and then is told so; a refusal (wrong password,
no permission) at start is told at once, never retried in silence. Read next: transport.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from trunkline.clock import Clock
from trunkline.errors import ConfigurationError, TransportError, TrunklineError
from trunkline.transport import Address

log = logging.getLogger("trunkline.link")

LEAST_LEASE_S = 0.5
"""No shorter lease is taken."""
LONGEST_S = 86_400 * 365.0
"""Longest time that any option takes."""
TIMEOUT_S = 30.0
"""How long a start or a publish waits for the broker; `?timeout_s=` in the URL says otherwise."""
ATTEMPT_S = 60.0
"""After this long without an answer an attempt is given up and made anew: a connection can stand and carry nothing."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


def said(error: BaseException) -> str:
    """Return why a connection is gone; most limits of time end in an error without a text."""
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


class Link:
    """Keeps one connection up.

    Args:
        shown: the URL without secrets.
        connect: makes the connection and everything on it; raises TransportError when it may work later,
            ConfigurationError when somebody has to change something first.
    """

    def __init__(self, shown: str, clock: Clock, connect: Callable[[], Awaitable[None]]) -> None:
        self._shown = shown
        self._clock = clock
        self._connect = connect
        self._up = asyncio.Event()
        self._reason = "not connected yet"
        self._lost_at: float | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def is_up(self) -> bool:
        """Return whether the connection stands, as far as is known."""
        return self._up.is_set() and not self._stopped

    @property
    def has_stopped(self) -> bool:
        """Return whether it was stopped: then there is no use in waiting for the connection."""
        return self._stopped

    async def start(self, timeout_s: float) -> None:
        """Connect for the first time.

        Raises: ConfigurationError for what waiting does not mend; TransportError E520 if there was no answer in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._until_connected(final=ConfigurationError)
        except TimeoutError:
            raise self.unreachable(timeout_s) from None

    async def up(self, timeout_s: float) -> None:
        """Wait until the connection stands.

        Raises: TransportError E520 after `timeout_s`, or when the transport stops.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise self.unreachable(timeout_s) from None
        if self._stopped:
            raise TransportError("E520", f"{self._shown} was left: the transport has stopped", "publish before")

    def lost(self, error: BaseException | None) -> None:
        """Say that the connection is gone: it is made again."""
        if self._stopped or not self._up.is_set():
            return
        self._up.clear()
        self._reason = said(error) if error is not None else "closed by the broker"
        self._lost_at = self._clock.monotonic()
        log.warning("%s: connection lost: %s", self._shown, self._reason)
        self._reconnecting = asyncio.get_running_loop().create_task(self._until_connected(final=()))

    async def _until_connected(self, *, final: type[TrunklineError] | tuple[()]) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            try:
                await self._attempt()
            except final:
                raise
            except Exception as error:
                expected = isinstance(error, TrunklineError)
                if final and not expected:
                    raise
                self._reason = said(error)
                trace = None if expected else error  # a bug; to give up would leave the process without a broker
                log.warning("%s: no connection, again in %.1f s: %s", self._shown, wait_s, error, exc_info=trace)
            else:
                self._up.set()
                if self._lost_at is not None:
                    log.warning(
                        "%s: connected again after %.0f s", self._shown, self._clock.monotonic() - self._lost_at
                    )
                return
            await self._clock.sleep(wait_s * (0.5 + self._clock.random()))
            wait_s = min(wait_s * 2, LONGEST_WAIT_S)

    async def _attempt(self) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await self._connect()
        except TimeoutError:
            raise TransportError("E520", "no answer in time", "") from None

    def unreachable(self, timeout_s: float) -> TransportError:
        """Return the error that says so."""
        return TransportError(
            "E520",
            f"{self._shown} was not reached within {timeout_s:g} s: {self._reason}",
            "check that the broker runs and that host and port are right",
        )

    async def stop(self) -> None:
        """Connect no more; whoever waits for the connection is told."""
        self._stopped = True
        self._up.set()
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)


class Options:
    """The options of a broker URL, taken one by one; what is left over is refused.

    Args:
        address: whose `options` they are.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._left = dict(address.options)
        self._known: list[str] = []

    def text(self, name: str, default: str | None = None) -> str | None:
        """Return an option as it is written."""
        self._known.append(name)
        return self._left.pop(name, default)

    def seconds(self, name: str, default: float, least: float = 0.0, most: float = LONGEST_S) -> float:
        """Return an option that is a number of seconds above 0, no less than `least` and no more than `most`.

        Raises: ConfigurationError E241.
        """
        text = self.text(name)
        if text is None:
            return default
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not (0 < seconds <= most and seconds >= least):
            what = f"of {least:g} or more" if least else "above 0"
            what += f" and at most {most:g}" if most < LONGEST_S else ""
            raise self._wrong(name, text, f"a number of seconds {what}, such as 30")
        return seconds

    def lease(self, default: float, most: float = LONGEST_S) -> float:
        """Return `lease_s`: with one that a round trip can outlast, every process loses everything all the time.

        Raises: ConfigurationError E241.
        """
        return self.seconds("lease_s", default, LEAST_LEASE_S, most)

    def number(self, name: str, default: int, least: int = 1, most: int = 2**31 - 1) -> int:
        """Return an option that is a whole number.

        Raises: ConfigurationError E241.
        """
        text = self.text(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            to = f" to {most}" if most < 2**31 - 1 else ""
            raise self._wrong(name, text, f"a whole number from {least}{to}")
        return int(text)

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """Return an option that is one of `choices`.

        Raises: ConfigurationError E241.
        """
        text = self.text(name)
        if text is None:
            return default
        if text not in choices:
            raise self._wrong(name, text, f"one of {', '.join(choices)}")
        return text

    def end(self) -> None:
        """Refuse what was not taken.

        Raises: ConfigurationError E240.
        """
        if self._left:
            unknown = ", ".join(sorted(self._left))
            raise ConfigurationError(
                "E240",
                f"unknown option {unknown!r} in the URL of {self._address.shown}",
                f"options are: {', '.join(sorted(self._known))}",
            )

    def _wrong(self, name: str, text: str, allowed: str) -> ConfigurationError:
        return ConfigurationError("E241", f"{name}={text!r} in the URL of {self._address.shown}", allowed)
