"""`MODULE:OBJECT` to a System: what a user names on the command line.

Invariant: a module that fails to import is one line with the place in the user's code.
Read next: run.py.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
import traceback
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trunkline.config import Settings
from trunkline.errors import ConfigurationError, DefinitionError, TrunklineError

if TYPE_CHECKING:
    from trunkline.app import App
    from trunkline.service import System


@dataclass(frozen=True)
class Target:
    """What was named.

    Attributes:
        name: `module:object` as given.
        system: the System; of a Service, one with it alone.
        app: the App, if one was named: it brings its own transport and store.
    """

    name: str
    system: System
    app: App | None = None


def load_target(settings: Settings) -> Target:
    """Import what `settings.app` names; the current folder is on the path.

    Raises: ConfigurationError E210 to E214; DefinitionError as raised by the user's declarations.
    """
    from trunkline.app import App
    from trunkline.service import Service, System

    name, found = load_object(settings)
    match found:
        case System():
            return Target(name, found)
        case Service():
            return Target(name, System(found.name, [found]))
        case App():
            return Target(name, found.system, found)
    raise ConfigurationError("E214", f"{name} is a {type(found).__name__}", "a System, Service or App is needed")


def load_object(settings: Settings) -> tuple[str, Any]:
    """Import what `settings.app` names, whatever it is; return its name too. The current folder is on the path.

    Raises: ConfigurationError E210 to E213; DefinitionError as raised by the user's declarations.
    """
    name = settings.app
    if not name:
        raise ConfigurationError(
            "E210", "nothing is named to work on", 'name it, such as "shop:system", or set app in trunkline.toml'
        )
    module_name, colon, path = name.partition(":")
    if not (colon and module_name and path):
        raise ConfigurationError(
            "E210", f"{name!r} is not MODULE:OBJECT", 'such as "shop:system" for `system` in shop.py'
        )
    found: Any = _import(module_name)
    for attribute in path.split("."):
        found = _attribute(found, attribute, name)
    return name, found


def _import(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                "E211",
                f"no module {name!r} (looked in {folder} and the installed packages)",
                "run it from the project's folder",
            ) from error
        raise _failed(name, error) from error
    except TrunklineError as error:
        raise _placed(error) from error
    except KeyboardInterrupt as error:
        if type(error) is KeyboardInterrupt:  # Ctrl-C during the import
            raise
        raise _failed(name, error) from error
    except BaseException as error:
        raise _failed(name, error) from error


def _failed(name: str, error: BaseException) -> ConfigurationError:
    text = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    hint = "trunkline --traceback … shows all of it"
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = _how_to_install(error.name.partition(".")[0]) or hint
    return ConfigurationError("E212", f"importing {name} failed{_place(error)}: {said}", hint)


def _how_to_install(module: str) -> str:
    """Return what to do about a module that is missing; nothing if it is there, and only a part of it is missing."""
    if importlib.util.find_spec(module) is not None:
        return ""
    wanted = (re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", line) for line in requires("trunkline") or ())
    extras = sorted({found[2] for found in wanted if found and found[1].replace("-", "_") == module})
    if extras:
        names = " and ".join(extras)
        return f"{module} comes with Trunkline's extra {names}: in its clone, pip install '.[{extras[-1]}]'"
    return f"install what brings {module}; where the project has it as an extra: pip install '.[EXTRA]'"


def _placed(error: TrunklineError) -> TrunklineError:
    """Return the error of a declaration with the place in the user's code."""
    place = _place(error)
    if not place or not isinstance(error, DefinitionError):
        return error
    return DefinitionError(error.code, f"{error.message}{place}", error.hint, **error.fields)


def _place(error: BaseException) -> str:
    """Return where in the user's code it happened, such as ` (shop.py:12)`."""
    ours = str(Path(__file__).parents[1]) + os.sep
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({os.path.relpath(error.filename)}:{error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if (
            not frame.filename.startswith("<")
            and not frame.filename.startswith(ours)
            and "importlib" not in frame.filename
        ):
            return f" ({os.path.relpath(frame.filename)}:{frame.lineno})"
    return ""


def _attribute(found: Any, name: str, target: str) -> Any:
    try:
        return getattr(found, name)
    except AttributeError as error:
        names = [known for known in dir(found) if not known.startswith("_")]
        close = difflib.get_close_matches(name, names, 3)
        candidates = _candidates(found)
        have = ", ".join(close or candidates) or "no System, Service or App"
        raise ConfigurationError("E213", f"{target}: no {name!r} in it", f"it has: {have}") from error


def _candidates(found: Any) -> list[str]:
    from trunkline.app import App
    from trunkline.service import Service, System

    return [name for name, value in vars(found).items() if isinstance(value, App | Service | System)]
