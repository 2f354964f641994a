"""A process that handles until it is killed: `python -m tests.transports.rabbitmq_worker URL STORE`."""

import asyncio
import sys

from tests.transports.test_rabbitmq import service
from trunkline import App


class Printed(list):
    """Prints what is added, at once."""

    def append(self, item):
        print(*item, flush=True)


async def main(url: str, store: str) -> None:
    async with App(service(Printed()), url, store=store):
        print("ready", flush=True)
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
