"""`make demo`: real orders through the whole shop, `kill -9` in the middle, then the audit.

Each service is its own process; their tables are in one SQLite file, which also carries the messages unless a broker
does. Stripe, Twilio and the mail server are stand-ins on loopback. The orders are placed over REST, as a customer's
browser does.
Invariant: the exit code is 0 only if every check of the audit holds.
Read next: broker.py, processes.py, audit.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import httpx
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from examples.shop.audit import PLACED, AuditError, audit
from examples.shop.broker import EMBEDDED, LOCAL, Broker
from examples.shop.folder import claimed
from examples.shop.order import NewOrder
from examples.shop.orders import Purchase, read_purchases
from examples.shop.processes import DATABASE, ROOT, DemoError, Processes

DEFAULT_ORDERS = 2000
CUSTOMERS = 16
"""Requests under way at once."""
MOST_UNDER_WAY = 200
"""Orders placed and not ended; the customers wait while there are so many."""
UNPAID_AT_KILL = 4
"""Payment is killed while so many charges are under way."""
LOOK_S = 0.1
LINE_S = 2.0
FIRST_RETRY_S, LONGEST_RETRY_S = 0.02, 0.5
START_LIMIT_S = 60.0
TABLES = {"shop_order", "payment", "reservation", "notification"}


class Figures(msgspec.Struct):
    """How far everything is; all but the customers' side is read from the services' tables.

    Attributes:
        wanted: orders to place. placed: of these, answered. retries: requests without an answer.
        known: orders in the table, those of the page included. unpaid: of these, without an answer
            about the payment yet. notes: events in the histories.
        notes_due: how many there have to be for the orders that have ended.
    """

    wanted: int
    placed: int = 0
    retries: int = 0
    known: int = 0
    unpaid: int = 0
    confirmed: int = 0
    cancelled: int = 0
    mails: int = 0
    texts: int = 0
    notes: int = 0
    notes_due: int = 0

    @property
    def ended(self) -> int:
        """Return how many orders are confirmed or cancelled."""
        return self.confirmed + self.cancelled

    @property
    def under_way(self) -> int:
        """Return how many orders are placed and not ended."""
        return self.placed - self.ended

    @property
    def most_under_way(self) -> int:
        """Return how many orders may be under way; fewer when there are few, so that some are left for a kill."""
        return max(8, min(MOST_UNDER_WAY, self.wanted // 5))

    @property
    def all_done(self) -> bool:
        """Return whether every order has ended and every customer was told."""
        told = min(self.mails, self.texts)
        everything_placed = self.placed == self.wanted <= self.known
        return everything_placed and self.known == self.ended == told and self.notes >= self.notes_due


class Book:
    """The demo's look at the services' tables: read-only, and with the services' own SQLite."""

    def __init__(self, path: Path) -> None:
        """Open the file, which must exist."""
        self._connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        self._connection.set_busy_timeout(2000)

    def ready(self) -> bool:
        """Return whether every service has made its tables."""
        return {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master")} >= TABLES

    def read(self, figures: Figures) -> None:
        """Bring `figures` up to date."""
        ended = {
            (status, reason): count
            for status, reason, count in self._rows(
                "SELECT status, reason, count(*) FROM shop_order GROUP BY status, reason"
            )
        }
        told = dict[str, int](self._rows("SELECT kind, count(*) FROM notification GROUP BY kind"))
        figures.known = sum(ended.values())
        figures.unpaid = ended.get(("placed", None), 0)
        figures.confirmed = ended.get(("confirmed", None), 0)
        refused = ended.get(("cancelled", "payment refused"), 0)
        sold_out = ended.get(("cancelled", "out of stock"), 0)
        figures.cancelled = refused + sold_out
        figures.notes_due = 4 * figures.confirmed + 3 * refused + 5 * sold_out
        figures.mails, figures.texts = told.get("mail", 0), told.get("sms", 0)
        ((figures.notes,),) = self._rows("SELECT count(*) FROM history")

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql).fetchall()

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


class Demo:
    """One run: the processes, the customers and what they see."""

    def __init__(
        self, shop: Processes, purchases: list[Purchase], console: Console, restart: Broker | None = None
    ) -> None:
        """Take what runs.

        Args:
            restart: the broker to restart in the middle, instead of killing services.
        """
        self.shop = shop
        self._restart = restart
        self.purchases = purchases
        self.console = console
        self.figures = Figures(len(purchases))
        self.began = time.monotonic()
        self.took_s = float("nan")
        self._dead: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Return how many orders ended per second of the whole run."""
        return self.figures.ended / self.took_s

    async def run(self) -> None:
        """Place every order, kill and restart services meanwhile, wait until all have ended.

        Raises: DemoError if a service ends by itself; ExceptionGroup of it.
        """
        await self._started()
        book = Book(self.shop.folder / DATABASE)
        try:
            self.began = time.monotonic()
            limit_s = 90 + 0.1 * len(self.purchases)
            try:
                async with asyncio.timeout(limit_s), asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._place_all())
                    tasks.create_task(self._break_things(book))
                    await self._watch(book)
            except TimeoutError:
                self.say(f"[red]not everything ended within {limit_s:.0f} s; the audit says what is missing[/]")
            self.took_s = time.monotonic() - self.began
        finally:
            book.close()

    def say(self, text: str) -> None:
        """Print one line with the time since the first order."""
        self.console.print(f"[dim]{time.monotonic() - self.began:6.1f} s[/]  {text}", highlight=False, soft_wrap=True)

    async def _started(self) -> None:
        path = self.shop.folder / DATABASE
        self.shop.start_standins()
        self.shop.start()
        await self._until(path.exists, START_LIMIT_S)
        book = Book(path)
        try:
            await self._until(book.ready, START_LIMIT_S)
        finally:
            book.close()
        async with _customer(self.shop.url) as client:
            await self._until_answered(client)

    async def _until(self, condition: Callable[[], bool], limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            self.shop.check()
            if time.monotonic() > end:
                raise DemoError(
                    f"the services were not ready after {limit_s:.0f} s; see the logs in {self.shop.folder}"
                )
            await asyncio.sleep(LOOK_S)

    async def _until_answered(self, client: httpx.AsyncClient) -> None:
        async with asyncio.timeout(START_LIMIT_S):
            while True:
                try:
                    (await client.get("/orders", params={"limit": 1})).raise_for_status()
                except httpx.TransportError:
                    self.shop.check()
                    await asyncio.sleep(LOOK_S)
                else:
                    return

    # --- the customers ---

    async def _place_all(self) -> None:
        waiting = iter(self.purchases)
        with (self.shop.folder / PLACED).open("a", buffering=1) as answered:

            async def customer(client: httpx.AsyncClient) -> None:
                for purchase in waiting:
                    await self._place(client, purchase)
                    answered.write(f"{purchase.order_id}\n")
                    self.figures.placed += 1
                    while self.figures.under_way >= self.figures.most_under_way:  # noqa: ASYNC110 - as in _wait
                        await asyncio.sleep(LOOK_S)

            async with _customer(self.shop.url) as client, asyncio.TaskGroup() as customers:
                for _ in range(CUSTOMERS):
                    customers.create_task(customer(client))

    async def _place(self, client: httpx.AsyncClient, purchase: Purchase) -> None:
        """Send one order until there is an answer; its id makes the second time harmless."""
        body = msgspec.json.encode(_new_order(purchase))
        wait_s = FIRST_RETRY_S
        while True:
            try:
                answer = await client.post("/orders", content=body, headers={"content-type": "application/json"})
            except httpx.TransportError:
                pass  # the service is down; counted below
            else:
                if answer.is_success:
                    return
                if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    raise DemoError(f"order {purchase.order_id} was refused: {answer.status_code} {answer.text[:200]}")
            self.figures.retries += 1
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_RETRY_S)

    # --- what goes wrong ---

    async def _break_things(self, book: Book) -> None:
        figures = self.figures

        def amid_payments() -> bool:
            book.read(figures)
            enough = figures.ended >= figures.wanted // 4 and figures.unpaid >= UNPAID_AT_KILL
            return enough or figures.placed == figures.wanted

        await self._wait(amid_payments)
        if self._restart is not None:
            self.say(f"[red]the broker is restarted[/] ({figures.under_way} orders under way)")
            await self._restart.restart()
            self.say("[green]the broker answers again[/]")
            return
        self._kill("payment", "inventory")
        # Nothing can end now, so the orders pile up until the customers wait.
        await self._wait(self._customers_wait)
        self.say(f"{figures.under_way} orders wait")
        self._start("payment", "inventory")
        await self._wait(lambda: figures.ended >= figures.wanted * 6 // 10)
        self._kill("order", "notification")
        before = figures.retries
        # Without the order service nothing ends: in the end all customers wait, or try in vain.
        await self._wait(lambda: figures.retries > before or self._customers_wait())
        tries = figures.retries - before
        self.say(f"requests without an answer: {tries}; they are sent again" if tries else "the customers wait")
        self._start("order", "notification")

    def _customers_wait(self) -> bool:
        """Return whether no order can be placed at the moment."""
        figures = self.figures
        return figures.placed == figures.wanted or figures.under_way >= figures.most_under_way

    async def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - it is other processes that change it
            await asyncio.sleep(LOOK_S / 8)

    def _kill(self, *names: str) -> None:
        self._dead = names
        pids = ", ".join(f"{name} ({self.shop.services[name].pid})" for name in names)
        self.shop.kill(*names)
        self.say(f"[red]kill -9[/] {pids}")

    def _start(self, *names: str) -> None:
        self.shop.start(*names)
        self._dead = ()
        self.say(f"[green]started again[/] {', '.join(names)}")

    # --- what is seen ---

    async def _watch(self, book: Book) -> None:
        """Keep the figures up to date and show them, until all is done."""
        with self._shown() as show:
            while True:
                self.shop.check(but=self._dead)
                book.read(self.figures)
                show()
                if self.figures.all_done and not self._dead:
                    return
                await asyncio.sleep(LOOK_S)

    @contextmanager
    def _shown(self) -> Iterator[Callable[[], None]]:
        if self.console.is_terminal:
            with Live(self._picture(), console=self.console, auto_refresh=False) as live:
                yield lambda: live.update(self._picture(), refresh=True)
            return
        last = time.monotonic()

        def line() -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_S or self.figures.all_done:
                last = time.monotonic()
                self.say(self._line())

        yield line

    def _line(self) -> str:
        f = self.figures
        return (
            f"placed {f.placed:,} of {f.wanted:,} · confirmed {f.confirmed:,} · cancelled {f.cancelled:,}"
            f" · mails {f.mails:,} · SMS {f.texts:,} · {self._rate():.0f} orders/s"
        )

    def _rate(self) -> float:
        return self.figures.ended / max(time.monotonic() - self.began, 0.001)

    def _picture(self) -> RenderableType:
        f = self.figures
        bars = Table.grid(padding=(0, 2))
        for label, count, colour in (
            ("placed", f.placed, "blue"),
            ("confirmed", f.confirmed, "green"),
            ("cancelled", f.cancelled, "yellow"),
            ("mails", f.mails, "cyan"),
            ("SMS", f.texts, "cyan"),
        ):
            bar = ProgressBar(
                total=f.wanted, completed=min(count, f.wanted), width=44, complete_style=colour, finished_style=colour
            )
            bars.add_row(label, bar, f"{count:,}")
        services = Table.grid(padding=(0, 2))
        for name, child in self.shop.services.items():
            state = f"[green]●[/] process {child.pid}" if child.runs else "[bold red]✗ killed[/]"
            services.add_row(name, state, "[dim]killed and started again[/]" if child.kills and child.runs else "")
        foot = f"[dim]{f.wanted:,} real orders · {self._rate():.0f} ended per second · page: {self.shop.url}[/]"
        return Group("", bars, "", services, "", foot)


def _customer(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=CUSTOMERS, max_keepalive_connections=CUSTOMERS)
    return httpx.AsyncClient(base_url=url, timeout=30, limits=limits, trust_env=False)


def _new_order(purchase: Purchase) -> NewOrder:
    return NewOrder(**{name: getattr(purchase, name) for name in NewOrder.__struct_fields__})


# --- from the command line ---


def main(arguments: list[str]) -> int:
    """Run the demo; return the exit code."""
    options = _options(arguments)
    console = Console()
    # As Ctrl-C: what was started is stopped. Not by raising SIGINT, which is ignored in a background job.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with claimed(options.folder) as lock:
            broker = Broker(options.transport, options.folder)
            with Processes(options.folder, lock=lock, transport=broker.start()) as shop:
                return _run(shop, broker, options, console)
    except* (DemoError, AuditError, apsw.Error, sqlite3.Error) as errors:
        for error in _leaves(errors):
            console.print(f"The demo failed: {error}", style="bold red", markup=False, soft_wrap=True)
    except* KeyboardInterrupt:
        console.print("stopped")
    return 1


def _run(shop: Processes, broker: Broker, options: argparse.Namespace, console: Console) -> int:
    purchases = list(read_purchases(options.orders))
    if len(purchases) < options.orders:
        console.print(
            f"{options.orders:,} orders were asked for; the data holds {len(purchases):,}, and these are run.",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"[bold]The shop[/]: {len(purchases):,} real orders through four services, each its own process,"
        f" on {broker.name}.\nPage: {shop.url}   Files: {_short(shop.folder)}",
        highlight=False,
        soft_wrap=True,
    )
    demo = Demo(shop, purchases, console, broker if options.restart else None)
    try:
        asyncio.run(_until_terminated(demo.run()))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    shop.stop()
    console.print(
        f"{demo.figures.ended:,} orders ended in {demo.took_s:.1f} s, {demo.rate:.0f} per second,"
        f" with {sum(child.kills for child in shop.services.values())} kills; all services stopped.\n",
        highlight=False,
        soft_wrap=True,
    )
    holds = audit(shop.folder, console)
    if options.keep:
        shop.start()
        console.print(f"\nThe shop is open again: [bold]{shop.url}[/]   Ctrl-C closes it.", highlight=False)
        _until_interrupted(shop)
        shop.stop()
    return 0 if holds else 1


async def _until_terminated(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; SIGTERM cancels it, as Ctrl-C does: an interrupt amid any line of any task would break the loop."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101 - for the type checker
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        await work
    finally:
        signal.signal(signal.SIGTERM, before)


def _until_interrupted(shop: Processes) -> None:
    try:
        while True:
            shop.check()
            time.sleep(LINE_S)
    except KeyboardInterrupt:
        return


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Real orders through the shop, kill -9 in between, an audit.")
    parser.add_argument(
        "--orders",
        type=int,
        default=os.environ.get("ORDERS") or DEFAULT_ORDERS,
        help="how many, up to 6,919 (%(default)s)",
    )
    parser.add_argument(
        "--keep", action="store_true", default=os.environ.get("KEEP", "") not in ("", "0"), help="leave the shop open"
    )
    parser.add_argument(
        "--transport",
        default=os.environ.get("TRANSPORT") or EMBEDDED,
        help=f"what carries the messages: {EMBEDDED}, one of {', '.join(LOCAL)} (installed and started on loopback),"
        " or the URL of a broker that runs (%(default)s)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        default=os.environ.get("RESTART", "") not in ("", "0"),
        help="restart the broker in the middle instead of killing services",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "demo", help="for all files (build/demo)")
    options = parser.parse_args(arguments)
    if options.orders < 1:
        parser.error(f"--orders is {options.orders}; allowed: 1 and more")
    if options.transport not in (EMBEDDED, *LOCAL) and ":" not in options.transport:
        parser.error(f"--transport is {options.transport!r}; allowed: {EMBEDDED}, {', '.join(LOCAL)}, or a URL")
    if options.restart and options.transport not in LOCAL:
        parser.error(f"--restart needs a broker that the demo has started itself: one of {', '.join(LOCAL)}")
    options.folder = options.folder.resolve()
    return options


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
