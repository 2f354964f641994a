"""The files of a new project.

Invariant: what is written here is what tests/unit/cli/test_new.py runs. Read next: new.py.
"""

from __future__ import annotations


def files(name: str, module: str) -> dict[str, str]:
    """Return path → text of a project called `name` whose module is `module`."""
    texts = {
        "pyproject.toml": _PYPROJECT,
        "trunkline.toml": _SETTINGS,
        f"{module}.py": _MODULE,
        f"tests/test_{module}.py": _TESTS,
        "README.md": _README,
        ".gitignore": _IGNORE,
    }
    return {path: text.replace("NAME", name).replace("MODULE", module) for path, text in texts.items()}


_PYPROJECT = """\
[project]
name = "NAME"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["trunkline", "msgspec"]

[dependency-groups]
dev = ["pytest"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
only-include = ["MODULE.py"]

[tool.pytest.ini_options]
pythonpath = ["."]
testpaths = ["tests"]
"""

_SETTINGS = """\
# Arguments and TRUNKLINE_TRANSPORT, TRUNKLINE_STORE go before what stands here.
app = "MODULE:system"
transport = "sqlite:///NAME.db"
"""

_IGNORE = """\
__pycache__/
*.db
*.db-*
.venv/
"""

_MODULE = '''\
"""Confirms orders while the stock lasts."""

from typing import Annotated

from msgspec import Meta
from trunkline import Context, Service, Stream, Struct, System

orders = Stream("orders", key="order_id")


@orders.event
class OrderPlaced(Struct):
    order_id: str
    quantity: Annotated[int, Meta(ge=1)]  # checked where it is read


@orders.event
class OrderConfirmed(Struct):
    order_id: str


@orders.event
class OrderRefused(Struct):
    order_id: str
    reason: str


service = Service("NAME")
service.schema(
    "CREATE TABLE IF NOT EXISTS stock (id INTEGER PRIMARY KEY CHECK (id = 1), units INTEGER NOT NULL)",
    "INSERT INTO stock VALUES (1, 100) ON CONFLICT DO NOTHING",
)


@service.handle
async def confirm(order: OrderPlaced, ctx: Context) -> OrderConfirmed | OrderRefused:
    """Take the order out of stock. The update and the answer are one commit: both happen once, or neither."""
    transaction = await ctx.transaction()
    taken = await transaction.execute(
        "UPDATE stock SET units = units - ? WHERE units >= ?", (order.quantity, order.quantity)
    )
    if taken:
        return OrderConfirmed(order.order_id)
    return OrderRefused(order.order_id, "out of stock")


system = System("NAME", [service])
'''

_TESTS = '''\
"""The service at work on a real file, watched by a second service."""

import asyncio

from trunkline import App, Service, System

from MODULE import OrderConfirmed, OrderPlaced, OrderRefused, service


def answers(orders, tmp_path):
    """Publish the orders; return what the service answers to each, in order."""

    async def work():
        heard = asyncio.Queue()
        watcher = Service("watcher")

        @watcher.handle
        async def confirmed(event: OrderConfirmed) -> None:
            heard.put_nowait(event)

        @watcher.handle
        async def refused(event: OrderRefused) -> None:
            heard.put_nowait(event)

        system = System("test", [service, watcher])
        async with App(system, transport=f"sqlite:///{tmp_path}/test.db") as app, asyncio.timeout(20):
            found = []
            for order in orders:
                await app.publish(order)
                found.append(await heard.get())
            return found

    return asyncio.run(work())


def test_an_order_within_the_stock_is_confirmed(tmp_path):
    assert answers([OrderPlaced("1", 2)], tmp_path) == [OrderConfirmed("1")]


def test_an_order_beyond_the_stock_is_refused(tmp_path):
    first, second = answers([OrderPlaced("1", 99), OrderPlaced("2", 2)], tmp_path)
    assert first == OrderConfirmed("1")
    assert second == OrderRefused("2", "out of stock")


def test_an_order_of_less_than_one_is_set_aside(tmp_path):
    async def work():
        system = System("test", [service])
        async with App(system, transport=f"sqlite:///{tmp_path}/test.db") as app, asyncio.timeout(20):
            await app.publish(OrderPlaced("1", -2))
            while not await app.store.dead_letters():
                await asyncio.sleep(0.01)
            return await app.store.dead_letters()

    (letter,) = asyncio.run(work())
    assert letter.code == "E412"
'''

_README = """\
# NAME

A service that confirms orders while the stock lasts, on Trunkline.

In the environment in which Trunkline is installed (`pip install /path/to/the/clone`):

```sh
pip install -e . pytest
pytest                     # its tests
trunkline run              # until Ctrl-C; messages and tables are in NAME.db
```

In a second terminal:

```sh
trunkline topology
trunkline publish OrderPlaced '{"order_id": "1", "quantity": 2}'
trunkline tail orders --from-start --no-follow
trunkline backlog
trunkline parked
trunkline outbox
trunkline dead list
trunkline doctor
```

`MODULE.py` is the service, `tests/` its tests, `trunkline.toml` where it runs.
"""
