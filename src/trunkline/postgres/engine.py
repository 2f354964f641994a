"""One schema of a PostgreSQL database: group commit, handlers' transactions, and the processes that share it.

Invariant: whatever `submit` was told is done is committed; a commit whose answer was lost is looked up, never guessed;
what has an order commits in that order, in a group or in a transaction of its own.
Never does: messages (transports/postgres) or inbox (stores/postgres). Read next: ../stores/postgres/store.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import asyncpg

from trunkline.clock import Clock
from trunkline.errors import LeaseLostError, TransportError
from trunkline.postgres.members import Members
from trunkline.postgres.schema import PROCESSES, ensure_part, in_schema
from trunkline.postgres.sessions import Sessions
from trunkline.postgres.settings import DRIVER_ERRORS, Settings, is_lost, is_of_server, translate
from trunkline.postgres.transaction import PostgresTransaction
from trunkline.store import DuplicateSignal, Unit
from trunkline.tasks import spawn
from trunkline.transport import Delivery

log = logging.getLogger("trunkline.postgres")
T = TypeVar("T")

GROUP_UNITS = 2000
"""Most units in one group."""
WAVE = 32
"""Publications in one group from which on half of their callers are told a moment later; see `_tell`."""
COMMIT_S = 5.0
"""How long the close waits for handlers' commits that are under way."""
TRIES = 3
"""How often a group is written that the server undid because others were in its way."""
_IN_THE_WAY = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError)


FENCE = """
WITH fence AS (
    UPDATE @process SET groups = $1, beat = now() WHERE id = $2 AND NOT dead
    RETURNING CASE WHEN $3::text IS NULL THEN '' ELSE pg_notify('CHANNEL', $3)::text END
)
"""
"""Begins a group that is one statement: no row if this process was taken over; wakes others with the words $3."""


class Stage(Protocol):
    """A part of the engine's group: what a transport or store writes for units.

    Attributes:
        part: its name in the layout. tables: their definitions.
    """

    part: str
    tables: str

    async def apply(self, connection: asyncpg.Connection, units: Sequence[Unit], told: set[str]) -> None:
        """Write `units` inside the open transaction; add to `told` what others are to hear of."""

    def alone(self, units: Sequence[Unit], told: set[str]) -> tuple[str, tuple[Any, ...], int] | None:
        """Return the one statement that writes `units`, its parameters and how many rows it adds; None if one cannot.

        It goes on after FENCE.
        """

    def committed(self, units: Sequence[Unit], *, alone: bool) -> None:
        """React to the commit of `units`; `alone`: of a handler's transaction, not of a group."""

    def changed(self, told: Collection[str]) -> None:
        """React to what this or another process committed."""

    def holds(self, delivery: Delivery) -> bool:
        """Return whether `delivery` is still this process's to settle."""

    async def reconnected(self, *, anew: bool) -> None:
        """React to a new connection; `anew`: what this process held was given to others meanwhile."""


Entry = tuple[tuple[Stage, ...], Unit]
"""A unit with those who write it, in their order."""


class _Job:
    """A function to run inside the writer's transaction, or just on its connection between two groups."""

    def __init__(self, function: Callable[[asyncpg.Connection], Awaitable[Any]], *, looks: bool = False) -> None:
        self.function = function
        self.looks = looks
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class _Commit:
    """A handler's transaction on its way to its commit; what follows it in order waits here."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.followers: list[Entry] = []
        self.started = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Engine:
    """The schema that `settings` names. One per process, URL and loop: use `open_engine`.

    Attributes:
        labels: subscriptions that Apps of this process read.
        relays: channel → the store of this process that sends its outbox.
        failure: what ended one of the tasks, or None. on_failure: called with it.
        owes: whether something was not given back: this process does not sign off then, so that others take it over.
    """

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.settings = settings
        self.clock = clock
        self.users = 0
        self.stages: list[Stage] = []
        self.labels: set[str] = set()
        self.relays: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.owes = False
        self.on_failure: list[Callable[[BaseException], None]] = []
        self.members = Members(self)
        self.sessions = Sessions(settings, clock, self.members.sessions, made=self._made, heard=self._heard)
        self.link = self.sessions.link
        self.fetch = self.sessions.fetch
        self.translate = self.sessions.translate
        self._pending: list[Entry] = []
        self._jobs: list[_Job] = []
        self._wake = asyncio.Event()
        self._commits: list[_Commit] = []
        self._gate = asyncio.Event()
        self._gate.set()
        self._started = 0
        self._none_started = asyncio.Event()
        self._none_started.set()
        self._groups = 0
        self._in_doubt = False
        self._told: set[str] = set()
        self._tasks: list[asyncio.Task[Any]] = []
        self._commit_tasks: set[asyncio.Task[None]] = set()
        self._begin_sql = self._fence_sql = ""
        self._opening: asyncio.Task[None] | None = None

    @property
    def writer(self) -> asyncpg.Connection | None:
        """Return the connection on which groups are written."""
        return self.sessions.writer

    @property
    def process(self) -> int:
        """Return the number of this process."""
        return self.members.number

    def sql(self, text: str) -> str:
        """Return a statement with the schema before each `@table`."""
        return in_schema(text, self.settings.schema)

    # --- opening and closing ---

    async def open(self) -> None:
        """Connect and sign on.

        Raises: ConfigurationError E205 or E244 to E248; TransportError E520.
        """
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
        await self._opening

    async def _open(self) -> None:
        await self.sessions.start()
        self._tasks = [self.spawn(self._work()), self.spawn(self.members.keep())]

    async def _made(self, writer: asyncpg.Connection) -> None:
        """Sign on over new connections."""
        await ensure_part(writer, self.settings, "process", PROCESSES)
        new = await self.members.sign_on(writer)
        self._begin_sql = self.sql(
            f"BEGIN; UPDATE @process SET groups = {{}}, beat = now() WHERE id = {self.process} AND NOT dead"  # noqa: S608
        )
        self._fence_sql = self.sql(FENCE).replace("CHANNEL", self.sessions.channel)
        for stage in self.stages:  # there are none at the first connection
            self._keep_task(self.spawn(stage.reconnected(anew=new)))

    def _keep_task(self, task: asyncio.Task[None]) -> None:
        self._commit_tasks.add(task)
        task.add_done_callback(self._commit_tasks.discard)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task without which there is no going on: an error that ends it is told to `on_failure`."""
        return spawn(coroutine, self._failed)

    def _failed(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
        for callback in self.on_failure:
            callback(error)

    async def add_stage(self, stage: Stage) -> None:
        """Let `stage` take part in each group; makes its tables."""

        async def ensure(connection: asyncpg.Connection) -> None:
            await ensure_part(connection, self.settings, stage.part, stage.tables)

        await self.look(ensure)
        self.stages.append(stage)

    def remove_stage(self, stage: Stage) -> None:
        """Forget a stage."""
        self.stages.remove(stage)

    async def close(self) -> None:
        """Commit what was submitted, sign off and disconnect."""
        if self._commit_tasks:
            await asyncio.wait(self._commit_tasks, timeout=COMMIT_S)
        self.sessions.end_pool()  # what a frozen server has not answered by now is not waited for
        await asyncio.gather(*self._commit_tasks, return_exceptions=True)
        if self.link.is_up and not self.owes:
            try:
                await self.run(self.members.sign_off)
            except TransportError as error:
                log.warning("%s: not signed off, others will notice: %s", self.settings.shown, error)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail([], self._closed_error())
        await self.sessions.close()

    def _closed_error(self) -> TransportError:
        return TransportError("E520", f"{self.settings.shown} is closed")

    # --- work for the next group ---

    def submit(self, stages: tuple[Stage, ...], unit: Unit) -> None:
        """Commit `unit`, as `stages` write it, with the next group."""
        self._enter((stages, unit))

    def _enter(self, entry: Entry) -> None:
        for commit in self._commits:
            if _ordered(commit.entry[1], entry[1]):
                commit.followers.append(entry)
                return
        self._pending.append(entry)
        self._wake_worker()

    async def run(self, function: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Run `function(connection)` in a transaction of its own after what was submitted; return its result.

        Raises: what `function` raises (its changes are undone); TransportError, also where the server refuses.
        """
        return cast("T", await self._enqueue_ours(_Job(function)))

    async def run_users(self, function: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Run a function with statements of the user's, as `run` does; what the server refuses is raised as it is."""
        return cast("T", await self._enqueue(_Job(function)))

    async def look(self, function: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """Run `function(connection)` after what was submitted, while nothing at all is being committed here.

        Raises: as `run`.
        """
        return cast("T", await self._enqueue_ours(_Job(function, looks=True)))

    async def _enqueue_ours(self, job: _Job) -> Any:
        try:
            return await self._enqueue(job)
        except asyncpg.PostgresError as error:
            raise translate(error, self.settings) from error

    async def _enqueue(self, job: _Job) -> Any:
        self._jobs.append(job)
        self._wake_worker()
        return await job.future

    def uncommitted(self) -> list[Unit]:
        """Return the units that were submitted and that nobody has begun to commit."""
        waiting = [commit for commit in self._commits if not commit.started]
        entries = [*self._pending, *(commit.entry for commit in waiting)]
        entries += [entry for commit in self._commits for entry in commit.followers]
        return [unit for _, unit in entries]

    # --- a handler's transaction ---

    async def begin(self, unit: Unit) -> PostgresTransaction:
        """Open a transaction for `unit`, after everything was committed that comes before it in order.

        Raises: TransportError.
        """
        if _has_order(unit):
            await self._predecessors(unit)
        connection, pool = await self.sessions.acquire()
        transaction = PostgresTransaction(connection, pool, self.settings)
        try:
            await transaction.start()
        except BaseException as error:
            await transaction.abandon()
            if isinstance(error, DRIVER_ERRORS):
                raise translate(error, self.settings) from error
            raise
        return transaction

    async def _predecessors(self, unit: Unit) -> None:
        waits: list[Awaitable[Any]] = [c.ended for c in self._commits if _ordered(c.entry[1], unit)]
        if self._pending or self._writing:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            marker = Unit((), lambda _unit, _error: None if future.done() else future.set_result(None))
            self._pending.append(((), marker))
            self._wake_worker()
            waits.append(future)
        for wait in waits:
            await asyncio.shield(wait)

    _writing = False
    _over = False

    def commit(self, stages: tuple[Stage, ...], unit: Unit, transaction: PostgresTransaction) -> None:
        """Commit a handler's transaction with everything of its unit; `unit.done` tells when."""
        commit = _Commit((stages, unit))
        self._commits.append(commit)
        self._keep_task(self.spawn(self._commit_alone(commit, transaction)))

    async def _commit_alone(self, commit: _Commit, transaction: PostgresTransaction) -> None:
        stages, unit = commit.entry
        await self._gate.wait()
        commit.started = True
        self._started += 1
        self._none_started.clear()
        told: set[str] = set()
        error: BaseException | None = None
        try:
            await self._write_alone(stages, unit, transaction, told)
        except BaseException as caught:  # noqa: BLE001 - told to the one who waits for the unit
            error = caught
        finally:
            self._started -= 1
            if not self._started:
                self._none_started.set()
        unit.transaction = None
        self._commits.remove(commit)
        if error is None:
            self._finish([commit.entry], told, alone=True)
        else:
            unit.done(unit, error)
        commit.ended.set_result(None)
        for entry in commit.followers:
            # In their order; after a failure they are done again behind the one that failed.
            if error is None:
                self._enter(entry)
            else:
                entry[1].done(entry[1], _behind(error, entry[1]))

    async def _write_alone(
        self, stages: tuple[Stage, ...], unit: Unit, transaction: PostgresTransaction, told: set[str]
    ) -> None:
        connection = transaction.connection_for_commit()
        sent = False
        try:
            for stage in stages:
                await stage.apply(connection, (unit,), told)
            # The fence: this process cannot be taken over until this is committed.
            sql = self.sql("SELECT 1 FROM @process WHERE id = $1 AND NOT dead FOR KEY SHARE")
            self._check_fence("UPDATE 1" if await connection.fetchrow(sql, self.process) else "")
            if told:
                await connection.execute(self._notify_sql(told))
            sent = True
            await transaction.commit()
        except BaseException as error:
            await transaction.abandon()
            raise transaction.why_undone(error, unit, sent=sent) from error
        await transaction.close()

    # --- the group ---

    def _wake_worker(self) -> None:
        self._wake.set()
        if self._over:
            asyncio.get_running_loop().call_soon(self._fail, [], self._closed_error())

    async def _work(self) -> None:
        try:
            await self._write_always()
        finally:
            self._over = True
            self._fail([], self._closed_error())

    async def _write_always(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.clock.sleep(0)  # what others submit in this turn of the loop goes with it
            while self._pending or self._jobs:
                entries, self._pending = self._pending[:GROUP_UNITS], self._pending[GROUP_UNITS:]
                self._writing = True
                try:
                    await self._commit(entries)
                except BaseException:
                    self._fail(entries, self._closed_error())
                    raise
                finally:
                    self._writing = False
                if self._jobs and not self._pending:
                    await self._run_job(self._jobs.pop(0))

    async def _commit(self, entries: list[Entry]) -> None:
        """Commit units as one group; see that one which cannot be stored fails alone."""
        tries = 0
        began = self.clock.monotonic()
        while True:
            try:
                await self._write_once(entries, began)
            except DuplicateSignal:
                continue  # the store has marked which they are
            except LeaseLostError:
                self._sign_on_anew()
            except TransportError as error:
                self._fail(entries, error)
                return
            except Exception as error:  # noqa: BLE001 - something in a unit may not be storable; its neighbours are
                self.sessions.broken(error)
                if is_lost(error):
                    continue
                tries += 1
                in_the_way = isinstance(error, _IN_THE_WAY)
                if is_of_server(error) and not in_the_way:
                    self._fail(entries, translate(error, self.settings))
                    return
                if not in_the_way or tries == TRIES:
                    await self._commit_halves(entries, error)
                    return
            else:
                return

    async def _write_once(self, entries: list[Entry], began: float) -> None:
        await self._until_up(began)
        if self._in_doubt and self._was_committed():
            self._finish(entries, {"*"})
        else:
            await self._write(entries)

    async def _commit_halves(self, entries: list[Entry], error: Exception) -> None:
        if len(entries) > 1:
            middle = len(entries) // 2
            await self._commit(entries[:middle])
            await self._commit(entries[middle:])
            return
        ((_, unit),) = entries
        # The user's handler is told as of its own failure; who publishes gets an error of ours.
        ours = isinstance(error, _IN_THE_WAY) or not unit.deliveries
        unit.done(unit, translate(error, self.settings) if ours else error)

    async def _until_up(self, began: float) -> None:
        left_s = self.settings.timeout_s - (self.clock.monotonic() - began)
        try:
            await self.link.up(max(left_s, 0.001))
        except TransportError as error:
            if not self._in_doubt:
                raise
            self._in_doubt = False
            raise TransportError(
                "E521",
                f"the connection to {self.settings.shown} was lost during a commit; whether it was done is not known",
                "publish it again with the same id=: receivers take it once",
            ) from error

    def _was_committed(self) -> bool:
        """Return whether the group whose commit got no answer is in the database, as its count of groups says."""
        self._in_doubt = False
        return self.members.groups > self._groups

    async def _write(self, entries: list[Entry]) -> None:
        told: set[str] = set()
        by_stage = _by_stage(entries)
        if len(by_stage) == 1 and (statement := by_stage[0][0].alone(by_stage[0][1], told)) is not None:
            await self._write_at_once(*statement, told)
        elif by_stage:
            async with self._begun() as connection:
                for stage, units in by_stage:
                    await stage.apply(connection, units, told)
                await self._end_group(connection, told)
        self._finish(entries, told)

    async def _write_at_once(self, sql: str, parameters: tuple[Any, ...], rows: int, told: set[str]) -> None:
        """Write a group that is one statement, and so a transaction by itself: one round trip instead of three."""
        connection = self.sessions.writing()
        groups = self._groups = self.members.groups
        told |= self._told
        self._told = set()
        words = None if self.members.alone or not told else self._words(told)
        self._in_doubt = True
        try:
            status = await connection.execute(self._fence_sql + sql, groups + 1, self.process, words, *parameters)
        except asyncpg.PostgresError as error:
            self._in_doubt = is_lost(error)
            raise
        self._in_doubt = False
        self._check_fence("UPDATE 1" if status == f"INSERT 0 {rows}" else "")
        self.members.groups = groups + 1

    @contextlib.asynccontextmanager
    async def _begun(self) -> AsyncIterator[asyncpg.Connection]:
        """Begin a transaction that counts as a group; whatever fails, its first or last statement too, is undone."""
        connection = self.sessions.writing()
        self._groups = self.members.groups
        try:
            self._check_fence(await self._execute(connection, self._begin_sql.format(self._groups + 1)))
            yield connection
        except BaseException as error:
            await self._roll_back(connection, error)
            raise

    async def _execute(self, connection: asyncpg.Connection, sql: str) -> str:
        """Run statements that write nothing of a unit: none is to blame for what they meet."""
        try:
            return str(await connection.execute(sql))
        except asyncpg.PostgresError as error:
            if is_lost(error) or isinstance(error, _IN_THE_WAY):
                raise
            raise translate(error, self.settings) from error

    async def _end_group(self, connection: asyncpg.Connection, told: set[str]) -> None:
        told |= self._told
        self._told = set()
        self._in_doubt = True
        try:
            await self._execute(connection, self._end_sql(set() if self.members.alone else told))
        except (asyncpg.PostgresError, TransportError) as error:
            self._in_doubt = is_lost(error)
            raise
        self._in_doubt = False
        self.members.groups = self._groups + 1

    def _check_fence(self, status: str) -> None:
        """Refuse to commit for a process that was taken over.

        Raises: LeaseLostError if the row of this process was not there to be changed.
        """
        if status != "UPDATE 1":
            raise LeaseLostError("E505", f"process {self.process} was taken over", "it goes on under another number")

    async def _roll_back(self, connection: asyncpg.Connection, error: BaseException) -> None:
        if is_lost(error) or connection.is_closed():
            return
        try:
            await connection.execute("ROLLBACK")
        except DRIVER_ERRORS as another:
            self.link.lost(another)

    def _sign_on_anew(self) -> None:
        """This process was silent for too long and was taken over: go on as a new one."""
        log.warning("process %d of %s was taken over; what it had comes again", self.process, self.settings.shown)
        self.link.lost(None)

    def _finish(self, entries: Sequence[Entry], told: set[str], *, alone: bool = False) -> None:
        for stage, units in _by_stage(entries):
            stage.committed(units, alone=alone)
        self._tell(entries)
        if told:
            self._changed(told)

    def _tell(self, entries: Sequence[Entry]) -> None:
        """Tell who waits for these units.

        Many that publish at once would all publish again at once: the server would wait for them, then they for it. So
        the second half is told when what the first half publishes is on its way, and both work at the same time.
        """
        if len(entries) < WAVE or any(unit.deliveries for _, unit in entries):
            _done(entries)
            return
        half = len(entries) // 2
        _done(entries[:half])
        soon = asyncio.get_running_loop().call_soon
        # In turns of the loop: they publish; the next group is taken; it is sent.
        soon(soon, soon, _done, entries[half:])

    def _fail(self, entries: Iterable[Entry], error: TransportError) -> None:
        """Tell everyone: what comes later must not be committed before what is done again."""
        failed, self._pending = [*entries, *self._pending], []
        jobs, self._jobs = self._jobs, []
        for _, unit in failed:
            unit.done(unit, error)
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)

    async def _run_job(self, job: _Job) -> None:
        try:
            await self.link.up(self.settings.timeout_s)
            result = await (self._run_look(job) if job.looks else self._run_in_transaction(job))
        except DRIVER_ERRORS as error:
            self.sessions.broken(error)
            if not job.future.done():
                ours = is_lost(error) or isinstance(error, (*_IN_THE_WAY, asyncpg.InsufficientResourcesError))
                job.future.set_exception(translate(error, self.settings) if ours else error)
        except LeaseLostError as error:
            self._sign_on_anew()
            if not job.future.done():
                job.future.set_exception(TransportError("E520", str(error)))
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits the job
            if not job.future.done():
                job.future.set_exception(error)
        else:
            if not job.future.done():
                job.future.set_result(result)

    async def _run_look(self, job: _Job) -> Any:
        self._gate.clear()
        try:
            await self._none_started.wait()
            return await job.function(self.sessions.writing())
        finally:
            self._gate.set()

    async def _run_in_transaction(self, job: _Job) -> Any:
        async with self._begun() as connection:
            result = await job.function(connection)
            told, self._told = self._told, set()
            await self._execute(connection, self._end_sql(told))
        self.members.groups = self._groups + 1
        if told:
            self._changed(told)
        return result

    # --- what others are to hear of ---

    def tell(self, told: Collection[str]) -> None:
        """Let all processes know of something with the job that is running."""
        self._told |= set(told)

    def _notify_sql(self, told: Collection[str]) -> str:
        """Return the statement that wakes other processes: one notification per commit.

        Words are ours or numbers, so nothing is to be escaped.
        """
        return f"SELECT pg_notify('{self.sessions.channel}', '{self._words(told)}')"

    def _end_sql(self, told: Collection[str]) -> str:
        return f"{self._notify_sql(told)}; COMMIT" if told else "COMMIT"

    def _words(self, told: Collection[str]) -> str:
        words = ",".join(sorted(told))
        if len(words) > 7000:  # noqa: PLR2004 - 8,000 bytes are allowed
            words = "*"
        return f"{self.process}:{words}"

    def _heard(self, payload: str) -> None:
        sender, _, words = payload.partition(":")
        if sender != str(self.process):
            self._changed(set(words.split(",")))

    def _changed(self, told: Collection[str]) -> None:
        for stage in self.stages:
            stage.changed(told)


def _done(entries: Sequence[Entry]) -> None:
    for _, unit in entries:
        unit.done(unit, None)


def _has_order(unit: Unit) -> bool:
    return any(delivery.partition >= 0 for delivery in unit.deliveries)


def _ordered(first: Unit, second: Unit) -> bool:
    """Return whether `second` must not be committed before `first`: they share a key of a Stream."""
    for one in first.deliveries:
        if one.partition >= 0:
            for other in second.deliveries:
                if other.subscription is one.subscription and other.key == one.key:
                    return True
    return False


def _behind(error: BaseException, unit: Unit) -> BaseException:
    """Return what to tell about a unit behind one that failed."""
    del unit
    return error if isinstance(error, TransportError) else TransportError("E508", "an earlier message failed")


def _by_stage(entries: Sequence[Entry]) -> list[tuple[Stage, list[Unit]]]:
    """Return which units each stage writes; all stores before all transports, as they are listed in each party."""
    parties: dict[tuple[Stage, ...], list[Unit]] = {}
    for stages, unit in entries:
        parties.setdefault(stages, []).append(unit)
    found: dict[Stage, list[Unit]] = {}
    for stages in sorted(parties, key=len, reverse=True):
        for stage in stages:
            found.setdefault(stage, []).extend(parties[stages])
    return list(found.items())
