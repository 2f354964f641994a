"""Results as a table for people: on the terminal, and in the documentation.

Invariant: the page's tables are made from the results file alone; `write_page` and the test agree on it.
Read next: plot.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "performance.md"
RESULTS = Path(__file__).with_name("results")

Result = dict[str, Any]


def load(suite: str) -> list[Result]:
    """Return the results of a suite that were last written."""
    return json.loads((RESULTS / f"{suite}.json").read_text())  # type: ignore[no-any-return]


def terminal_table(suite: str, results: list[Result]) -> Table:
    """Return the results for a terminal, ratios first."""
    table = Table(title=f"{suite}: × is how many times as good as the other", title_justify="left")
    for name in ("×", "goal", "", "value", "spread", "case", "against", "its value"):
        table.add_column(name, justify="left" if name in ("case", "against", "goal", "") else "right")
    for result in results:
        mark = {True: "[green]met", False: "[red]missed", None: ""}[result["met"]]
        table.add_row(
            ratio_text(result), result["goal"] or "", mark, value_text(result["value"], result["unit"]),
            f"±{result['spread'] / 2:.0%}", result["case"], result["against"] or "",
            value_text(result["against_value"], result["unit"]),
        )  # fmt: skip
    return table


def value_text(value: float | None, unit: str) -> str:
    """Return a figure with its unit."""
    if value is None:
        return ""
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{number}{unit}" if unit in ("/s", "×") else f"{number} {unit}"


def ratio_text(result: Result) -> str:
    """Return how many times as good it is."""
    return "" if result["ratio"] is None else f"{result['ratio']:.3g}"


def page_block(suite: str) -> str:
    """Return what the page shows of a suite, in Markdown."""
    results = load(suite)
    machine, versions = results[0]["machine"], results[0]["versions"]
    lines = [
        f"Measured {machine['measured']} on {machine['processor']}, {machine['memory']}, {machine['system']},",
        f"{machine['disk']}; load {machine['load']}.",
        "",
        "| Case | × | Against | Trunkline | Other | Goal | Met | Spread |",
        "|---|--:|---|--:|--:|---|---|--:|",
    ]
    for result in results:
        met = {True: "yes", False: "**no**", None: ""}[result["met"]]
        cells = (
            result["case"], ratio_text(result) or ("not run" if _unknown(result) else ""), result["against"] or "",
            value_text(result["value"], result["unit"]), value_text(result["against_value"], result["unit"]),
            result["goal"] or "", met, f"±{result['spread'] / 2:.0%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    return "\n".join(
        [*lines, "", f"Versions: {shown}.", "", f"![Results of the {suite} suite](performance-{suite}.svg)"]
    )


def _unknown(result: Result) -> bool:
    return result["against"] is not None and result["against_value"] is None


def with_block(page: str, suite: str) -> str:
    """Return the page's text with the block of a suite renewed.

    Raises: ValueError if the page has no place for it.
    """
    begin, end = f"<!-- results: {suite} -->\n", "<!-- end of results -->"
    before, found, rest = page.partition(begin)
    _old, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"{PAGE.name} has no {begin.strip()} … {end}")
    return f"{before}{begin}{page_block(suite)}\n{end}{after}"


README = ROOT / "README.md"
_README_ROWS = (
    ("one process, 100 publishers, stream", "hand-written loop with inbox", ""),
    ("producer and consumer process, stream", "raw loop in two processes", ""),
    ("one publish at a time", "raw SQLite commits", ""),
    ("handler with own INSERT and one message, 64 in flight", "raw loop, 64 per commit", ""),
    ("durable, end to end", "huey", ""),
    ("durable, end to end", "persist-queue", ""),
    ("durable, end to end", "PostgreSQL", ""),
    ("durable, end to end", "Redis Streams", ""),
    ("durable, end to end", "NATS JetStream", ""),
    ("durable, end to end", "RabbitMQ quorum queue", ""),
    ("memory, never suspends", "FastStream, test broker", "in memory, a handler that waits for nothing; per message"),
)
"""(case, against, what the case is called for readers who do not know its name)."""


def readme_with_speed(readme: str) -> str:
    """Return the README's text with its tables of speed renewed from the results."""
    machine = load("embedded")[0]["machine"]
    note = (
        f"Medians of alternating rounds on {machine['processor']}, every commit synced to disk; for CPU time a ratio"
        " above 1 means so many times less. What each of them ran, and all cases, goals that were missed among them:"
        " [performance](docs/explanation/performance.md); `make bench` measures them again."
    )
    begin, end = "<!-- speed:begin -->", "<!-- speed:end -->"
    before, _, rest = readme.partition(begin)
    after = rest.partition(end)[2]
    return before + "\n".join([begin, *_embedded_speed(), "", *_broker_speed(), "", note, end]) + after


def _embedded_speed() -> list[str]:
    results = {(result["case"], result["against"]): result for result in load("embedded")}
    lines = ["| | Trunkline | against | their figure | ratio |", "|---|--:|---|--:|--:|"]
    for case, against, words in _README_ROWS:
        if (case, against) not in results:
            continue  # older than the row
        result = results[case, against]
        ours, theirs = (value_text(result[name], result["unit"]) for name in ("value", "against_value"))
        lines.append(f"| {words or case} | {ours} | {against} | {theirs} | {ratio_text(result)} |")
    return lines


def _broker_speed() -> list[str]:
    """Return a line per broker: what one process consumes, what 100 callers publish, and how others do."""
    lines = [
        (
            "| on a broker, one process | handled and acknowledged | × raw client | × FastStream"
            " | published by 100 | × raw client |"
        ),
        "|---|--:|--:|--:|--:|--:|",
    ]
    results = [result for result in load("brokers") if result["unit"] == "/s" and result["against"]]
    for name in dict.fromkeys(result["case"].partition(",")[0] for result in results if "published" in result["case"]):
        consumed = [result for result in results if result["case"] == f"{name}, consumed"]
        published = [result for result in results if result["case"] == f"{name}, published by 100"]
        raw, peers = consumed[0], [result for result in consumed if result["against"] == "FastStream"]
        cells = (
            name, value_text(raw["value"], "/s"), ratio_text(raw), ratio_text(peers[0]) if peers else "",
            value_text(published[0]["value"], "/s"), ratio_text(published[0]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot_path(suite: str) -> Path:
    """Return where the plot of a suite stands."""
    return PAGE.with_name(f"performance-{suite}.svg")


def write_results(folder: Path, suite: str, results: list[Result]) -> Path:
    """Write a results file; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return path
