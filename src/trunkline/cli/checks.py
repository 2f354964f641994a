"""What the doctor looks at: machine, settings, file, processes, declarations.

Invariant: looking changes nothing and creates nothing; a check that cannot be made says so, it does not pass.
Read next: doctor.py.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import apsw
import msgspec

from trunkline.app import App, check_promises
from trunkline.cli.embedded import EmbeddedFile, file_path
from trunkline.cli.terminal import ago, size
from trunkline.clock import system_clock
from trunkline.config import Settings
from trunkline.engine import LEASE_S
from trunkline.errors import DefinitionError, TrunklineError
from trunkline.file_errors import unopened
from trunkline.service import System
from trunkline.store import INBOX_WINDOW_S
from trunkline.transport import load_adapter, parse_address

NETWORK = {
    "9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "lustre",
    "ncpfs", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "virtiofs",
}  # fmt: skip
LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.overlayfs"}
VOLATILE = {"tmpfs", "ramfs"}
NEED_FREE = 100_000_000
WANT_FREE = 1_000_000_000


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        status: `fail` makes the doctor exit 1; `warn` does not.
        found: what is the case. advice: what to do, if anything.
    """

    area: str
    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def environment() -> Iterator[Check]:
    """Yield the versions in use."""
    python = (
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    old = sys.version_info < (3, 11)
    yield Check("environment", "python", "fail" if old else "ok", python, "use 3.11 or later" if old else "")
    yield Check("environment", "trunkline", "ok", version("trunkline"))
    yield Check("environment", "msgspec", "ok", version("msgspec"))
    yield Check("environment", "apsw", "ok", f"{apsw.apsw_version()}, SQLite {apsw.sqlite_lib_version()}")
    try:
        yield Check("environment", "uvloop", "ok", version("uvloop"))
    except PackageNotFoundError:
        yield Check("environment", "uvloop", "warn", "not installed; asyncio's own loop is slower", "install uvloop")


def settings_checks(settings: Settings) -> Iterator[Check]:
    """Yield what is configured and whether it can be reached."""
    for name, url in (("transport", settings.transport), ("store", settings.store)):
        try:
            adapter = load_adapter(f"trunkline.{name}s", url, system_clock)
        except TrunklineError as error:
            yield Check("settings", name, "fail", f"{error.code} {error.message}", error.hint)
            if settings.store == settings.transport:
                return  # the store would only say the same of the same URL
            continue
        shown = f"{parse_address(url).shown} (from {settings.origin[name]})"
        capabilities = getattr(adapter, "capabilities", None)
        yield Check("settings", name, "ok", f"{shown}{': ' + capabilities.description if capabilities else ''}")


def file_checks(url: str, *, integrity: bool) -> Iterator[Check]:
    """Yield how the embedded file of `url` is; nothing for another kind of store.

    Args:
        integrity: also read the whole file.
    """
    if parse_address(url).scheme != "sqlite":
        return
    path = Path(file_path(url))
    area = f"file {path}"
    folder = path.resolve().parent
    if not folder.is_dir():
        yield Check(area, "folder", "fail", f"{folder} does not exist", "create it, or name another place")
        return
    writable = os.access(folder, os.W_OK)
    yield Check(
        area, "folder", "ok" if writable else "fail", f"{folder} {'can' if writable else 'cannot'} be written",
        "" if writable else "give this user the right to write there",
    )  # fmt: skip
    yield Check(area, "file system", *judge_file_system(file_system(folder)))
    yield _free_space(area, folder)
    try:
        exists = path.exists()
    except OSError as error:
        refused = unopened(str(path), error)
        yield Check(area, "file", "fail", refused.message, refused.hint)
        return
    if not exists:
        yield Check(area, "file", "warn", "does not exist yet", "the first `trunkline run` makes it")
        return
    try:
        with EmbeddedFile(str(path)) as file:
            yield from _inside(area, file, integrity=integrity)
    except TrunklineError as error:
        yield Check(area, "file", "fail", error.message, error.hint)


def _inside(area: str, file: EmbeddedFile, *, integrity: bool) -> Iterator[Check]:
    (mode,) = file.rows("PRAGMA journal_mode")[0]
    wal = mode == "wal"
    yield Check(area, "journal", "ok" if wal else "fail", mode, "" if wal else "start a service: it sets WAL")
    yield Check(area, "synchronous", "ok", "FULL, set by each process that writes: confirmed means on disk")
    total = sum(part.stat().st_size for suffix in ("", "-wal") if (part := Path(file.path + suffix)).exists())
    yield Check(area, "size", "ok", size(total))
    if integrity:
        said = [row[0] for row in file.rows("PRAGMA quick_check")]
        good = said == ["ok"]
        yield Check(
            area, "integrity", "ok" if good else "fail", "quick_check ok" if good else "; ".join(said[:3]),
            "" if good else "stop its services, keep a copy, restore a backup",
        )  # fmt: skip
    else:
        yield Check(area, "integrity", "warn", "not checked", "leave out --no-integrity")
    yield from _processes(area, file)
    parked, dead = (sum(getattr(counts, name) for counts in file.set_aside().values()) for name in ("parked", "dead"))
    if parked:
        yield Check(area, "parked", "warn", f"{parked} wait for a next try or behind another", "trunkline parked")
    if dead:
        yield Check(area, "dead letters", "warn", str(dead), "trunkline dead list")


def _processes(area: str, file: EmbeddedFile) -> Iterator[Check]:
    now = system_clock.now()
    processes = file.processes()
    alive = [process for process in processes if process.alive]
    listed = ", ".join(f"pid {process.pid} for {ago(now - process.started)}" for process in alive)
    yield Check(area, "processes", "ok", f"{len(alive)} alive" + (f": {listed}" if alive else ""))
    gone = [process for process in processes if not process.alive]
    if gone:
        pids = ", ".join(str(process.pid) for process in gone)
        yield Check(
            area, "died", "warn" if not alive else "ok", f"pid {pids} died without signing off",
            "the next process that starts takes their messages over" if not alive else "being taken over",
        )  # fmt: skip
    for process in alive:
        if now - process.beat > LEASE_S:
            yield Check(
                area, "heartbeat", "warn", f"pid {process.pid} is silent for {ago(now - process.beat)}",
                "it is stopped or blocked; others take its messages over",
            )  # fmt: skip


def judge_file_system(kind: str | None) -> tuple[Literal["ok", "warn", "fail"], str, str]:
    """Return (status, what is the case, what to do) for a type of file system."""
    if kind is None:
        return "warn", "unknown here", "it must be a local one: SQLite's WAL needs shared memory"
    if kind in NETWORK or (kind.startswith("fuse.") and kind not in LOCAL_FUSE):
        return "fail", f"{kind}, which may not keep locks and syncs", "use a local disk"
    if kind in VOLATILE:
        return "warn", f"{kind}: gone after a restart of the machine", "use a disk"
    return "ok", kind, ""


def file_system(folder: Path, mounts: Iterable[str] | None = None) -> str | None:
    """Return the type of the file system that holds `folder`, or None where the system does not tell.

    Args:
        mounts: lines of /proc/self/mountinfo (proc(5)), in tests.
    """
    if mounts is None:
        source = Path("/proc/self/mountinfo")
        if not source.exists():
            return None
        mounts = source.read_text(encoding="utf-8", errors="replace").splitlines()
    best, kind = "", None
    for line in mounts:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:  # noqa: PLR2004 - the mount point is the fifth
            continue
        point = fields[4].replace("\\040", " ")
        inside = str(folder) == point or str(folder).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def _free_space(area: str, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    if free < NEED_FREE:
        return Check(
            area,
            "free space",
            "fail",
            size(free),
            f"at least {size(NEED_FREE)} are needed; publishing stops when it is full",
        )
    status: Literal["ok", "warn"] = "warn" if free < WANT_FREE else "ok"
    return Check(area, "free space", status, size(free), f"less than {size(WANT_FREE)}" if status == "warn" else "")


def system_checks(system: System, settings: Settings) -> Iterator[Check]:
    """Yield whether the declarations hold together, can run here, and retries fit the inbox."""
    try:
        system.check()
        check_promises(App(system, settings.transport, store=settings.store))
        yield Check("system", "declarations", "ok", ", ".join(service.name for service in system.services))
    except DefinitionError as error:
        yield Check("system", "declarations", "fail", f"{error.code} {error.message}", error.hint)
    except TrunklineError as error:
        yield Check("system", "declarations", "warn", f"not checked: {error.code}", "see settings")
    yield _inbox(system, settings)


def _inbox(system: System, settings: Settings) -> Check:
    handlers = [handler for service in system.services for handler in service.handlers]
    longest = max((handler.options.retry.longest_s for handler in handlers), default=0.0)
    if parse_address(settings.store).scheme == "none":
        return Check(
            "system", "inbox window", "warn", "no inbox: a message may have its effects twice",
            "name a store, or let handlers bear repetition",
        )  # fmt: skip
    late = [handler.name for handler in handlers if handler.options.retry.longest_s >= INBOX_WINDOW_S]
    return Check(
        "system", "inbox window", "fail" if late else "ok",
        f"{ago(INBOX_WINDOW_S)}; the longest retry lasts {ago(longest)}" + (f" ({', '.join(late)})" if late else ""),
        "shorten delays_s: a retry after the window could have its effect twice" if late else "",
    )  # fmt: skip
