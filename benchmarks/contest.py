"""One process of one contestant: `python -m benchmarks.contest module:function '{"messages": …}'`.

Invariant: the last line it prints is what it measured, as JSON. Read next: contestants/floors.py.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.cases import Run


def main() -> None:
    """Run what the command line names."""
    module, _, function = sys.argv[1].partition(":")
    given = json.loads(sys.argv[2])
    run = Run(given["messages"], Path(given["folder"]), Path(given["shared"]))
    measured = getattr(import_module(f"benchmarks.contestants.{module}"), function)(run, **given["options"])
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
