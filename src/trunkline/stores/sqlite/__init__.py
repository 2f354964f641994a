"""The store in one SQLite file."""

from trunkline.stores.sqlite.letters import read_dead_letters
from trunkline.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore", "read_dead_letters"]
