"""The Python files of the package, parsed once, for the structure tests."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "trunkline"


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Path below the package, with forward slashes."""
        return self.path.relative_to(PACKAGE).as_posix()

    def functions(self) -> Iterator[tuple[str, int]]:
        """Yield where each function is and how many lines of code it has.

        Decorators and the docstring do not count: explaining must not cost anything.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if ast.get_docstring(node, clean=False) is not None:
                    docstring = node.body[0]
                    lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
                yield f"{self.name}:{node.lineno} {node.name}", lines


@cache
def sources() -> tuple[Source, ...]:
    """All files of the package, in the order of their names."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Source(path, text, ast.parse(text, str(path))))
    assert found, f"no Python files under {PACKAGE}"
    return tuple(found)
