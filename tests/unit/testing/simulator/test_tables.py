"""Tables are emptied between two runs, whatever refers to what."""

import apsw
import pytest

from trunkline.testing.simulator.tables import Tables

PARENT = "CREATE TABLE IF NOT EXISTS parent (id INTEGER PRIMARY KEY)"
CHILD = "CREATE TABLE IF NOT EXISTS child (parent INTEGER NOT NULL REFERENCES parent)"


@pytest.fixture
def tables():
    made = Tables()
    made.run_schema([PARENT, CHILD])
    made.connection.execute("INSERT INTO parent VALUES (1)")
    made.connection.execute("INSERT INTO child VALUES (1)")
    return made


def test_tables_that_refer_to_each_other_are_emptied_and_go_on_to_do_so(tables):
    assert tables.empty()
    for name in ("parent", "child"):
        assert tables.connection.execute(f"SELECT count(*) FROM {name}").fetchall() == [(0,)]
    with pytest.raises(apsw.ConstraintError):
        tables.connection.execute("INSERT INTO child VALUES (1)")


def test_a_database_with_another_schema_than_its_service_made_is_not_used_again(tables):
    tables.connection.execute("CREATE TABLE more (id)")
    assert not tables.empty()


def test_tables_that_a_later_run_of_the_schema_makes_are_emptied_too(tables):
    tables.run_schema([PARENT, CHILD, "CREATE TABLE more (id)"])
    tables.connection.execute("INSERT INTO more VALUES (1)")
    assert tables.empty()
    assert tables.connection.execute("SELECT count(*) FROM more").fetchall() == [(0,)]
