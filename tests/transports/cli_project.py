"""A project folder whose services run on a broker, and commands in it."""

from pathlib import Path

from tests.brokers import broker_url
from tests.unit.cli.conftest import Project

SHOP = """
from trunkline import Context, Queue, Retry, RetryLaterError, Service, Stream, Struct, System, Topic

orders = Stream("orders", key="order_id", partitions=4)
jobs = Queue("jobs")
news = Topic("news")


@orders.event
class OrderPlaced(Struct):
    order_id: str
    amount: int


@orders.event
class OrderPaid(Struct):
    order_id: str


@jobs.command
class Ship(Struct):
    order_id: str


@news.event
class Headline(Struct):
    text: str


payment = Service("payment")


@payment.handle(retry=Retry(immediate=0, delays_s=()))
async def pay(order: OrderPlaced, ctx: Context) -> OrderPaid:
    if order.amount < 0:
        raise ValueError(f"amount {order.amount} is below zero")
    if order.amount == 999:
        raise RetryLaterError(3600, "the bank is closed")
    return OrderPaid(order.order_id)


shipping = Service("shipping")


@shipping.handle
async def ship(job: Ship) -> None: ...


@shipping.handle
async def read(news: Headline) -> None: ...


system = System("shop", [payment, shipping])
"""


def on_broker(folder: Path, url: str, store: str | None = None) -> Project:
    """Return a project that `trunkline.toml` puts on a broker."""
    project = Project(folder)
    (folder / "shop.py").write_text(SHOP)
    settings = {"app": "shop:system", "transport": url, "store": store or f"sqlite:///{folder}/store.db"}
    (folder / "trunkline.toml").write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()))
    return project


def own_url(name: str, word: str, *settings: str) -> str:
    """Return the URL of a broker with names of its own for one test."""
    url = broker_url(name, *settings)
    return f"{url}{'&' if '?' in url else '?'}timeout_s=15&prefix={word}"
