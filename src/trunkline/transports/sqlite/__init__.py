"""Transport in one SQLite file: transport.py writes, reader.py reads, tables.py is what the file looks like."""

from trunkline.transports.sqlite.reader import BUFFER
from trunkline.transports.sqlite.tables import count_backlog, last_position, oldest, read_log, read_queue
from trunkline.transports.sqlite.transport import SqliteTransport

__all__ = ["BUFFER", "SqliteTransport", "count_backlog", "last_position", "oldest", "read_log", "read_queue"]
