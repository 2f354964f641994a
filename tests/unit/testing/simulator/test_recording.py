"""Tapes as files: what is written is read, and what is no tape is refused."""

import json

import msgspec
import pytest

from tests.unit.testing.simulator.shipping import HastyBank, make
from trunkline import __version__
from trunkline.errors import ConfigurationError
from trunkline.testing.simulator import Tape
from trunkline.testing.simulator.campaign import Plan, carry_out, repeat
from trunkline.testing.simulator.files import command, foot, write
from trunkline.testing.simulator.recording import load
from trunkline.testing.simulator.story import tell


@pytest.fixture(scope="module")
def failure():
    (found,) = carry_out(make(HastyBank), Plan(points=False)).failures
    return found


@pytest.fixture
def files(failure, tmp_path):
    return write(failure, tell(failure), "shop:system", tmp_path / "made")


def test_a_failure_leaves_its_tape_story_and_diagrams(failure, files):
    assert [path.suffix for path in (files.tape, files.story, files.svg, files.mermaid)] == [
        ".json", ".txt", ".svg", ".mmd"
    ]  # fmt: skip
    assert {path.stem for path in files.tape.parent.iterdir()} == {"shop-system-rabbitmq-eventually-charged-once"}
    assert "network:" in files.story.read_text()
    assert files.svg.read_text().startswith("<svg")
    assert files.mermaid.read_text().startswith("sequenceDiagram")


def test_a_tape_says_what_repeats_it(failure, files):
    recording = load(files.tape)
    assert recording.tape == failure.result.tape
    assert (recording.target, recording.broker, recording.promise) == (
        "shop:system",
        "rabbitmq",
        failure.violation.promise,
    )
    assert recording.trunkline == __version__
    assert recording.remarks(failure.result) == []


def test_a_tape_of_another_version_is_read_with_a_remark(failure, files):
    text = json.loads(files.tape.read_text()) | {"python": "3.9.1"}
    files.tape.write_text(json.dumps(text))
    (remark,) = load(files.tape).remarks(failure.result)
    assert remark.startswith("the tape was made with python 3.9.1, and this is 3.")


def test_decisions_that_are_not_reached_any_more_are_remarked(files):
    recording = msgspec.structs.replace(load(files.tape), tape=Tape({"answer_lost": {500: 1}}))
    (remark,) = recording.remarks(repeat(make(), recording.tape, ""))
    assert remark.startswith("1 of 1 decisions on the tape were not reached")


@pytest.mark.parametrize("text", ["", "no JSON", "{}", '{"target": 1}', "\udcff"])
def test_what_is_no_tape_is_refused(tmp_path, text):
    path = tmp_path / "tape.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigurationError, match=r"E711 .*tape\.json is no tape"):
        load(path)


def test_a_tape_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="E711"):
        load(tmp_path / "none.json")


def test_a_tape_of_another_format_is_refused(files):
    files.tape.write_text(json.dumps(json.loads(files.tape.read_text()) | {"format": 99}))
    with pytest.raises(ConfigurationError, match=r"E711 .* is a tape of format 99; this version reads 1"):
        load(files.tape)


def test_the_command_that_repeats_a_failure_is_one_that_a_shell_takes(failure, files, tmp_path):
    assert (
        command("shop:system", tmp_path / "a b.json")
        == f"trunkline simulate shop:system --replay '{tmp_path}/a b.json'"
    )
    assert command("tests/test_shop.py::test_x[1]", files.tape) == (
        f"TRUNKLINE_REPLAY={files.tape} pytest 'tests/test_shop.py::test_x[1]'"
    )
    assert foot(failure, files, "shop:system")[-1] == f"replay:    {command('shop:system', files.tape)}"
