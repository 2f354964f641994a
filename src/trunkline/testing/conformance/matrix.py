"""`python -m trunkline.testing.conformance.matrix FOLDER`: the support matrix, as a page, from results of the suite.

Invariant: the page says nothing that is not in the results. Read next: registry.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from trunkline.testing.conformance import cases
from trunkline.testing.conformance.registry import Case, Result
from trunkline.transport import Capabilities

SIGNS = {"passed": "yes", "failed": "**no**", "n/a": "n/a"}
FLAGS = ("durable", "processes", "priority", "ordered_streams", "foreign")
GROUPS = {"core": "Core", "order": "Order and replay", "failure": "Failure", "load": "Load"}


class Report(msgspec.Struct, frozen=True):
    """What a run of the suite on one transport writes down.

    Attributes:
        name: of the column.
        transport: scheme. store: scheme.
        setting: of the broker and URL, in words.
        capabilities: what the transport declares.
    """

    name: str
    transport: str
    store: str
    setting: str
    capabilities: Capabilities
    results: list[Result]

    def of(self, case: Case) -> Result:
        """Return the result of a case; one that was not run is not supported."""
        found = next((result for result in self.results if result.case == case.name), None)
        return found or Result(case.name, "n/a", 0.0, "not run")


def write_report(report: Report, path: Path) -> None:
    """Write a report; times are left out, so that only what changed differs."""
    results = [Result(one.case, one.outcome, 0.0, one.note if one.outcome == "n/a" else "") for one in report.results]
    plain = msgspec.structs.replace(report, results=results)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n")


def read_reports(folder: Path) -> list[Report]:
    """Return the reports in a folder, embedded transports first.

    Raises: msgspec.DecodeError for a file that is none.
    """
    reports = [msgspec.json.decode(path.read_bytes(), type=Report) for path in folder.glob("*.json")]
    return sorted(reports, key=lambda report: (report.capabilities.foreign, report.name))


def row(cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def page(reports: Sequence[Report]) -> str:
    """Return the page."""
    head = ["", *(report.name for report in reports)]
    rule = "|---" * len(head) + "|"
    lines = [
        "# Support matrix", "",
        "What each transport was seen to do: one suite runs on all of them, and this page is made from its results",
        "(`make matrix`). **yes**: the case passes. **n/a**: the case does not apply, for the reason below.", "",
        "What each transport promises, and by what, is in [guarantees](guarantees.md). To run the suite yourself see",
        "[write a transport](../how-to/write-a-transport.md).", "",
        "## What was tested", "", "| transport | what it is | store | setting |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        row([one.name, one.capabilities.description, f"`{one.store}:`", one.setting or "none"]) for one in reports
    ]
    lines += ["", "## What it declares", "", row(head), rule]
    for flag in FLAGS:
        lines.append(row([f"`{flag}`", *("yes" if getattr(one.capabilities, flag) else "no" for one in reports)]))
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", row(head), rule]
        for case in cases():
            if case.group == group:
                found = [SIGNS[report.of(case).outcome] for report in reports]
                lines.append(row([f"{case.guarantee}<br>`{case.name}`", *found]))
    return "\n".join([*lines, "", *reasons(reports)]) + "\n"


def reasons(reports: Sequence[Report]) -> list[str]:
    """Return the section of why cases do not apply."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for case in cases():
            result = report.of(case)
            if result.outcome == "n/a":
                found.setdefault(f"{report.name}: {result.note}", []).append(f"`{case.name}`")
    lines = ["## Why a case does not apply", ""]
    return lines + [f"- {reason}: {', '.join(names)}" for reason, names in sorted(found.items())]


def main(arguments: Sequence[str]) -> int:
    """Print the page for the reports in a folder."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m trunkline.testing.conformance.matrix FOLDER\n")
        return 2
    sys.stdout.write(page(read_reports(Path(arguments[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
