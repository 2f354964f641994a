"""What the figures were measured on and with.

Invariant: nothing that names the machine, its user or its paths. Read next: report.py.
"""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import apsw

from benchmarks.peers import versions_of_peers


def machine_facts(folder: Path) -> dict[str, str]:
    """Return processor, memory, system and disk; measures the disk's flush in `folder`."""
    return {
        "processor": f"{_from('/proc/cpuinfo', 'model name') or platform.processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "disk": f"{_file_system(folder)}, fdatasync of 250 B: {_flush_us(folder):.0f} µs (median of 500)",
        "load": f"{os.getloadavg()[0]:.1f} before the first case (mean of 1 minute)",
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that takes part."""
    names = ("trunkline", "apsw", "msgspec", "uvloop")
    own = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return {**own, "sqlite": apsw.sqlite_lib_version(), **versions_of_peers()}


def _from(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return ""  # no Linux
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _file_system(folder: Path) -> str:
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except FileNotFoundError:
        return "unknown file system"
    inside = [(len(point), kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(inside)[1]


def _flush_us(folder: Path) -> float:
    path = folder / "flush"
    took = []
    with path.open("wb", buffering=0) as file:
        for _ in range(500):
            file.write(b"x" * 250)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    path.unlink()
    return median(took) * 1e6
