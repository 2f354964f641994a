"""What becomes of a delivery, on PostgreSQL: the same tests that memory and the embedded file pass."""

import secrets
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.brokers import broker_url
from tests.unit import test_batch, test_delivery, test_refused_units
from tests.unit.rig import Rig
from trunkline.clock import ManualClock
from trunkline.transport import Subscription

ELSEWHERE = {
    # About connections and threads of the embedded file.
    "test_a_plain_function_runs_in_a_thread_and_its_writes_join_the_commit",
    "test_a_plain_function_that_fails_writes_nothing",
    "test_a_thread_that_outlives_its_time_writes_nothing_any_more",
    "test_a_thread_that_outlives_its_time_cannot_open_a_transaction",
    "test_a_held_transaction_is_reported_by_name",
    "test_a_transaction_is_reported_while_it_is_held",
    "test_a_statement_that_ends_the_unit_or_touches_our_tables_is_refused_however_it_is_written",
    "test_savepoints_and_questions_about_the_schema_are_allowed",
    "test_nothing_commits_by_itself_after_a_statement_undid_the_transaction",
    "test_a_unit_that_cannot_be_written_fails_alone",
    "test_a_unit_with_a_transaction_that_cannot_be_written_fails_alone",
    # A transaction here keeps nobody else from committing.
    "test_publishing_through_the_app_inside_a_transaction_is_refused_instead_of_waiting_for_itself",
    # It ends it by a DB-API connection.
    "test_a_handler_cannot_end_the_unit_of_work_itself",
    # It counts on an answer in the same turn of the loop.
    "test_a_handler_may_ask_for_another_time",
    # What it sends is refused elsewhere, and ends the App.
    "test_what_a_caller_held_whose_unit_was_refused_is_not_kept_in_memory",
    # It names its file itself.
    "test_what_a_relay_had_taken_is_sent_by_the_next_process",
}
for _module in (test_batch, test_delivery, test_refused_units):
    globals().update(
        (name, value)
        for name, value in vars(_module).items()
        if name == "job" or (name.startswith("test_") and name not in ELSEWHERE)
    )


class PostgresRig(Rig):
    """Looks into a database of its own."""

    def __init__(self, url: str, clock: ManualClock) -> None:
        super().__init__(url, clock)
        self.connection = psycopg.connect(url, autocommit=True)

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Return rows."""
        return self.connection.execute(sql.replace("?", "%s"), parameters).fetchall()

    def parked(self) -> int:
        """Return how many messages are parked."""
        return self.query("SELECT count(*) FROM trunkline.parked")[0][0]

    def outbox_due(self) -> int:
        """Return how many staged messages should have left by now."""
        return self.query("SELECT count(*) FROM trunkline.outbox WHERE due <= ?", (self.clock.now(),))[0][0]

    async def _write_bytes(self, subscription: Subscription, raw: bytes, partition: int) -> None:
        transport: Any = self.app.transport
        reader = transport._readers[subscription.label]
        if subscription.channel.kind == "stream":
            self.query(
                "WITH h AS (UPDATE trunkline.head SET next = next + 1 WHERE channel = ? AND partition = ?"
                " RETURNING channel, partition, next - 1 AS position)"
                " INSERT INTO trunkline.log SELECT channel, partition, position, 0, ? FROM h RETURNING 1",
                (reader.channel, partition, raw),
            )
        else:
            self.query(
                "INSERT INTO trunkline.message SELECT ? + nextval('trunkline.message_row'), 0, false, ? RETURNING 1",
                ((reader.number * 16 + 9) << 40, raw),
            )
        transport.changed({"*"})


@pytest.fixture
def database() -> Iterator[str]:
    """Return the URL of a new database."""
    url, name = broker_url("postgres"), f"test_{secrets.token_hex(6)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield urlsplit(url)._replace(path=name).geturl()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def rig(database, clock) -> Iterator[PostgresRig]:
    found = PostgresRig(database, clock)
    yield found
    found.connection.close()


@pytest.fixture
def file_rig(rig) -> PostgresRig:
    return rig
