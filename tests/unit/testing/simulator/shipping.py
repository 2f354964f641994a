"""A system of two services to simulate, with a bank that counts what it is asked, and checks that hold or do not."""

from trunkline import Context, Queue, Service, Stream, Struct, System
from trunkline.testing.simulator import Simulation

sales = Stream("simulated-sales", key="sale_id", partitions=2)
parcels = Queue("simulated-parcels")


@sales.event
class SaleMade(Struct):
    sale_id: str
    cents: int


@parcels.command
class SendParcel(Struct):
    sale_id: str


class Bank:
    """What the till calls."""

    async def charge(self, key: str, cents: int) -> None:
        """Take money."""


class CarefulBank:
    """Takes money once for each key."""

    def __init__(self):
        self.taken = {}

    def charge(self, key, cents):
        self.taken[key] = cents

    @property
    def total(self):
        return sum(self.taken.values())


class HastyBank:
    """Takes money as often as it is asked."""

    def __init__(self):
        self.total = 0

    def charge(self, key, cents):
        self.total += cents


till, post = Service("till"), Service("post")
till.schema("CREATE TABLE IF NOT EXISTS sale (id TEXT PRIMARY KEY, cents INTEGER)")
till.provide(Bank, Bank)


@till.handle
async def charge(sale: SaleMade, bank: Bank, ctx: Context) -> SendParcel:
    await bank.charge(ctx.message.id, sale.cents)
    tx = await ctx.transaction()
    await tx.execute("INSERT INTO sale VALUES (?, ?)", (sale.sale_id, sale.cents))
    return SendParcel(sale.sale_id)


@post.handle
async def send(parcel: SendParcel) -> None:
    """Hand it to the post."""


system = System("shipping", [till, post])


async def two_sales(sim):
    await sim.publish(SaleMade("s-1", 100))
    await sim.publish(SaleMade("s-2", 250))


def charged_once(view):
    booked = view.rows("till", "SELECT coalesce(sum(cents), 0) FROM sale")[0][0]
    taken = view.outside(Bank).total
    assert taken == booked, f"the bank has taken {taken}, the till says {booked}"


def make(bank=CarefulBank, workload=two_sales, **options):
    return Simulation(
        system,
        workload,
        **{"broker": "rabbitmq", "override": {Bank: bank}, "eventually": [charged_once]} | options,
    )


careful = make()
hasty = make(HastyBank)
