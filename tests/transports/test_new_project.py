"""A new project runs on a database server as it is."""

import json

import pytest

from tests.unit.cli.conftest import Project, wait_until


@pytest.mark.xdist_group("postgres")
@pytest.mark.timeout(120)
def test_a_new_project_confirms_and_refuses_orders_on_postgresql(database, tmp_path):
    project = Project(tmp_path)
    project.cli("new", "order-desk")
    project.folder = tmp_path / "order-desk"
    settings = project.folder / "trunkline.toml"
    settings.write_text(settings.read_text().replace("sqlite:///order-desk.db", database))
    with project.running(started="runs on"):
        for order, quantity in enumerate((99, 2)):
            project.cli("publish", "OrderPlaced", json.dumps({"order_id": str(order), "quantity": quantity}))

        def types():
            shown = project.cli("tail", "orders", "--no-follow", "--json").out
            return sorted(json.loads(line)["type"] for line in shown.splitlines())

        wait_until(lambda: len(types()) == 4, "both orders are answered")
        assert types() == ["order.confirmed", "order.placed", "order.placed", "order.refused"]
