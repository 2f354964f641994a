"""What a test of messaging code needs: an independent ledger of what was sent and what came of it.

Read next: ledger.py, conformance/__init__.py.
"""

from trunkline.testing.ledger import (
    Entry,
    Journal,
    Kind,
    Place,
    Verdict,
    check,
    check_conservation,
    check_offsets,
    read_journal,
)

__all__ = [
    "Entry", "Journal", "Kind", "Place", "Verdict", "check", "check_conservation", "check_offsets", "read_journal",
]  # fmt: skip
