"""docs/reference/simulated-machine.md names everything that is replaced or refused."""

import re
from pathlib import Path

from trunkline.testing.simulator.border import REFUSED, refused
from trunkline.testing.simulator.interception import functions

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "simulated-machine.md"
NAMES = set(re.findall(r"`([\w.]+)`", PAGE.read_text(encoding="utf-8")))


def test_every_function_that_is_replaced_is_named():
    names = {f"{function.__module__}.{function.__name__}" for function, _ in functions()}
    names = {name.removesuffix("_ns") if "clock_" not in name else name for name in names}

    assert {name.replace("posix.", "os.") for name in names} - NAMES == set()


def test_every_call_that_is_refused_is_named():
    assert set(REFUSED) - NAMES == set()


def test_every_event_that_is_named_is_refused():
    events = re.findall(r"\| ([^|\n]*audit event[^|\n]*) \|", PAGE.read_text(encoding="utf-8"))
    named = set(re.findall(r"`([\w.]+)`", " ".join(events))) - {"open", "multiprocessing"}

    assert len(named) > 40
    for event in named:
        assert refused(event, ("x",)) is not None, event
