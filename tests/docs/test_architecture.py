"""docs/architecture.md lists every source file, and none that is gone."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "trunkline"
PAGE = ROOT / "docs" / "architecture.md"


def test_the_module_map_lists_every_source_file_once():
    table = PAGE.read_text(encoding="utf-8").partition("## Module map")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def test_the_layers_are_those_that_import_linter_enforces():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    enforced = [sorted(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    table = PAGE.read_text(encoding="utf-8").partition("| layer, from the top |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", table, re.MULTILINE)
    assert [sorted(re.findall(r"\w+", row)) for row in rows] == enforced


def test_every_dependency_of_the_core_has_its_reason():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in settings["project"]["dependencies"]]
    reasons = PAGE.read_text(encoding="utf-8").partition("## Dependencies")[2]
    assert [name for name in names if f"`{name}`" not in reasons] == []
