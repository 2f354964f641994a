"""What leaves a simulation and is refused: sockets, files that change, processes, threads, blocking waits.

Invariant: what is refused ends the run, whatever the caller does with the error. The operating system's doors are
watched by an audit hook (PEP 578), which sees them however they are reached; it looks at the one thread that runs a
simulation, and only while a simulated process runs there. Files may be read: templates, certificates, source lines.
Never does: see what C code does without telling Python, such as a database driver's own sockets and threads.
Read next: interception.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

OUTSIDE = "let a stand-in take its place (override={Client: StandIn}), or leave the background function out (leave_out)"
FILES = (
    "files may be read; what is written belongs into the store, or behind a resource that `override` replaces;"
    " leave out (leave_out) a background function that writes"
)
PROCESSES = "put it behind a resource that `override` replaces, or leave the background function out (leave_out)"
THREADS = (
    "a `def` handler, asyncio.to_thread and run_in_executor work here; what starts threads of its own is"
    " replaced (override) or left out (leave_out)"
)
WAITS = "await asyncio.sleep; a `def` handler may sleep"

REFUSED = {
    **dict.fromkeys(
        (
            "socket.__new__", "socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg",
            "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo",
            "http.client.connect", "urllib.Request", "smtplib.connect", "ftplib.connect", "imaplib.open",
            "poplib.connect", "telnetlib.Telnet.open", "nntplib.connect", "webbrowser.open",
        ),
        OUTSIDE,
    ),
    **dict.fromkeys(
        (
            "sqlite3.connect", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
            "os.symlink", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree",
            "shutil.move", "shutil.copyfile", "shutil.make_archive", "shutil.unpack_archive", "tempfile.mkstemp",
            "tempfile.mkdtemp",
        ),
        FILES,
    ),
    **dict.fromkeys(
        (
            "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
            "os.startfile", "os.kill", "os.killpg", "pty.spawn", "signal.pthread_kill",
        ),
        PROCESSES,
    ),
}  # fmt: skip
"""Audit event → what to do instead. Source: docs.python.org/3/library/audit_events.html."""

_CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def refused(event: str, arguments: tuple[Any, ...]) -> tuple[str, str] | None:
    """Return what was called and what to do instead; None for what is allowed."""
    if event == "open":
        path, mode, flags = arguments
        changes = flags & _CHANGES if mode is None else any(letter in mode for letter in "wax+")
        if not changes or isinstance(path, int) or path == os.devnull:
            return None
        return f"open({path!r}, {mode or flags!r})", FILES
    how = REFUSED.get(event)
    if how is None or (event == "sqlite3.connect" and arguments[0] == ":memory:"):
        return None
    return f"{event}({_shown(event, arguments)})", how


def _shown(event: str, arguments: tuple[Any, ...]) -> str:
    """Return what an event was about: texts, numbers and addresses; never an object, whose text may call anything."""
    if event == "socket.__new__":
        return ""
    plain = [each for each in arguments if isinstance(each, str | bytes | int | tuple | list)]
    text = ", ".join(repr(each) for each in plain[:2])
    return text if len(text) <= 120 else f"{text[:117]}…"  # noqa: PLR2004 - one line


def hook(inside: Callable[[], Any]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return the audit hook.

    Args:
        inside: returns the loop whose simulated process runs in this thread now, or None.
    """

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in REFUSED:
            return
        loop = inside()
        if loop is not None:
            what = refused(event, arguments)
            if what is not None:
                loop.refuse(*what)

    return audit
