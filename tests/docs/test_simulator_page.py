"""The page on the simulator names every parameter, member, fault and promise that there is."""

import inspect
import re
from pathlib import Path

from trunkline.testing.simulator import Client, Simulation, View, account, fixture, world
from trunkline.testing.simulator.faults import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "simulator.md").read_text(encoding="utf-8")


def section(heading):
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(heading):
    """Return the cells of the table in a section."""
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in section(heading).splitlines()
        if line.startswith("| `")
    ]


def test_every_parameter_of_a_simulation_is_there_with_its_default():
    shown = {row[0]: row[1] for row in rows("`Simulation`")}
    parameters = inspect.signature(Simulation).parameters.values()
    assert shown == {
        each.name: "" if each.default is inspect.Parameter.empty else repr(each.default).replace("'", '"')
        for each in parameters
    }


def test_every_parameter_of_the_decorator_is_there():
    shown = set(
        re.findall(r"`(\w+)`", " ".join(line for line in section("`simulate`").splitlines() if line[:1] == "|"))
    )
    parameters = set(inspect.signature(fixture.simulate).parameters) - {"system", "options"}
    assert parameters <= shown


def test_every_member_of_client_and_view_is_there():
    for cls, heading in ((Client, "`Client`"), (View, "`View`")):
        members = {name for name in vars(cls) if not name.startswith("_")}
        assert members <= set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", section(heading)))))


def test_every_fault_is_there_in_the_words_of_the_code():
    assert {row[0]: row[1].replace("`", "") for row in rows("Faults")} == {
        kind: text.replace("`", "") for kind, text in KINDS.items()
    }


def test_every_promise_is_there():
    source = inspect.getsource(account) + inspect.getsource(world)
    promises = set(re.findall(r'(?:_violated\(|Violation\()\s*"([a-z ]+)"', source))
    assert len(promises) > 6
    assert promises <= {row[0] for row in rows("What is checked")}
