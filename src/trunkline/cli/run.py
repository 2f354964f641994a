"""`trunkline run`: one process of a system, or several under a supervisor.

Invariant: a stop by signal drains and exits 0; every other end has its exit code and one line that says why.
Read next: supervisor.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from trunkline.cli import options
from trunkline.cli.target import Target, load_target
from trunkline.cli.terminal import FAILED, printable
from trunkline.config import Settings, load_settings
from trunkline.errors import ConfigurationError, TrunklineError
from trunkline.policies.retry import describe
from trunkline.transport import parse_address

if TYPE_CHECKING:
    from trunkline.app import App

PARENT_PIPE = "TRUNKLINE_SUPERVISOR_FD"
"""Names the end of a pipe that closes when the supervisor dies, also by kill -9."""
WORKER = "TRUNKLINE_WORKER"
"""Number of this worker, for its log lines."""


class Level(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def run(
    target: options.Target = None,
    *,
    transport: options.Transport = None,
    store: options.Store = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="SERVICE", help="Run this service of the system alone; may be repeated."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, max=1024, help="Run so many processes.")] = 1,
    reload: Annotated[
        bool, typer.Option("--reload", help="Restart when a source file changes; for development.")
    ] = False,
    log_level: Annotated[Level, typer.Option("--log-level", help="Log from this level on.")] = Level.info,
) -> None:
    """Run a system until SIGTERM or Ctrl-C.

    It then stops receiving, finishes what is under way (up to 30 s) and exits 0. A second signal stops at once;
    nothing is lost, what was under way is delivered again.

    With --workers the processes share the work. One that dies is started again, after 0.5 s at first and up to
    30 s when it keeps dying. With --reload sources below the current folder are watched.

    Exit codes: 0 stopped by a signal, 1 failed, 2 wrong usage, configuration or declarations, 75 try again later:
    the file cannot be written now, or another process has taken over this one's messages.
    """
    settings = load_settings(transport=transport, store=store, app=target)
    start_logging(log_level.value)
    if reload or workers > 1:
        from trunkline.cli.supervisor import Supervisor

        urls = (settings.transport, settings.store)
        if not reload:
            app = _make_app(settings, only or [], transport=transport, store=store)
            app.system.check()
            urls = (app.transport_url, app.store_url)
        if workers > 1:
            _check_shared(urls, workers)
        command = _worker_command(settings, only or [], transport, store, log_level)
        raise typer.Exit(Supervisor(command, workers, watch=reload).run())
    app = _make_app(settings, only or [], transport=transport, store=store)
    try:
        serve(app)
    except TrunklineError:
        raise
    except Exception as error:
        if os.environ.get("TRUNKLINE_DEBUG"):
            raise
        typer.secho(
            f"{app.system.name} failed: {printable(describe(error))}; its traceback is in the log", fg="red", err=True
        )
        raise typer.Exit(FAILED) from None


def start_logging(level: str) -> None:
    """Log to stderr, one line per event, with the worker's number where there are several."""
    worker = os.environ.get(WORKER)
    place = f" worker-{worker}" if worker else ""
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s %(levelname)-7s{place} %(name)s: %(message)s", stream=sys.stderr
    )


def serve(app: App) -> None:
    """Run `app` on uvloop until a signal, or until the supervisor is gone."""
    work = _serve(app)
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


async def _serve(app: App) -> None:
    pipe = os.environ.get(PARENT_PIPE)
    if pipe is not None:
        asyncio.get_running_loop().add_reader(int(pipe), _orphaned, int(pipe))
    await app.serve()


def _orphaned(pipe: int) -> None:
    """The pipe is at its end: the supervisor has died, so this worker stops as if it had been told to."""
    import signal

    asyncio.get_running_loop().remove_reader(pipe)
    logging.getLogger("trunkline.run").warning("the supervisor is gone; stopping")
    os.kill(os.getpid(), signal.SIGTERM)


def _make_app(settings: Settings, only: list[str], *, transport: str | None, store: str | None) -> App:
    from trunkline.app import App

    target = load_target(settings)
    if target.app is not None:
        return _as_it_is(target, target.app, only, transport, store)
    system = target.system.only(only) if only else target.system
    return App(system, settings.transport, store=settings.store)


def _check_shared(urls: Iterable[str], workers: int) -> None:
    """Refuse what several processes cannot share.

    Raises: ConfigurationError E251.
    """
    for url in urls:
        if parse_address(url).scheme == "memory":
            raise ConfigurationError(
                "E251",
                f"{url} is the memory of one process; each of {workers} would have messages of its own",
                "leave out --workers, or name a file or a broker: --transport sqlite:///NAME.db",
            )


def _as_it_is(target: Target, app: App, only: list[str], transport: str | None, store: str | None) -> App:
    if only or transport or store:
        raise ConfigurationError(
            "E215",
            f"{target.name} is an App, which brings its own services, transport and store",
            "leave out --only, --transport and --store, or name the System",
        )
    return app


def _worker_command(
    settings: Settings, only: list[str], transport: str | None, store: str | None, log_level: Level
) -> list[str]:
    command = [sys.executable, "-m", "trunkline.cli", "run", settings.app or "", "--log-level", log_level.value]
    for option, value in (("--transport", transport), ("--store", store)):
        if value is not None:
            command += [option, value]
    for name in only:
        command += ["--only", name]
    return command
