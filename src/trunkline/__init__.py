"""Trunkline: services exchange messages with typed handlers, on one SQLite file or any broker.

Read next: docs/tutorial/first-service.md, then docs/architecture.md.
"""

from trunkline.app import App, Running
from trunkline.channel import Queue, Stream, Struct, Topic
from trunkline.errors import DiscardError, RejectError, RetryLaterError, TrunklineError
from trunkline.handler import Batch, Context
from trunkline.message import Message
from trunkline.policies.breaker import Breaker
from trunkline.policies.retry import Retry
from trunkline.service import Service, System

__all__ = [
    "App",
    "Batch",
    "Breaker",
    "Context",
    "DiscardError",
    "Message",
    "Queue",
    "RejectError",
    "Retry",
    "RetryLaterError",
    "Running",
    "Service",
    "Stream",
    "Struct",
    "System",
    "Topic",
    "TrunklineError",
]
__version__ = "0.1.0"
