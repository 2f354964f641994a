"""A new project really runs and really passes its own tests."""

import json
import shlex
import subprocess
import sys
import tomllib

import pytest

from tests.unit.cli.conftest import DEADLINE_S, wait_until

pytestmark = pytest.mark.timeout(120)


def test_its_tests_pass(project):
    project.cli("new", "order-desk")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=project.folder / "order-desk",
        env=project.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_a_quantity_below_one_is_refused_before_it_is_published(project):
    project.cli("new", "order-desk")
    project.folder = project.folder / "order-desk"
    with project.running():
        shown = project.cli("publish", "OrderPlaced", '{"order_id": "1", "quantity": -2}', code=1).err
    assert shown.startswith("E412 DATA: payload is not a valid order.placed: Expected `int` >= 1")
    assert "\n     fields: order_id: str, quantity: int\n" in shown


def test_the_commands_of_its_readme_come_to_an_end(project):
    project.cli("new", "order-desk")
    project.folder = project.folder / "order-desk"
    readme = (project.folder / "README.md").read_text()
    commands = [shlex.split(line) for line in readme.splitlines() if line.startswith("trunkline ")]
    with project.running():
        for _, *arguments in commands:
            if arguments[0] != "run":
                project.cli(*arguments)
    assert [arguments[1] for arguments in commands][-2:] == ["dead", "doctor"]


def test_its_readme_says_in_which_environment_it_is_installed(project):
    project.cli("new", "order-desk")
    readme = (project.folder / "order-desk" / "README.md").read_text()
    before, _, _ = readme.partition("pip install -e . pytest")
    assert "In the environment in which Trunkline is installed" in before


def test_it_runs_with_its_own_settings(project):
    project.cli("new", "order-desk")
    project.folder = project.folder / "order-desk"
    with project.running():
        project.cli("publish", "OrderPlaced", '{"order_id": "1", "quantity": 2}')

        def types():
            shown = project.cli("tail", "orders", "--no-follow", "--json").out
            return [json.loads(line)["type"] for line in shown.splitlines()]

        wait_until(lambda: types() == ["order.placed", "order.confirmed"], "the order is confirmed")
    assert (project.folder / "order-desk.db").exists()
    assert tomllib.loads((project.folder / "pyproject.toml").read_text())["project"]["name"] == "order-desk"


def test_nothing_that_exists_is_overwritten(project):
    (project.folder / "taken").mkdir()
    (project.folder / "taken" / "notes").write_text("mine")
    assert project.cli("new", "taken", code=2).err.startswith("E219")
    assert [path.name for path in (project.folder / "taken").iterdir()] == ["notes"]


@pytest.mark.parametrize("name", ["Upper", "../up", "a b", "1st", "class", "json", "trunkline", "x-", "ä"])
def test_a_name_that_cannot_be_a_module_and_a_service_is_refused(project, name):
    assert project.cli("new", "--", name, code=2).err.startswith("E218")
    assert [path.name for path in project.folder.iterdir()] == ["shop.py"]


@pytest.mark.parametrize("name", ["class", "json", "trunkline"])
def test_a_name_that_is_taken_is_refused_with_one_that_is_free(project, name):
    hint = project.cli("new", name, code=2).err.splitlines()[1].split()
    assert hint == ["use", "another,", "such", "as", f"{name}-service"]
    project.cli("new", hint[-1])
