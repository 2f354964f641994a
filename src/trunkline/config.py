"""Where a system runs: transport, store and application, from arguments, environment and `trunkline.toml`.

Invariant: an argument wins over the environment, that over the file, that over the default; what is not
understood is refused, never ignored. Read next: cli/run.py.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trunkline.errors import ConfigurationError

FILE_NAME = "trunkline.toml"
DEFAULT_TRANSPORT = "sqlite:///trunkline.db"
KEYS = ("transport", "store", "app")
GIVEN = "the command line"
VARIABLES = {"transport": "TRUNKLINE_TRANSPORT", "store": "TRUNKLINE_STORE"}


class Settings(msgspec.Struct, frozen=True):
    """What a command works with.

    Attributes:
        transport: URL of the transport.
        store: URL of the store; the transport's own unless said otherwise.
        app: `module:object` of the system, or None.
        origin: setting → where it comes from, for people.
    """

    transport: str
    store: str
    app: str | None
    origin: dict[str, str]


def load_settings(
    *,
    transport: str | None = None,
    store: str | None = None,
    app: str | None = None,
    environ: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> Settings:
    """Return the settings in force.

    Args:
        transport: as given on the command line, or None; so are `store` and `app`.
        environ: environment variables; empty ones count as unset.
        folder: where `trunkline.toml` is looked for; default: the current folder.
    Raises: ConfigurationError E221 to E224 for a `trunkline.toml` that is not understood.
    """
    values: dict[str, str] = {}
    origin: dict[str, str] = {}

    def take(found: Mapping[str, str | None], where: Mapping[str, str]) -> None:
        for name, value in found.items():
            if value and name not in values:
                values[name] = value
                origin[name] = where[name]

    take({"transport": transport, "store": store, "app": app}, dict.fromkeys(KEYS, GIVEN))
    take({name: environ.get(variable) for name, variable in VARIABLES.items()}, VARIABLES)
    take(read_file((folder or Path.cwd()) / FILE_NAME), dict.fromkeys(KEYS, FILE_NAME))
    take({"transport": DEFAULT_TRANSPORT}, {"transport": "the default"})
    take({"store": values["transport"]}, {"store": "the transport"})
    return Settings(values["transport"], values["store"], values.get("app"), origin)


def read_file(path: Path) -> dict[str, str]:
    """Return what a `trunkline.toml` says; nothing if there is none.

    Raises: ConfigurationError E221 (not TOML), E222 (unknown key), E223 (not text), E224 (unreadable).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError("E224", f"{path} cannot be read: {error}", "make it a readable UTF-8 file") from error
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            "E221", f"{path} is not TOML: {error}", 'such as: transport = "sqlite:///shop.db"'
        ) from error
    for key, value in found.items():
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigurationError("E222", f"{path}: unknown key {key!r}", f"{hint}keys are: {', '.join(KEYS)}")
        if not isinstance(value, str) or not value:
            raise ConfigurationError("E223", f"{path}: {key} is {value!r}", f"text is needed, such as {_EXAMPLES[key]}")
    return found


_EXAMPLES = {
    "transport": 'transport = "sqlite:///shop.db"',
    "store": 'store = "sqlite:///shop.db"',
    "app": 'app = "shop:system"',
}
