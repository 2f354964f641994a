"""The layout of the file: which one this release reads and writes.

Invariant: a file of another release, or of another program, is refused before anything in it is changed.
Read next: engine.py.
"""

from __future__ import annotations

import apsw

from trunkline.errors import ConfigurationError

VERSION = 2

_LOOK = """
SELECT user_version,
    (SELECT name FROM sqlite_schema WHERE name LIKE 'trunkline\\_%' ESCAPE '\\' ORDER BY name LIMIT 1),
    EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'trunkline_process')
FROM pragma_user_version
"""
"""One statement, so that what another process makes meanwhile is seen whole or not at all."""


def check(connection: apsw.Connection, path: str) -> int:
    """Return the layout of an open file; 0 if nothing of ours is in it yet.

    Raises: ConfigurationError E205 for that of another release or program.
    """
    version, table, ours = connection.execute(_LOOK).fetchall()[0]
    if version not in (0, VERSION):
        raise ConfigurationError(
            "E205",
            f"{path} has layout {version}, this release reads {VERSION}",
            "use the release that wrote it, or another file; a database of another program cannot be shared",
        )
    if (version == 0 and table) or (version == VERSION and not ours):
        what = f"its table {table} was made by another program" if table else "it has our layout, but no table of ours"
        raise ConfigurationError("E205", f"{path} cannot be used: {what}", "name another file")
    return int(version)
