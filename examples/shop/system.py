"""The shop: four services that know each other's events and nothing else.

Each can run in a process of its own, or all in one: see README.md.
Read next: contracts.py.
"""

from __future__ import annotations

from examples.shop.inventory import inventory
from examples.shop.notification import notification
from examples.shop.order import order
from examples.shop.payment import payment
from trunkline import System

system = System("shop", [order, payment, inventory, notification])
