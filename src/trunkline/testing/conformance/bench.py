"""Where a case works: channels, services, Apps and processes on the transport that is tested, all of its own.

Invariant: two cases never see each other's messages; at the end everything that was started is stopped.
Read next: core.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

import msgspec

from trunkline.app import App
from trunkline.channel import Channel
from trunkline.clock import Clock, Draws, system_clock
from trunkline.handler import Context, make_message
from trunkline.message import Message, read_packed
from trunkline.service import Service, System
from trunkline.store import Store, dead_letter_queue
from trunkline.testing import hostname
from trunkline.testing.conformance.registry import NEEDS, ConformanceError
from trunkline.testing.conformance.secret import Secret
from trunkline.testing.effects import EffectTable
from trunkline.testing.hostname import HostName
from trunkline.testing.ledger import Entry, Kind, Verdict, check, read_journal
from trunkline.testing.lines import Line, Spec
from trunkline.testing.processes import Process
from trunkline.testing.proxy import Proxy, at_place
from trunkline.testing.worker import Look, Plan, read_looks
from trunkline.transport import Capabilities, Delivery, Staged, Subscription, Transport, load_adapter, parse_address

LEASE_S = 1.0
POLL_S = 0.01
DEADLINE_S = 20.0
PORTS = {"amqp": 5672, "amqps": 5671, "nats": 4222, "tls": 4222, "redis": 6379, "rediss": 6379, "postgresql": 5432}
"""Default ports of the schemes whose broker is reached at one address, which a proxy can stand in for."""

Act = Callable[[Any, Context], Awaitable[None]]


class Controls(msgspec.Struct, frozen=True):
    """What a bench may do to the broker; what is None makes the cases that need it not applicable.

    Attributes:
        restart: stop the broker and start it on the same data; it answers when this returns.
        kill: end it at once. resume: start it again; it answers when this returns.
        publish_foreign: publish bytes and headers as another program would; first is the URL of the App under test.
        rotate: have the broker take this password of the URL's user and no other, and end that user's connections.
        name: the host name by which a broker that tells clients where it is names itself; it may be one that nobody
            knows. One that is reached at the address of the URL needs none.
    """

    restart: Callable[[], Awaitable[None]] | None = None
    kill: Callable[[], Awaitable[None]] | None = None
    resume: Callable[[], Awaitable[None]] | None = None
    publish_foreign: Callable[[str, Channel, bytes, dict[str, str]], Awaitable[None]] | None = None
    rotate: Callable[[str], Awaitable[None]] | None = None
    name: str | None = None


class Reader:
    """A service with one handler for each of some lines, which notes what it gets.

    Attributes:
        begun: payloads in the order in which handling began, each as often as it did.
        seen: payloads whose handler came to its end.
        attempts: (number, ctx.attempt) for each beginning.
        messages: envelopes, as `begun`.
    """

    def __init__(self, lines: Iterable[Line], act: Act | None, name: str, options: dict[str, Any]) -> None:
        self.service = Service(name)
        self.begun: list[Any] = []
        self.seen: list[Any] = []
        self.attempts: list[tuple[int, int]] = []
        self.messages: list[Message] = []
        self._act = act
        for line in lines:
            self._add(line.type, options)

    def _add(self, cls: Any, options: dict[str, Any]) -> None:
        async def handle(message: Any, ctx: Context) -> None:
            self.begun.append(message)
            self.attempts.append((message.seq, ctx.attempt))
            self.messages.append(ctx.message)
            if self._act is not None:
                await self._act(message, ctx)
            self.seen.append(message)

        handle.__annotations__ = {"message": cls, "ctx": Context, "return": None}
        self.service.handle(**options)(handle)

    def numbers(self) -> list[int]:
        """Return the numbers of what came to its end."""
        return [message.seq for message in self.seen]


class Worker:
    """A consumer or publisher that is a process of its own."""

    def __init__(self, plan: Plan, process: Process) -> None:
        self.plan = plan
        self.process = process

    def journal(self) -> list[Entry]:
        """Return what it has written down so far."""
        path, growing = Path(self.plan.journal), self.process.alive()
        return list(read_journal(path, growing=growing)) if path.exists() else []

    def begun(self) -> list[tuple[str, str, int]]:
        """Return the messages whose handler began, each as often as it did."""
        return [(entry.producer, entry.key, entry.seq) for entry in self.journal() if entry.kind is Kind.DELIVERED]

    def looks(self) -> list[Look]:
        """Return how it was at several moments."""
        return read_looks(Path(self.plan.journal))


class DeadLetter(msgspec.Struct, frozen=True):
    """A dead letter, wherever it is kept."""

    code: str
    reason: str
    message_id: str
    number: int = 0


class Bench:
    """Everything a case needs; an async context manager.

    Args:
        transport: URL of what is tested. A transport that is no file must take the option `prefix`.
        store: URL of a store; default: the transport's own.
        folder: for files and journals.
        controls: what may be done to the broker.
        lease_s: how long a silent process keeps what it holds; default: the URL's `lease_s`, or LEASE_S.
        clock: another one in a simulation.
        slow: patience with a slow machine or broker: each deadline is so many times longer.
    """

    def __init__(
        self,
        transport: str,
        store: str | None = None,
        *,
        folder: Path,
        controls: Controls | None = None,
        lease_s: float | None = None,
        slow: float = 1.0,
        seed: int = 7,
        clock: Clock = system_clock,
    ) -> None:
        self.clock = clock
        self.folder = folder
        self.controls = controls or Controls()
        self.draws = Draws(seed)
        self.note = ""
        self.tag = f"c{self.clock.new_id()[-8:]}"
        self.url = self._isolated(transport)
        self.store_url = self.url if store is None else self._isolated(store)
        address = parse_address(self.url)
        self.scheme = address.scheme
        self.lease_s = lease_s or float(address.options.get("lease_s", LEASE_S))
        self.slow = slow
        self.capabilities: Capabilities = load_adapter("trunkline.transports", self.url, self.clock).capabilities
        store_class: Store = load_adapter("trunkline.stores", self.store_url, self.clock)
        self.keeps, self.remembers = store_class.keeps, store_class.remembers
        self.table = EffectTable(self.store_url, f"effect_{self.tag}") if EffectTable.fits(self.store_url) else None
        self._lines: list[Line] = []
        self._apps: list[App] = []
        self._workers: list[Worker] = []
        self.proxies: list[Proxy] = []
        self._secrets: list[Secret] = []
        self._graves: dict[str, list[Message]] = {}

    def _isolated(self, url: str) -> str:
        """Return a URL under which nothing is there yet."""
        scheme, _, rest = url.partition(":")
        place, _, options = rest.partition("?")
        if scheme == "sqlite":
            return f"sqlite:///{self.folder / self.tag}.db" + (f"?{options}" if options else "")
        if scheme in {"memory", "none"}:
            return url
        given = dict(parse_qsl(options, keep_blank_values=True))
        return f"{scheme}:{place}?{urlencode({**given, 'prefix': given.get('prefix', '') + self.tag})}"

    # --- what applies ---

    def can(self, need: str) -> bool:
        """Return whether something of NEEDS is there."""
        controls = self.controls
        found: object
        match need:
            case "keeps" | "remembers":
                found = getattr(self, need)
            case "restart" | "publish_foreign":
                found = getattr(controls, need)
            case "kill":
                found = controls.kill and controls.resume
            case "rotate":
                found = controls.rotate and parse_address(self.url).password
            case "proxy":
                found = self.scheme in PORTS
            case "name":
                found = self.scheme in PORTS or controls.name
            case "namespaces":
                found = hostname.namespace()
            case _:
                found = getattr(self.capabilities, need)
        return bool(found)

    def reason(self, need: str) -> str:
        """Return why something of NEEDS is not there."""
        return f"{need}: {NEEDS[need]}"

    @property
    def patience_s(self) -> float:
        """Return how much longer than usual anything may take here."""
        return (self.slow - 1) * DEADLINE_S + 2 * self.lease_s

    # --- declarations ---

    def line(self, kind: str = "queue", name: str = "", **options: Any) -> Line:
        """Return a new channel with its type; `options` as for Spec."""
        spec = msgspec.convert({"kind": kind, "name": name or f"{kind}-{len(self._lines) + 1}", **options}, Spec)
        self._lines.append(made := Line(spec))
        return made

    def reader(self, *lines: Line, act: Act | None = None, name: str = "reader", **options: Any) -> Reader:
        """Return a service that reads `lines`; `options` as for `Service.handle`."""
        if not self.keeps and any(line.spec.kind == "stream" for line in lines):
            options.setdefault("after_dead_letter", "continue")  # nothing could hold the others back
        return Reader(lines, act, name, options)

    # --- Apps ---

    async def start(
        self,
        *readers: Reader | Service,
        url: str | None = None,
        store: str | None = None,
        grace_s: float = 10.0,
        watch: Callable[[Delivery], None] | None = None,
    ) -> App:
        """Start an App of these services; without any it only publishes. `watch` sees what the transport hands over."""
        services = [reader if isinstance(reader, Service) else reader.service for reader in readers]
        graves = self._grave_diggers(services)
        system = System("conformance", [*services, *graves] or [Service("publisher")])
        app = App(system, url or self.url, store=store or self.store_url, clock=self.clock, grace_s=grace_s)
        if watch is not None:
            watched(app.transport, watch)
        await app.start()
        self._apps.append(app)
        return app

    async def stop(self, app: App) -> None:
        """Stop an App before the end of the case."""
        self._apps.remove(app)
        await app.stop()

    def _grave_diggers(self, services: Sequence[Service]) -> list[Service]:
        """Return services that collect dead letters, where they are messages of a Queue."""
        if self.keeps:
            return []
        diggers = []
        for service in services:
            if not service.handlers or service.name in self._graves:
                continue
            found = self._graves.setdefault(service.name, [])
            digger = Service(f"graves-of-{service.name}")

            async def note(message: Message, found: list[Message] = found) -> None:
                found.append(message)

            digger.handle(from_=dead_letter_queue(service.name))(note)
            diggers.append(digger)
        return diggers

    async def dead_letters(self, app: App, name: str = "reader") -> list[DeadLetter]:
        """Return what the service `name` has set aside."""
        if self.keeps:
            rows = await app.store.dead_letters()
            return [DeadLetter(row.code, row.reason, row.message_id, row.number) for row in rows]
        found = []
        for message in self._graves.get(name, ()):
            why = message.extensions or {}
            found.append(DeadLetter(why["deadlettercode"], why["deadletterreason"], message.id))
        return found

    async def send(self, app: App, payloads: Sequence[Any], **attributes: Any) -> list[str]:
        """Publish in order, as one batch, with attributes; return the ids. All are confirmed then."""
        staged = [make_message(one, self.clock, "conformance", None, None, None, dict(attributes)) for one in payloads]
        await app.transport.send(staged)
        return [one.message.id for one in staged]

    async def send_staged(self, app: App, staged: Sequence[Staged]) -> None:
        """Hand messages to the transport as they are."""
        await app.transport.send(staged)

    # --- processes ---

    async def process(
        self, *lines: Line, role: str = "consume", ready: bool = True, knows: HostName | None = None, **plan: Any
    ) -> Worker:
        """Start a process that reads or publishes to `lines`; `plan` as for Plan, `knows` as its tests let it."""
        number = len(self._workers) + 1
        name = plan.pop("name", "reader" if role == "consume" else f"publisher-{number}")
        journal = plan.pop("journal", self.folder / f"{self.tag}-{number}.journal")
        values = {
            "role": role, "transport": self.url, "store": self.store_url, "lines": [line.spec for line in lines],
            "journal": str(journal), "name": name, "table": self.table.name if self.table else "", **plan,
        }  # fmt: skip
        made = msgspec.convert(values, Plan)
        process = self.launch(made, self.folder / f"{self.tag}-{number}.log", knows)
        self._workers.append(worker := Worker(made, process))
        if ready:
            await process.line("ready", DEADLINE_S * self.slow)
        return worker

    def launch(self, plan: Plan, log: Path, knows: HostName | None = None) -> Process:
        """Start the process of a worker; a simulation has another kind of process.

        Args:
            knows: the host name that it can resolve, and only while that says so.
        """
        through = () if knows is None else knows.command()
        return Process("trunkline.testing.worker", [msgspec.json.encode(plan).decode()], log, through=through)

    async def again(self, worker: Worker) -> Worker:
        """Start a worker that ended once more: the same plan and journal."""
        log = self.folder / f"{self.tag}-{len(self._workers) + 1}.log"
        made = Worker(worker.plan, self.launch(worker.plan, log))
        self._workers.append(made)
        await made.process.line("ready", DEADLINE_S * self.slow)
        return made

    async def effects_in(self, table: str) -> list[Entry]:
        """Return the effects in another table of the store, in the order in which they were committed."""
        return await EffectTable(self.store_url, table).read()

    async def effects(self) -> list[Entry]:
        """Return the effects of all workers, in the order in which they were committed."""
        if self.table is not None:
            return await self.table.read()
        consumers = [worker for worker in self._workers if worker.plan.role == "consume"]
        return [entry for worker in consumers for entry in worker.journal() if entry.kind is Kind.EFFECT]

    def published(self) -> list[Entry]:
        """Return the journals of all publishers."""
        publishers = {worker.plan.journal: worker for worker in self._workers if worker.plan.role == "publish"}
        return [entry for worker in publishers.values() for entry in worker.journal()]

    def deliveries(self) -> list[tuple[str, str, int]]:
        """Return the messages whose handler began in any worker, each as often as it did."""
        journals = {worker.plan.journal: worker for worker in self._workers if worker.plan.role == "consume"}
        return [begun for worker in journals.values() for begun in worker.begun()]

    async def drained(self, within_s: float = 0.0) -> None:
        """Wait until everything that was confirmed has had its effect."""

        async def missing() -> set[tuple[str, str, int]]:
            confirmed = {(one.producer, one.key, one.seq) for one in self.published() if one.kind is Kind.OK}
            return confirmed - {(one.producer, one.key, one.seq) for one in await self.effects()}

        end = self.clock.monotonic() + (within_s or DEADLINE_S) * self.slow + 2 * self.lease_s
        while left := await missing():
            if self.clock.monotonic() > end:
                what = f"{len(left)} confirmed messages had no effect, such as {sorted(left)[:5]}"
                raise ConformanceError(f"{what}; {await self._fate(left)}")
            await self.clock.sleep(0.1)

    async def _fate(self, missing: set[tuple[str, str, int]]) -> str:
        """Return what is known of messages that had no effect."""
        begun = [one for worker in self._workers if worker.plan.role == "consume" for one in worker.begun()]
        looks = [worker.looks() for worker in self._workers if worker.process.alive()]
        waiting = [seen[-1].waiting for seen in looks if seen]
        app = await self.start()
        letters = [f"{row.code}: {row.reason} ({row.raw[:200]!r})" for row in await app.store.dead_letters()]
        return (
            f"of these handlers began {sum(one in missing for one in begun)} times,"
            f" {waiting} wait for the processes that run, dead letters are {letters[:5]}"
        )

    async def verdict(self, *, ordered: bool) -> Verdict:
        """Return what the ledger says of publishers and effects, having seen everything confirmed have its effect."""
        return await self._verdict(lambda _key: ordered)

    async def verdict_by_channel(self, ordered: set[str]) -> Verdict:
        """Return the same; only the keys of the channels `ordered` must be in order."""
        return await self._verdict(lambda key: key.partition("/")[0] in ordered)

    async def _verdict(self, ordered: Callable[[str], bool]) -> Verdict:
        effects = await self.effects()
        if not self.remembers:
            seen: set[Entry] = set()
            effects = [one for one in effects if not (one in seen or seen.add(one))]  # type: ignore[func-returns-value]
        return check(self.published(), effects, drained=True, ordered=ordered)

    # --- the network and the broker ---

    async def proxy(self) -> tuple[Proxy, str]:
        """Return a proxy before the broker, and the URL that leads through it."""
        (name, port), *_ = parse_address(self.url).hosts
        proxy = Proxy(name, port or PORTS[self.scheme], seed=self.draws.randrange(1_000_000))
        self.proxies.append(proxy)
        await proxy.start()
        return proxy, proxy.url(self.url)

    async def named(self) -> tuple[HostName, str]:
        """Return a name of the broker that is not known yet, and the URL that has it."""
        (host, port), *_ = parse_address(self.url).hosts
        found = await asyncio.get_running_loop().getaddrinfo(host, None)
        name = HostName(self.controls.name or hostname.NAME, str(found[0][4][0]), self.folder / f"{self.tag}-names")
        return name, at_place(self.url, f"{name.name}:{port or PORTS[self.scheme]}")

    def secret(self) -> Secret:
        """Return the password of the URL's user, to be changed."""
        assert self.controls.rotate is not None  # noqa: S101 - the case needs `rotate`
        self._secrets.append(made := Secret(self.url, self.controls.rotate, self.tag))
        return made

    def store_for(self, url: str) -> str:
        """Return the URL of the store of an App on `url`: the same where transport and store are one."""
        return url if self.store_url == self.url else self.store_url

    async def restart_broker(self) -> None:
        """Stop the broker and start it on the same data."""
        assert self.controls.restart is not None  # noqa: S101 - the case needs `restart`
        await self.controls.restart()

    async def kill_broker(self) -> None:
        """End the broker at once."""
        assert self.controls.kill is not None  # noqa: S101 - the case needs `kill`
        await self.controls.kill()

    async def resume_broker(self) -> None:
        """Start the broker again."""
        assert self.controls.resume is not None  # noqa: S101 - the case needs `kill`
        await self.controls.resume()

    async def publish_foreign(self, line: Line, body: bytes, headers: dict[str, str]) -> None:
        """Publish as another program would."""
        assert self.controls.publish_foreign is not None  # noqa: S101 - the case needs `publish_foreign`
        await self.controls.publish_foreign(self.url, line.channel, body, headers)

    # --- waiting and judging ---

    async def until(self, condition: Callable[[], Any], what: Callable[[], object] | str, within_s: float = 0) -> Any:
        """Return the first true value of `condition`.

        Raises: ConformanceError with `what` if there is none in time.
        """
        limit_s = (within_s or DEADLINE_S) * self.slow + 2 * self.lease_s
        end = self.clock.monotonic() + limit_s
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            if self.clock.monotonic() > end:
                raise ConformanceError(f"not within {limit_s:g} s: {what if isinstance(what, str) else what()}")
            await self.clock.sleep(POLL_S)

    async def quiet(self, seconds: float = 0.3) -> None:
        """Give what should not happen the time to happen."""
        await self.clock.sleep(seconds)

    async def idle(self, app: App) -> None:
        """Wait until nothing waits for this App, nor is under way."""

        async def empty() -> bool:
            return not any(one.waiting for one in (await app.backlog()).values())

        await self.until(empty, "the backlog never came to 0")

    # --- the end ---

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        for worker in self._workers:
            worker.process.close()
        for line in self._lines:
            line.forget()
        for app in reversed(self._apps):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30 * self.slow):
                    await app.stop()
        for proxy in self.proxies:
            await proxy.stop()
        for secret in self._secrets:
            await secret.end()


def watched(transport: Transport, watch: Callable[[Delivery], None]) -> None:
    """Have `watch` see each delivery before the consumer does; envelopes that are still bytes are read for it."""
    receive = transport.receive

    async def look(subscription: Subscription, limit: int) -> list[Delivery]:
        deliveries = await receive(subscription, limit)
        for delivery in deliveries:
            if delivery.message is None and delivery.raw is not None:
                watch(msgspec.structs.replace(delivery, message=read_packed(delivery.raw)))
            else:
                watch(delivery)
        return deliveries

    transport.receive = look  # type: ignore[method-assign]


def equal(found: object, wanted: object, what: str) -> None:
    """Raise ConformanceError unless two values are equal."""
    if found != wanted:
        raise ConformanceError(f"{what}: {_short(found)} instead of {_short(wanted)}")


def must(condition: object, what: str) -> None:
    """Raise ConformanceError unless `condition` holds."""
    if not condition:
        raise ConformanceError(what)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:400]}… ({len(text)} characters)"
