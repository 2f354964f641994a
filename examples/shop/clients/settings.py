"""What the clients need from the environment.

Invariant: a missing value stops the start of the service with its name and what to set; there is no
silent default for a credential.
Read next: stripe.py.
"""

from __future__ import annotations

import os


class SettingError(Exception):
    """A setting is missing or wrong; retrying does not help.

    Attributes:
        name: the environment variable.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name} {message}")
        self.name = name


def required(name: str, what: str) -> str:
    """Return the environment variable `name`.

    Args:
        name: of the variable.
        what: what it holds, with an example; the error repeats it.

    Raises:
        SettingError: the variable is missing or empty.
    """
    value = os.environ.get(name, "")
    if not value:
        stand_ins = '"python -m examples.shop.standins" starts local stand-ins and prints their URLs'
        raise SettingError(name, f"is not set; it holds {what}. {stand_ins}")
    return value
