"""The inventory service: reserves what was paid for, or says that it cannot.

Invariant: the units taken from the shelf and the reservation are one commit with the event that
tells of them.
Read next: payment.py, which gives the money back for what is refused.
"""

from __future__ import annotations

from examples.shop.contracts import PaymentSucceeded, StockRefused, StockReserved
from examples.shop.orders import STOCK
from trunkline import Context, Service

inventory = Service("inventory")
inventory.schema(
    "CREATE TABLE IF NOT EXISTS stock (sku TEXT PRIMARY KEY, units INTEGER NOT NULL CHECK (units >= 0))",
    "CREATE TABLE IF NOT EXISTS reservation ("
    " order_id TEXT PRIMARY KEY, sku TEXT NOT NULL, quantity INTEGER NOT NULL CHECK (quantity > 0))",
    # The shelf of the first day; later starts change nothing.
    *(f"INSERT OR IGNORE INTO stock VALUES ('{sku}', {units})" for sku, units in STOCK.items()),  # noqa: S608 - our own
)


@inventory.handle
async def reserve(paid: PaymentSucceeded, ctx: Context) -> StockReserved | StockRefused:
    """Take the units from the shelf if there are enough."""
    tx = await ctx.transaction()
    taken = await tx.execute(
        "UPDATE stock SET units = units - ?1 WHERE sku = ?2 AND units >= ?1", (paid.quantity, paid.sku)
    )
    if not taken:
        return StockRefused(paid.order_id, paid.sku, paid.quantity)
    await tx.execute("INSERT INTO reservation VALUES (?, ?, ?)", (paid.order_id, paid.sku, paid.quantity))
    return StockReserved(paid.order_id, paid.sku, paid.quantity)
