"""Run the contestants of a case in turn, each in a process of its own, and collect what they measured.

Invariant: A B C, A B C, …; never two at once; dirty pages of the one before are on disk before the next begins.
Read next: contest.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cases import Case, Contestant, Samples
from benchmarks.peers import PeersError, python_of_peers

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "bench"
LIMIT_S = 600
"""Longest run of one contestant."""

Tell = Callable[[str], None]


class ContestantError(Exception):
    """A contestant failed; its output is in the message."""


class Runner:
    """Runs cases.

    Args:
        quick: smaller cases and three rounds, for development.
        rounds: least number of rounds; None leaves it to the case.
        progress: told what begins.
        skipped: told what does not run, and why.
    """

    def __init__(self, *, quick: bool, rounds: int | None, progress: Tell, skipped: Tell) -> None:
        self._quick = quick
        self._rounds = rounds
        self._progress = progress
        self._skipped = skipped
        WORK.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(dir=WORK, prefix="run-"))
        self._folder.chmod(0o755)  # PostgreSQL's user passes through it
        self._prepared: dict[tuple[str, int], Path] = {}

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self._folder)

    def steps(self, case: Case) -> int:
        """Return how many processes a case takes."""
        return self._rounds_of(case) * len(case.contestants)

    def run(self, case: Case) -> Samples:
        """Return what each contestant measured, round by round.

        Raises: ContestantError.
        """
        messages = case.quick if self._quick else case.messages
        runnable = [contestant for contestant in case.contestants if self._can_run(contestant)]
        shared = self._prepare(case, messages)
        samples: Samples = {contestant.name: [] for contestant in runnable}
        rounds = self._rounds_of(case)
        for number in range(1, rounds + 1):
            for contestant in runnable:
                self._progress(f"{case.name}: {contestant.name} ({number} of {rounds})")
                samples[contestant.name].append(self._measure(contestant, messages, shared))
        return samples

    def _rounds_of(self, case: Case) -> int:
        if self._rounds is not None:
            return self._rounds
        return 3 if self._quick else case.rounds

    def _can_run(self, contestant: Contestant) -> bool:
        missing = [program for program in contestant.needs if shutil.which(program) is None]
        if missing:
            self._skipped(f"{contestant.name}: {', '.join(missing)} is not installed")
            return False
        try:
            return not contestant.peer or bool(python_of_peers())
        except PeersError as error:
            self._skipped(f"{contestant.name}: {error}")
            return False

    def _prepare(self, case: Case, messages: int) -> Path:
        if case.prepare is None:
            return self._folder
        folder = self._prepared.get((case.prepare, messages))
        if folder is None:
            self._progress(f"{case.name}: making {messages:,} messages")
            folder = self._prepared[case.prepare, messages] = self._folder / f"shared-{len(self._prepared)}"
            folder.mkdir()
            self._execute(Contestant("preparation", case.prepare), messages, folder, folder)
        return folder

    def _measure(self, contestant: Contestant, messages: int, shared: Path) -> dict[str, float]:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        os.sync()
        try:
            return self._execute(contestant, max(1, int(messages * contestant.share)), folder, shared)
        finally:
            shutil.rmtree(folder)

    def _execute(self, contestant: Contestant, messages: int, folder: Path, shared: Path) -> dict[str, float]:
        given = {
            "messages": messages, "folder": str(folder), "shared": str(shared), "options": contestant.options,
        }  # fmt: skip
        python = python_of_peers() if contestant.peer else sys.executable
        done = subprocess.run(
            [python, "-m", "benchmarks.contest", contestant.target, json.dumps(given)],
            cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            raise ContestantError(f"{contestant.name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return {name: float(value) for name, value in json.loads(lines[-1]).items()}


def names(cases: Sequence[Case]) -> str:
    """Return the cases' names, for messages."""
    return ", ".join(case.name for case in cases)
