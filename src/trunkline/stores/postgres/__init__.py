"""The store in PostgreSQL: store.py is the contract, tables.py what the schema looks like."""

from trunkline.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
