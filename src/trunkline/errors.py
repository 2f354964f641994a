"""Every error that Trunkline raises, with a stable code each.

TrunklineError
├── DefinitionError      E1xx  a service, handler, channel or type is declared wrongly (import or start)
├── ConfigurationError   E2xx  a URL, option, file or environment variable is wrong
├── PublishError         E3xx  a message was not accepted; nothing of it was stored
│   ├── PayloadError           the payload cannot be encoded, or is too large
│   └── UnroutableError        no channel carries it
├── DecodeError          E4xx  bytes that are not the message they claim to be (never retried)
├── TransportError       E5xx  the broker or file did not answer
│   ├── StoreFullError         no room left for it
│   ├── StoreLostError         the store is away or refuses everything; nothing was stored
│   ├── FatalStoreError        the disk reported a failed write or sync; the process must stop
│   ├── TransactionError       a statement that the handler's transaction cannot take
│   └── LeaseLostError         another process took over; the commit was refused
├── DeadLetterError      E6xx  a dead letter cannot be found or treated
├── SimulationError      E7xx  a simulated process did what cannot be simulated, or a run cannot be judged
└── HandlerSignal              raised by a handler to choose the outcome itself
    ├── RejectError            set aside now, no retry
    ├── RetryLaterError        try again after a wait
    └── DiscardError           drop it, with a reason

Invariant: an error says what, the actual value, what was allowed and the next step; `retryable` is an
attribute, never guessed from text. Read next: message.py.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


def safe_text(value: object) -> str:
    """Return any object as text that can be stored: what is no text or no UTF-8 is shown, never raised."""
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception as error:  # noqa: BLE001 - the __str__ of a user's exception may do anything
        text = f"<{type(value).__name__}, whose text raises {type(error).__name__}>"
    return text.encode("utf-8", "backslashreplace").decode()


class TrunklineError(Exception):
    """Base of all errors of this package.

    Args:
        code: stable identifier such as `E101`, listed in docs/reference/errors.md.
        message: what was wrong, with the actual value.
        hint: what was allowed and what to do next.
        fields: the values the text mentions, as attributes (`err.channel`).
    """

    retryable: ClassVar[bool] = False

    def __init__(self, code: str, message: str, hint: str = "", **fields: Any) -> None:
        self.code = code
        self.message = message
        self.hint = hint
        self.fields = fields
        super().__init__(f"{code} {message}" + (f"; {hint}" if hint else ""))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None


class DefinitionError(TrunklineError):
    """A declaration is wrong; raised while importing or starting, before any message is touched."""


class ConfigurationError(TrunklineError):
    """A URL, option, environment variable or `trunkline.toml` entry is wrong."""


class PublishError(TrunklineError):
    """A message was not accepted. Nothing of it was stored."""


class PayloadError(PublishError):
    """The payload cannot be encoded or exceeds a limit."""


class UnroutableError(PublishError):
    """No channel is declared for the message."""


class DecodeError(TrunklineError):
    """Bytes are not the message they claim to be. Never retried: the same bytes fail again."""


class TransportError(TrunklineError):
    """The broker, or the file that stands in for one, could not do what was asked."""

    retryable = True


class StoreFullError(TransportError):
    """There is no room left, on the device or in a channel.

    A store has refused all of it; of a batch to a broker `unsent` lists what was not confirmed.
    """


class StoreLostError(TransportError):
    """The store went away in the middle of a unit of work, or refuses what no message is to blame for: done again."""


class FatalStoreError(TransportError):
    """The device failed to write or sync. What was confirmed before stands; the process must stop.

    Source: after a failed fsync the kernel may drop dirty pages, so a later success proves nothing.
    """

    retryable = False


class TransactionError(TransportError):
    """A statement that the handler's transaction cannot take."""

    retryable = False


class LeaseLostError(TransportError):
    """Another process has taken over this process's messages; its commit was refused (fence)."""


class DeadLetterError(TrunklineError):
    """A dead letter does not exist or cannot be treated as asked."""


class SimulationError(TrunklineError):
    """A simulated process left the simulation, or a run cannot be judged."""


class HandlerSignal(Exception):  # noqa: N818 - a signal from the handler, not a failure of ours
    """Base of what a handler raises to choose its message's outcome itself."""


class RejectError(HandlerSignal):
    """Set this message aside as a dead letter now, without further tries.

    Args:
        reason: why, as the operator will read it in `trunkline dead list`.
    """

    def __init__(self, reason: object) -> None:
        self.reason = safe_text(reason)
        super().__init__(self.reason)


class RetryLaterError(HandlerSignal):
    """Try this message again after `after_s` seconds, whatever the retry policy says.

    Raises: ValueError if `after_s` is not a number of seconds, 0 or more.
    """

    def __init__(self, after_s: float, reason: object = "") -> None:
        try:
            fits = 0 <= after_s < math.inf
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"retry after {after_s!r}: a number of seconds is needed, 0 or more")
        self.after_s = after_s
        self.reason = safe_text(reason)
        super().__init__(self.reason or f"retry after {after_s} s")


class DiscardError(HandlerSignal):
    """Drop this message; `reason` is logged and counted."""

    def __init__(self, reason: object) -> None:
        self.reason = safe_text(reason)
        super().__init__(self.reason)
