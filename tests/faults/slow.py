"""A service whose handler takes as long as the message says; `python -m tests.faults.slow URL`."""

import asyncio
import logging
import sys

from trunkline import App, Context, Queue, Service, Struct

jobs = Queue("slow-jobs")


@jobs.command
class SlowJob(Struct):
    number: int
    seconds: float


worker = Service("slow")
worker.schema("CREATE TABLE IF NOT EXISTS effect (number INTEGER)")


@worker.handle
async def work(job: SlowJob, ctx: Context) -> None:
    print(f"begun {job.number}", flush=True)
    await asyncio.sleep(job.seconds)
    tx = await ctx.transaction()
    await tx.execute("INSERT INTO effect VALUES (?)", (job.number,))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    App(worker, sys.argv[1]).run()
