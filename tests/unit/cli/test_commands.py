"""What all commands share: help, version, errors, exit codes, a quick start."""

import doctest
import importlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from trunkline import __version__, cli
from trunkline.cli import commands
from trunkline.cli.terminal import exit_code, printable
from trunkline.errors import ConfigurationError, DecodeError, DefinitionError, LeaseLostError, UnroutableError

MODULES = sorted(path.stem for path in Path(cli.__file__).parent.glob("[a-z]*.py"))
COMMANDS = ["run", "topology", "simulate", "publish", "tail", "backlog", "parked", "outbox", "dead", "doctor", "new"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(f"trunkline.cli.{name}")).failed == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command_and_its_options(name):
    shown = CliRunner().invoke(commands.app, [name, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def listed(*group):
    """Return command → summary as the help of a group of commands lists them, in order."""
    shown = CliRunner().invoke(commands.app, [*group, "--help"]).output
    return dict(re.findall(r"^  ([a-z]+)  +(.+)$", shown.partition("Commands:")[2], re.MULTILINE))


def test_help_lists_every_command_and_what_belongs_together_side_by_side():
    assert list(listed()) == COMMANDS


@pytest.mark.parametrize("group", [[], ["dead"]])
def test_help_cuts_no_summary(group):
    assert [summary for summary in listed(*group).values() if summary.endswith("...")] == []


def test_version_is_that_of_the_package():
    assert CliRunner().invoke(commands.app, ["--version"]).output == f"trunkline {__version__}\n"


def test_help_loads_no_engine_and_no_drawing_of_tables():
    code = (
        "import sys\nfrom trunkline.cli.commands import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\nprint('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.partition("LOADED")[2].split()
    assert "trunkline.cli.run" in loaded
    assert not {"apsw", "rich.console", "rich.markdown", "uvloop", "sqlite3"} & set(loaded)


def test_no_arguments_show_the_help(project):
    assert "Commands:" in project.cli(code=2).err + project.cli(code=2).out


def test_an_unknown_option_is_a_usage_error(project):
    assert "No such option" in project.cli("backlog", "--nope", code=2).err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["topology", "--format", "pdf"], "'--format' / '-f': 'pdf' is not one of 'text', 'mermaid', 'svg'."),
        (["tail", "orders", "--limit", "0"], "'--limit' / '-n': 0 is too small; the least is 1."),
        (["publish", "T", "{}", "--priority", "10"], "'--priority': 10 is too large; the most is 9."),
        (["run", "--workers", "many"], "'--workers' / '-w': 'many' is not a whole number."),
        (["dead", "redrive", "1", "two"], "'two' is not a whole number."),
        (["dead", "redrive", "1", "--rate", "fast"], "'--rate': 'fast' is not a number."),
    ],
)
def test_a_value_that_does_not_fit_is_told_in_plain_words(arguments, text):
    shown = CliRunner().invoke(commands.app, arguments)
    assert shown.exit_code == 2
    assert shown.output.rstrip().endswith(text)
    assert "Value error" not in shown.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("E2", "x"), 2),
        (DefinitionError("E1", "x"), 2),
        (LeaseLostError("E505", "x"), 75),
        (DecodeError("E4", "x"), 1),
        (UnroutableError("E309", "x"), 2),
        (UnroutableError("E303", "x"), 1),
    ],
)
def test_exit_codes_tell_what_a_supervisor_should_do(error, code):
    assert exit_code(error) == code


def test_an_error_is_its_code_and_the_next_step_without_a_traceback(project):
    shown = project.cli("topology", "shop:nothing", code=2).err
    assert shown.splitlines()[0].startswith("E213 shop:nothing: no 'nothing' in it")
    assert "system" in shown.splitlines()[1]
    assert "Traceback" not in shown


@pytest.mark.parametrize("how", [{"options": ["--traceback"]}, {"environment": {"TRUNKLINE_DEBUG": "1"}}])
def test_a_traceback_is_shown_when_asked_for(project, how):
    arguments = [*how.get("options", []), "topology", "shop:nothing"]
    assert "Traceback" in project.cli(*arguments, code=2, **how.get("environment", {})).err


@pytest.mark.parametrize(
    ("target", "code", "exit_code", "text"),
    [
        ("shop", "E210", 2, "MODULE:OBJECT"),
        ("absent:system", "E211", 2, "no module 'absent'"),
        ("broken:system", "E212", 2, "(broken.py:2): ZeroDivisionError"),
        ("syntax:system", "E212", 2, "(syntax.py:1)"),
        ("ends:system", "E212", 2, "(ends.py:2): SystemExit: 4"),
        ("stops:system", "E212", 2, "(stops.py:2): Stop"),
        ("missing:system", "E212", 2, "No module named 'not_installed_anywhere'"),
        ("shop:OrderPlaced", "E214", 2, "a System, Service or App is needed"),
        ("wrong:system", "E101", 2, "(wrong.py:"),
    ],
)
def test_a_target_that_cannot_be_loaded_says_where_and_why(project, target, code, exit_code, text):
    for name, source in {
        "broken": "x = 1\n1 / 0\n",
        "syntax": "def\n",
        "missing": "import not_installed_anywhere\n",
        "ends": "import sys\nsys.exit(4)\n",
        "stops": "class Stop(KeyboardInterrupt): ...\nraise Stop\n",
        "wrong": "from trunkline import Service\ns = Service('s')\n@s.handle\nasync def f(x: int) -> None: ...\n",
    }.items():
        (project.folder / f"{name}.py").write_text(source)
    shown = project.cli("topology", target, code=exit_code).err
    assert shown.startswith(code)
    assert text in shown


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("import sys\nsys.modules['stripe'] = None\nimport stripe\n", "stripe comes with Trunkline's extra shop: "),
        (
            "import sys\nsys.modules['uvicorn'] = None\nimport uvicorn\n",
            "uvicorn comes with Trunkline's extra http and ",
        ),
        ("import not_installed_anywhere.part\n", "install what brings not_installed_anywhere; "),
        ("import shop.nothing\n", "trunkline --traceback … shows all of it"),
    ],
)
def test_a_missing_module_is_told_with_what_brings_it(project, source, hint):
    (project.folder / "missing.py").write_text(source)
    shown = project.cli("topology", "missing:system", code=2).err.splitlines()
    assert shown[0].startswith("E212 importing missing failed (missing.py:")
    assert shown[1].strip().startswith(hint)


def test_output_of_a_message_cannot_steer_the_terminal():
    assert printable("\x1b]0;owned\x07ok\r") == "\\x1b]0;owned\\x07ok\\r"


def test_a_reader_that_goes_away_ends_the_command_quietly(buried):
    process = subprocess.Popen(
        buried.command("tail", "orders", "--from-start"),
        cwd=buried.folder,
        env=buried.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")


def test_a_closed_pipe_ends_the_command_quietly(buried):
    done = subprocess.run(
        [
            "bash",
            "-c",
            '"$@" | head -n 1 >/dev/null; echo "${PIPESTATUS[0]}"',
            "-",
            *buried.command("topology", "shop:system"),
        ],
        cwd=buried.folder,
        env=buried.environment(PYTHONUNBUFFERED="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() in {"0", "141"}
    assert done.stderr == ""


def test_completion_offers_the_channels_of_the_file(buried):
    code = "from trunkline.cli.completion import channels, subscriptions; print(channels('o'), subscriptions('pay'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=buried.folder,
        env=buried.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['orders'] ['payment@orders']\n"


def test_completion_without_a_file_offers_nothing_and_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from trunkline.cli.completion import channels

    assert channels("") == []
    assert list(tmp_path.iterdir()) == []


def described(command, path=()):
    """Yield the name of each command and option, as a reader of the reference looks for it."""
    for name, sub in getattr(command, "commands", {}).items():
        yield " ".join((*path, name))
        yield from described(sub, (*path, name))
    for parameter in command.params:
        yield from (option for option in parameter.opts if option.startswith("--"))


def test_the_reference_describes_every_command_and_option():
    page = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text()
    missing = {
        name
        for name in described(get_command(commands.app))
        if f"`{name}" not in page and f"trunkline {name}" not in page
    }
    assert not missing
