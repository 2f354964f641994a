import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.unit.testing.simulator.acting import Acting, seen
from trunkline.errors import SimulationError
from trunkline.testing.simulator.watchdog import GAVE_UP, watchdog


def goes_round():
    while True:
        try:
            time.monotonic()
        except Exception:  # noqa: BLE001 - as some user code does
            continue


def waits_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def waits_for_a_queue():
    queue.Queue().get()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(watchdog, "limit_s", 0.2)
    # As in a program of a user: a test that ran an App may have left SIG_DFL, which nothing interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("function", [goes_round, waits_for_a_lock, waits_for_a_queue])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_step_that_does_not_come_back_ends_the_run_and_says_where_it_is(function, threaded, capfd):
    with pytest.raises(SimulationError) as caught:
        Acting(function, threaded=threaded).run()

    assert caught.value.code == "E705"
    assert "actor has not come back for 0.2 s" in caught.value.message
    assert f"in {function.__name__}" in caught.value.message
    stack = capfd.readouterr().err
    assert f"in {function.__name__}" in stack
    assert "SimulatedLoop._step" not in stack
    assert seen(lambda: 1) == 1


def test_a_run_of_many_short_steps_is_left_alone():
    acting = Acting(lambda: None)
    before = time.monotonic()
    while time.monotonic() < before + 0.6:
        assert acting.run().violations == []


def test_who_looks_at_a_step_in_a_debugger_may_take_their_time():
    debugger = {"__name__": "bdb", "threading": threading}

    assert seen(lambda: eval("threading.Event().wait(1)", debugger)) is False


def test_the_watch_ends_when_there_are_no_runs():
    seen(lambda: None)
    (looks,) = [thread for thread in threading.enumerate() if thread.name == "trunkline-watchdog"]

    looks.join(5)

    assert not looks.is_alive()
    assert seen(lambda: 1) == 1


def test_what_cannot_be_interrupted_ends_the_process():
    code = """
import signal, threading
from tests.unit.testing.simulator.acting import Acting
from trunkline.testing.simulator.watchdog import watchdog
watchdog.limit_s = 0.2
def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
Acting(deaf).run()
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)

    assert done.returncode == GAVE_UP
    assert "in deaf" in done.stderr
    assert "E705" in done.stderr
