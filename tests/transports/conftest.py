"""What several of these tests need."""

import secrets
from urllib.parse import urlsplit

import asyncpg
import pytest

from tests.brokers import broker_url


@pytest.fixture
async def database():
    """The URL of a database of the test's own."""
    server, name = broker_url("postgres"), f"test_{secrets.token_hex(6)}"
    connection = await asyncpg.connect(server)
    await connection.execute(f"CREATE DATABASE {name}")
    yield urlsplit(server)._replace(path=name).geturl()
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()
