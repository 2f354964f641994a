"""What all tests share.

Invariant: an async unit test fails when Trunkline blocks the event loop unannounced.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

UNIT = Path(__file__).parent / "unit"


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raise BlockingError from blocking calls that Trunkline makes on the loop.

    The embedded engine runs short SQLite statements on the loop on purpose; those go through apsw,
    which blockbuster does not watch, so what is left is files, sockets, locks and sleeps.
    """
    watched = (
        UNIT in request.path.parents
        and inspect.iscoroutinefunction(request.function)
        and request.node.get_closest_marker("blocking_calls") is None
    )
    if not watched:
        yield
        return
    with blockbuster_ctx("trunkline"):
        yield
