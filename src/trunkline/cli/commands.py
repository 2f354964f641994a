"""The commands and what they share: their names, global options, errors and exit codes.

Invariant: an error of ours is one line with its code and what to do next; a traceback only when asked for.
Read next: run.py, dead.py.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trunkline.cli import backlog, dead, doctor, new, outbox, parked, publish, run, simulate, tail, topology
from trunkline.cli.terminal import exit_code, plain, report
from trunkline.errors import TrunklineError

INTERRUPTED = 130
PIPE_CLOSED = 141
ORDER = ("run", "topology", "simulate", "publish", "tail", "backlog", "parked", "outbox", "dead", "doctor", "new")
"""Of the commands in the help: what one needs first comes first, what belongs together stands together."""


class Commands(TyperGroup):
    """The top of the command line: turns errors into lines and exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands as the help lists them."""
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        """Run one command."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = plain(error)
            raise
        except TrunklineError as error:
            report(error, with_traceback=bool(ctx.params.get("traceback") or os.environ.get("TRUNKLINE_DEBUG")))
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has gone; what the interpreter still flushes at exit goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None


app = typer.Typer(
    name="trunkline",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # the drawn help costs 0.3 s at each start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:  # noqa: FBT001 - an option's callback
    if wanted:
        from trunkline import __version__

        typer.echo(f"trunkline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error; so does TRUNKLINE_DEBUG=1.")
    ] = False,
) -> None:
    """Run, watch and repair services that exchange messages.

    The transport and the store come from --transport and --store, else TRUNKLINE_TRANSPORT and
    TRUNKLINE_STORE, else trunkline.toml in the current folder, else sqlite:///trunkline.db.

    Exit codes: 0 done, 1 failed, 2 wrong usage, configuration or declarations, 75 try again later.
    """


app.command("run")(run.run)
app.command("topology")(topology.topology)
app.command("simulate")(simulate.simulate)
app.command("publish")(publish.publish)
app.command("tail")(tail.tail)
app.command("backlog")(backlog.backlog)
app.command("parked")(parked.parked)
app.command("outbox")(outbox.outbox)
app.add_typer(dead.app, name="dead")
app.command("doctor")(doctor.doctor)
app.command("new")(new.new)
