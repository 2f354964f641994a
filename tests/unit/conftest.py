"""Fixtures of the unit tests.

Invariant: what is true of one transport is tested on the others too. Read next: rig.py.
"""

import inspect
from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx

from tests.unit.rig import Rig
from trunkline.clock import ManualClock

START_AND_STOP = [
    ("trunkline/transport.py", {"load_adapter"}),
    ("trunkline/engine.py", {"open", "close"}),
    ("trunkline/engines.py", {"open_engine"}),
    ("trunkline/retry.py", {"detail"}),
]
"""Where files may be touched on the loop: before the first message and after the last, or for a traceback."""


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raise BlockingError from blocking calls that Trunkline makes on the loop while messages flow."""
    watched = (
        inspect.iscoroutinefunction(request.function) and request.node.get_closest_marker("blocking_calls") is None
    )
    if not watched:
        yield
        return
    with blockbuster_ctx("trunkline") as blocking:
        for function in blocking.functions.values():
            for file, names in START_AND_STOP:
                function.can_block_in(file, names)
        yield


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory", "sqlite"])
def url(request, tmp_path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'unit.db'}"


@pytest.fixture
def rig(url, clock) -> Rig:
    return Rig(url, clock)


@pytest.fixture
def file_rig(tmp_path, clock) -> Rig:
    return Rig(f"sqlite:///{tmp_path / 'unit.db'}", clock)
