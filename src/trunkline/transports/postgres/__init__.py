"""Transport in PostgreSQL: transport.py writes, readers.py reads, tables.py is what the schema looks like."""

from trunkline.transports.postgres.transport import PostgresTransport

__all__ = ["PostgresTransport"]
