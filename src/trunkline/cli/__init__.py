"""The `trunkline` command.

Invariant: commands only arrange; what they do to messages is done by the transport, the store and the App.
`trunkline --help` loads no engine and draws with plain text, so that it answers at once.
Read next: commands.py.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process."""
    from trunkline.cli.commands import app

    app(prog_name="trunkline")
