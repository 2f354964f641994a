"""Simulate a System: every crash of every process, then random faults, each failure repeated from its tape."""

from typing import Any

from trunkline.testing.simulator.fixture import simulate
from trunkline.testing.simulator.simulation import Client, Simulation
from trunkline.testing.simulator.tape import Tape
from trunkline.testing.simulator.world import Result, View, World

__all__ = ["Client", "HttpService", "Result", "Simulation", "Tape", "View", "World", "simulate"]


def __getattr__(name: str) -> Any:
    if name == "HttpService":  # httpx is the user's own
        from trunkline.testing.simulator.http import HttpService

        return HttpService
    raise AttributeError(name)
