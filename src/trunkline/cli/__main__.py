"""`python -m trunkline.cli`: the same as `trunkline`; how a supervisor starts its workers."""

from trunkline.cli import main

main()
