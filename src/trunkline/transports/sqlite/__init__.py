"""Transport in one SQLite file: transport.py writes, reader.py reads."""

from trunkline.transports.sqlite.reader import BUFFER
from trunkline.transports.sqlite.transport import SqliteTransport, count_backlog, last_position

__all__ = ["BUFFER", "SqliteTransport", "count_backlog", "last_position"]
