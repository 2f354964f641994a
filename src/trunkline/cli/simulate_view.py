"""A search as it goes on and what came of it, for people and scripts.

Read next: simulate.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from trunkline.cli.terminal import printable, stderr, stdout, table
from trunkline.clock import Clock

if TYPE_CHECKING:
    from rich.text import Text

    from trunkline.testing.simulator.campaign import Report
    from trunkline.testing.simulator.recording import Recording
    from trunkline.testing.simulator.story import Line, Story

REFRESH_S = 0.1
STYLES = {"fault": "yellow", "broken": "bold red"}


class Progress:
    """One line on stderr that changes while a phase lasts, and stays at its end; on a terminal only."""

    def __init__(self) -> None:
        from rich.live import Live

        # No thread of its own: it would be forked with the processes that run the search.
        self._live = Live(console=stderr(), auto_refresh=False, transient=True)
        self._shown = 0.0
        self._last: tuple[str, str, Text] | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()
        self._keep()

    def told(self, report: Report) -> None:
        """Show how far a search is."""
        if not self._live.console.is_terminal:
            return
        now = Clock.monotonic()
        changed = self._last is not None and self._last[0] != report.phase
        if now - self._shown < REFRESH_S and report.done < report.total and not changed:
            return
        if changed:
            self._keep()
        self._shown = now
        self._last = report.phase, report.broker, progress_line(report)
        self._live.update(self._last[2], refresh=True)

    def _keep(self) -> None:
        if self._last is not None:
            self._live.console.print(self._last[2])


def progress_line(report: Report) -> Text:
    """Return how far a search is: phase, runs, speed, faults, coverage."""
    from rich.text import Text

    rate = report.runs / report.seconds if report.seconds else 0.0
    return Text.assemble(
        (f"{report.broker:9} ", "bold"), f"{report.phase:15} {report.done:>7,} of {report.total:<7,}",
        (f" {rate:6,.0f}/s  {sum(report.fired.values()):,} faults at {len(report.places):,} places", "dim"),
    )  # fmt: skip


def write_report(report: Report) -> None:
    """Print what was run, how often each fault happened, and where."""
    console = stdout()
    rate = report.runs / report.seconds if report.seconds else 0.0
    broken = len(report.failures)
    console.print(
        f"{report.broker}: {report.runs:,} runs, {report.steps:,} steps, {report.seconds:.1f} s ({rate:,.0f} runs/s); "
        f"{broken or 'no'} promise{'' if broken == 1 else 's'} broken"
    )
    if report.tried:
        console.print()
        console.print(_faults(report))
        console.print()
        console.print(_coverage(report))
    for doubt in report.doubts():
        console.print()
        console.print(doubt, style="yellow", markup=False, soft_wrap=True)
    console.print()


def _faults(report: Report) -> Any:
    made = table("fault", "occasions", "happened", "places", "", right=("occasions", "happened", "places"))
    never = [] if report.failures else report.never_fired()
    for kind in sorted(report.tried, key=lambda kind: (-report.fired[kind], kind)):
        places = sum(place[0] == kind for place in report.places)
        remark = "NEVER HAPPENED" if kind in never else "" if report.occasions[kind] else "no occasion here"
        made.add_row(kind, f"{report.occasions[kind]:,}", f"{report.fired[kind]:,}", f"{places:,}", remark)
    return made


def _coverage(report: Report) -> Any:
    made = table(
        "node", "steps", "crashed at", "with any fault", "step and fault",
        right=("steps", "crashed at", "with any fault", "step and fault"),
    )  # fmt: skip
    for row in coverage(report):
        shares = [f"{row[name]:,} ({row[name] / (row['steps'] or 1):.0%})" for name in ("crashed_at", "faults_at")]
        made.add_row(row["node"], f"{row['steps']:,}", *shares, f"{row['places']:,}")
    return made


def coverage(report: Report) -> list[dict[str, Any]]:
    """Return node by node: steps of a run without faults, how many of them had a crash, how many any fault."""
    rows = []
    for node, steps in report.plain.items():
        here = {(kind, step) for kind, who, step in report.places if who == node}
        inside = {(kind, step) for kind, step in here if 1 <= step <= steps}
        rows.append(
            {
                "node": node,
                "steps": steps,
                "crashed_at": sum(kind == "crash" for kind, _ in inside),
                "faults_at": len({step for _, step in inside}),
                "places": len(here),
            }
        )
    return rows


def as_json(report: Report) -> dict[str, Any]:
    """Return what was run, for scripts."""
    return {
        "broker": report.broker,
        "runs": report.runs,
        "steps": report.steps,
        "seconds": round(report.seconds, 3),
        "faults": {
            kind: {"occasions": report.occasions[kind], "happened": report.fired[kind]} for kind in sorted(report.tried)
        },
        "never_happened": report.never_fired(),
        "coverage": coverage(report),
        "doubts": report.doubts(),
    }


def write_story(story: Story, foot: list[str]) -> None:
    """Print a story."""
    from rich.text import Text

    console = stdout()
    for number, line in enumerate(story.head()):
        console.print(Text(printable(line), style="bold red" if number == 0 else ""), soft_wrap=True)
    console.print(Text(f"\n{story.title()}", style="bold"))
    for told in story.short():
        console.print(_line(told), soft_wrap=True)
    if story.left_out:
        console.print(Text(printable(f"left out: {story.left_out}"), style="dim"), soft_wrap=True)
    console.print()
    for line in foot:
        console.print(Text(printable(line)), soft_wrap=True)
    console.print()


def _line(line: Line | str) -> Text:
    from rich.text import Text

    return Text(printable(str(line)), style="dim" if isinstance(line, str) else STYLES.get(line.mark, ""))


def write_replay(recording: Recording, story: Story | None, remarks: list[str]) -> None:
    """Print how a tape came out."""
    console = stdout()
    if story is not None:
        write_story(story, [f"remark: {remark}" for remark in remarks])
        return
    console.print(f"nothing is broken on this tape; it was made when {recording.promise!r} was")
    for remark in remarks:
        console.print(f"remark: {remark}")
