"""What a test of messaging code needs: an independent ledger of what was sent and what came of it.

Read next: ledger.py.
"""

from trunkline.testing.ledger import Entry, Journal, Kind, Verdict, check, read_journal

__all__ = ["Entry", "Journal", "Kind", "Verdict", "check", "read_journal"]
