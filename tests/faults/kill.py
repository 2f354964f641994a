"""Kill -9 of publishers and consumers at random moments, and an independent ledger over all that was said.

    python -m tests.faults.kill --cycles 1000 --seed 7

Prints what happened; exit code 1 if anything was lost, done twice, done out of order or left behind.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import file, numbers
from tests.faults.processes import Process
from trunkline.testing import Verdict, check, read_journal

STALL_S = 60.0
"""A drain goes on for as long as something is settled within this time."""
LOOK_S = 0.25
TELL_S = 10.0


class StalledError(AssertionError):
    """The consumers settle nothing more, though something waits."""


class Patience:
    """How long a count has not risen; `now_s` comes from the caller's clock."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        self.limit_s = limit_s
        self._most = -1
        self._risen_s = now_s

    def look(self, count: int, now_s: float, what: str) -> None:
        """Raise StalledError, with `what`, when `count` has not risen for longer than the limit."""
        if count > self._most:
            self._most, self._risen_s = count, now_s
        elif now_s - self._risen_s > self.limit_s:
            raise StalledError(f"nothing was settled for {self.limit_s:g} s: {what}")


@dataclass
class Report:
    """What a run found."""

    seed: int
    cycles: int
    verdict: Verdict
    kills: dict[str, int]
    in_start: int
    absorbed: int
    crashed_dead_letters: int
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.verdict.passed and not self.problems

    def describe(self) -> str:
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        return "\n".join(
            [
                f"seed {self.seed}: {self.cycles} kills ({kills}; {self.in_start} of them in start-up)"
                f" in {self.seconds:.0f} s",
                f"handlers begun again: {self.absorbed};"
                f" set aside after crashes and redriven: {self.crashed_dead_letters}",
                self.verdict.describe(),
                *self.problems,
            ]
        )


class Run:
    """One run on one file in `folder`."""

    def __init__(
        self, folder: Path, seed: int, pause_s: float, say: Callable[[str], object], stall_s: float = STALL_S
    ) -> None:
        self.folder = folder
        self.path = folder / "numbers.db"
        self.url = f"sqlite:///{self.path}"
        self.rng = random.Random(seed)
        self.seed = seed
        self.pause_s = pause_s
        self.say = say
        self.stall_s = stall_s
        self.roles = ["publisher-1", "publisher-2", "consumer-1", "consumer-2"]
        self.running: dict[str, Process] = {}
        self.kills = dict.fromkeys(self.roles, 0)
        self.in_start = 0

    def journal(self, role: str) -> Path:
        return self.folder / f"{role}.journal"

    def start(self, role: str) -> None:
        arguments = [role.partition("-")[0], self.url, "--journal", str(self.journal(role))]
        if role.startswith("publisher"):
            arguments += ["--name", role, "--pause", str(self.pause_s)]
        self.running[role] = Process("tests.faults.numbers", arguments, self.folder / f"{role}.log")

    def cycle(self) -> None:
        """Kill one at a random moment, sometimes while it starts, and start it again."""
        role = self.rng.choice(self.roles)
        if self.rng.random() < 0.2:
            time.sleep(self.rng.uniform(0, 0.4))  # the random moment
            self.in_start += 1
        else:
            self.running[role].wait_line("ready")
            time.sleep(self.rng.uniform(0, 0.25))  # the random moment
        if not self.running[role].alive():
            raise AssertionError(f"{role} ended by itself:\n{self.running[role].tail()}")
        self.running[role].kill()
        self.running[role].close()
        self.kills[role] += 1
        self.start(role)

    def drain(self) -> int:
        """Stop the publishers, let the consumers finish, stop them; return how many were redriven."""
        for role in self.roles:
            self.running[role].wait_line("ready")
        for role in self.roles[:2]:
            self.running[role].stop()
        crashed = 0
        while True:
            self.wait_empty()
            dead = file.rows(self.path, "SELECT seq FROM trunkline_dead_letter WHERE code = 'crashed'")
            if not dead:
                break
            crashed += len(dead)
            self.redrive([row[0] for row in dead])
        for role in self.roles[2:]:
            self.running[role].stop()
        return crashed

    def wait_empty(self) -> None:
        """Wait until nothing waits but what stands behind a message set aside after crashes.

        Raises: StalledError when nothing is settled for too long.
        """
        began = told = time.monotonic()
        patience = Patience(self.stall_s, began)
        before = file.number(self.path, SETTLED)
        while (waiting := file.backlog(self.path)) != file.number(self.path, HELD):
            settled, now = file.number(self.path, SETTLED), time.monotonic()
            what = f"{waiting} wait, {settled - before} settled in {now - began:.0f} s"
            patience.look(settled, now, what)
            if now - told >= TELL_S:
                told = now
                self.say(f"draining: {what}")
            time.sleep(LOOK_S)
        settled = file.number(self.path, SETTLED) - before
        self.say(f"drained: {settled} settled in {time.monotonic() - began:.0f} s, {waiting} held by dead letters")

    def redrive(self, dead: list[int]) -> None:
        for seq in dead:
            with Process(
                "trunkline.cli",
                ["dead", "redrive", str(seq), "--transport", self.url],
                self.folder / "redrive.log",
            ) as process:
                assert process.wait() == 0, process.tail()

    def report(self, cycles: int, crashed: int, began: float) -> Report:
        verdict = check(
            numbers.entries([self.journal(role) for role in self.roles[:2]]),
            file.effects(self.path),
            drained=file.backlog(self.path) == 0,
            ordered=numbers.ordered,
        )
        report = Report(self.seed, cycles, verdict, self.kills, self.in_start, 0, crashed)
        for sql, wanted in CHECKS.items():
            found = file.number(self.path, sql)
            if found != wanted:
                report.problems.append(f"{found} instead of {wanted}: {sql}")
        if not file.is_sound(self.path):
            report.problems.append("the database fails its integrity check")
        handled = file.number(self.path, "SELECT count(*) FROM trunkline_inbox")
        wanted = file.number(self.path, HANDLED)
        if handled != wanted:
            report.problems.append(f"{handled} inbox rows for {wanted} handled messages")
        begun = [entry for role in self.roles[2:] for entry in read_journal(self.journal(role))]
        report.absorbed = len(begun) - len(set(begun))
        report.seconds = time.monotonic() - began
        return report

    def close(self) -> None:
        for process in self.running.values():
            process.close()


CHECKS = {
    "SELECT count(*) FROM trunkline_dead_letter": 0,
    "SELECT count(*) FROM trunkline_attempt": 0,
    "SELECT count(*) FROM trunkline_queue": 0,
    "SELECT count(*) FROM trunkline_process": 0,
    "SELECT count(*) FROM trunkline_member": 0,
    "SELECT count(*) FROM trunkline_partition WHERE owner IS NOT NULL": 0,
}
# What the consumers have done with messages, whether well or not; it only rises while they drain.
SETTLED = "SELECT (SELECT count(*) FROM trunkline_inbox) + (SELECT count(*) FROM trunkline_dead_letter)"
HELD = (
    "SELECT count(*) FROM trunkline_parked p WHERE EXISTS"
    " (SELECT 1 FROM trunkline_dead_letter d WHERE d.reader = p.reader AND d.key = p.key AND d.holds)"
)
# Each effect of an own kind is one handled message, each other one two: the message and its Answer.
HANDLED = "SELECT count(*) + count(*) FILTER (WHERE key LIKE 'follow%') FROM effect"


def run(folder: Path, cycles: int, seed: int, *, pause_s: float = 0.02, say: Callable[[str], object] = print) -> Report:
    """Kill `cycles` times, then drain and check."""
    began = time.monotonic()
    test = Run(folder, seed, pause_s, say)
    try:
        for role in test.roles:
            test.start(role)
        for number in range(1, cycles + 1):
            test.cycle()
            if number % 100 == 0:
                say(f"{number} kills, {len(file.effects(test.path))} effects, {time.monotonic() - began:.0f} s")
        return test.report(cycles, test.drain(), began)
    finally:
        test.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill -9 processes of the embedded engine and check the ledger.")
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    parser.add_argument("--pause", type=float, default=0.02, help="seconds between the publishes of a lane")
    parser.add_argument("--folder", type=Path, help="where file, journals and logs stay; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = run(
            folder,
            options.cycles,
            options.seed,
            pause_s=options.pause,
            say=lambda line: sys.stdout.write(line + "\n") and sys.stdout.flush(),
        )
    sys.stdout.write(report.describe() + "\n")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
