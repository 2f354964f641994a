"""However the demo ends, its processes end with it, and while one of them lives no other demo touches their files."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.shop.audit import PLACED
from examples.shop.folder import lock_of
from examples.shop.processes import DATABASE, ROOT, SERVICES

pytestmark = [pytest.mark.xdist_group("shop"), pytest.mark.timeout(240)]

LIMIT_S = 90


@contextmanager
def demo_in_the_background(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo whose services run, started as a shell without job control does it: SIGINT is ignored."""
    demo = [sys.executable, "-m", "examples.shop.demo", "--orders", "6919", "--folder", str(folder)]
    command = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash", *demo]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            assert any("placed" in line for line in process.stdout), "the demo ended before it placed an order"
            yield process
        finally:
            process.kill()


def noted(folder: Path) -> dict[str, int]:
    """The processes by name, as the lock tells."""
    return {name: int(pid) for name, pid in map(str.split, lock_of(folder).read_text().splitlines())}


def is_free(folder: Path) -> bool:
    """Whether the last process that inherited the lock has ended."""
    with lock_of(folder).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def until_free(folder: Path) -> bool:
    end = time.monotonic() + LIMIT_S
    while not (free := is_free(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return free


def test_sigterm_stops_a_demo_in_the_background_and_all_its_processes(tmp_path):
    folder = tmp_path / "demo"
    with demo_in_the_background(folder) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(LIMIT_S) == 1
    assert rest.splitlines()[-1] == "stopped"
    assert "Traceback" not in rest
    assert is_free(folder)


def test_the_services_and_stand_ins_end_when_the_demo_is_killed(tmp_path):
    folder = tmp_path / "demo"
    with demo_in_the_background(folder) as process:
        assert not is_free(folder)
        process.kill()
        process.wait()
    assert until_free(folder)
    assert "stopping" in (folder / "payment.log").read_text(), "it stopped as if told to"


def test_the_next_demo_names_what_a_killed_one_left_and_touches_none_of_its_files(tmp_path):
    folder = tmp_path / "demo"
    with demo_in_the_background(folder) as process:
        pids = noted(folder)
        assert set(pids) == {"demo", "stand-ins", *SERVICES}
        left = {name: pid for name, pid in pids.items() if name != "demo"}
        for pid in left.values():
            os.kill(pid, signal.SIGSTOP)  # so that they cannot end
        process.kill()
        process.wait()
    try:
        again = subprocess.run(
            [sys.executable, "-m", "examples.shop.demo", "--folder", str(folder)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert again.returncode == 1, again.stdout
        assert "of a demo that was killed still run" in again.stdout
        assert all(f"{name} ({pid})" in again.stdout for name, pid in left.items()), again.stdout
        assert "demo (" not in again.stdout
        assert (folder / DATABASE).exists()
        assert (folder / PLACED).stat().st_size > 0
    finally:
        for pid in left.values():
            os.kill(pid, signal.SIGCONT)
    assert until_free(folder)


def test_a_second_demo_is_told_who_has_the_folder(tmp_path):
    folder = tmp_path / "demo"
    with demo_in_the_background(folder) as process:
        again = subprocess.run(
            [sys.executable, "-m", "examples.shop.demo", "--folder", str(folder)],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert again.returncode == 1
        assert f"another demo runs in {folder}: demo ({process.pid})" in again.stdout
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)


def test_a_process_that_does_not_stop_without_its_parent_is_killed():
    stubborn = (
        "import signal; from examples.shop import tether; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "tether.watch(0, grace_s=0.1); print('ready', flush=True); signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", stubborn], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.close()
        assert process.wait(LIMIT_S) == -signal.SIGKILL
