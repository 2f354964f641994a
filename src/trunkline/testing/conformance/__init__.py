"""One suite of cases for every transport, ours and others'.

With pytest: `@pytest.mark.parametrize("case", cases(), ids=str)` and `await run_case(case, bench)`; as a command:
`python -m trunkline.testing.conformance URL`. How to: docs/how-to/write-a-transport.md. Read next: registry.py.
"""

from trunkline.testing.conformance import core, failure, load, order, setaside  # each registers its cases
from trunkline.testing.conformance.bench import Bench, Controls
from trunkline.testing.conformance.registry import Case, ConformanceError, Result, result_of, run_case
from trunkline.testing.conformance.registry import all_cases as cases

__all__ = [
    "Bench", "Case", "ConformanceError", "Controls", "Result", "cases", "core", "failure", "load", "order",
    "result_of", "run_case", "setaside",
]  # fmt: skip
