"""clock.py is the only source of time, sleep, ids and randomness.

Ruff bans the usual spellings; this test also sees aliases and whole modules.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.structure.source import sources

WHOLE_MODULES = {"pickle", "random", "time"}
BANNED = {
    "asyncio.sleep",
    "asyncio.wait_for",
    "datetime.date.today",
    "datetime.datetime.now",
    "datetime.datetime.today",
    "datetime.datetime.utcnow",
    "os.urandom",
    "secrets.choice",
    "secrets.randbelow",
    "secrets.randbits",
    "secrets.token_bytes",
    "secrets.token_hex",
    "secrets.token_urlsafe",
    "uuid.uuid1",
    "uuid.uuid3",
    "uuid.uuid4",
    "uuid.uuid5",
    "uuid.uuid6",
    "uuid.uuid7",
    "uuid.uuid8",
}


def imported(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Yield line, local name and full name of each absolute import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds `a`; `import a.b as c` binds `a.b`.
                full = alias.name if alias.asname else alias.name.partition(".")[0]
                yield node.lineno, alias.asname or full, full
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}"


def breaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each use of something only clock.py may use."""
    full_names = {}
    for line, local, full in imported(tree):
        full_names[local] = full
        if full.partition(".")[0] in WHOLE_MODULES or full in BANNED:
            yield line, full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            full = f"{full_names.get(head, head)}.{rest}"
            if full in BANNED:
                yield node.lineno, full


ALLOWED = {"clock.py", "testing/simulator/interception.py"}
"""Where they come from, and where user code's are replaced."""


def test_time_ids_and_randomness_come_from_the_clock():
    found = [
        f"{source.name}:{line} {name}"
        for source in sources()
        if source.name not in ALLOWED
        for line, name in breaches(source.tree)
    ]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import time",
        "from time import monotonic",
        "import random as r",
        "from asyncio import sleep as nap",
        "import asyncio as a\na.wait_for(x, 1)",
        "from datetime import datetime as dt\ndt.now()",
        "import datetime\ndatetime.datetime.now()",
        "import uuid\nuuid.uuid4()",
        "import os\nos.urandom(8)",
    ],
)
def test_the_rule_sees(code):
    assert list(breaches(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import uuid\nuuid.UUID(text)",
        "import asyncio\nasyncio.timeout(1)",
        "from trunkline import clock\nclock.sleep(1)",
        "from datetime import datetime\ndatetime.fromisoformat(text)",
        "from .time import monotonic",
    ],
)
def test_the_rule_passes_over(code):
    assert not list(breaches(ast.parse(code)))
