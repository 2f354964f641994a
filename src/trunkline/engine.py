"""One SQLite file: its single writing connection, group commit and the processes that share it.

Invariant: whatever `submit` was told is done is on disk (WAL, synchronous=FULL); a failed sync is fatal
and never retried; a process that another one took over commits nothing more.
SQL runs on the loop (microseconds, nothing waits); what waits runs in one thread: the lock and, unless the disk is
fast, the commit with its sync and checkpoint. Never does: messages (transports/sqlite) or inbox (stores/sqlite).
Read next: stores/sqlite/store.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import apsw

from trunkline import layout
from trunkline.clock import Clock, WorkerThread, block
from trunkline.errors import (
    ConfigurationError,
    FatalStoreError,
    LeaseLostError,
    TransactionError,
    TransportError,
)
from trunkline.file_errors import DEVICE_ERRORS, LOCK_WAIT_S, locked, translated, unopened
from trunkline.membership import Membership
from trunkline.store import DuplicateSignal, Unit
from trunkline.tasks import spawn

log = logging.getLogger("trunkline.engine")
T = TypeVar("T")

LEASE_S = 30.0
"""A process that has not shown a sign of life for so long is taken over, even if it still exists."""
GROUP_S = 0.004
"""Longest time that one group keeps the write lock before it commits."""
OPEN_WAIT_S = 10.0
"""Longest wait for it when the file is opened."""
POLL_MIN_S, POLL_MAX_S = 0.001, 0.02
"""How often changes by other processes are looked for, when busy and when idle."""
SLOW_TRANSACTION_S = 0.25
HELD_S = 5.0
"""How often is said that a handler holds its transaction open: it may wait for what waits for it."""

_SCHEMA = """
CREATE TABLE trunkline_process (
    id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, started REAL NOT NULL, beat REAL NOT NULL
);
CREATE TABLE trunkline_counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO trunkline_counter VALUES ('row', 0), ('declared', 0), ('returned', 0), ('treated', 0), ('staged', 0);
"""


class Stage(Protocol):
    """A part of the engine's group: what a transport or store writes for units."""

    schema: str
    owned: tuple[str, ...]
    """Its tables with an `owner`, in which a process holds rows."""

    def apply(self, connection: apsw.Connection, units: Sequence[Unit]) -> None:
        """Write `units` inside the open transaction."""

    def committed(self, units: Sequence[Unit]) -> None:
        """React to a successful commit of `units`."""

    def aborted(self) -> None:
        """Forget what `apply` noted since the last commit: the group was undone."""

    def foreign_change(self) -> None:
        """React to a commit by another process."""

    def release(self, connection: apsw.Connection, process: int) -> None:
        """Give back what the dead process `process` held, inside the open transaction."""


class Party:
    """Stages that write the same units: a transport alone, or a store and its transport.

    Attributes:
        stages: in the order in which they write.
        strangers: stages of other Apps of this process, which have to look for themselves at what these write.
        pending: submitted for the next group.
        applied: written in the open group.
    """

    __slots__ = ("applied", "pending", "stages", "strangers")

    def __init__(self, stages: tuple[Stage, ...]) -> None:
        self.stages = stages
        self.strangers: tuple[Stage, ...] = ()
        self.pending: list[Unit] = []
        self.applied: list[Unit] = []


class _Job:
    """A function to run inside the write transaction, with its future."""

    __slots__ = ("error", "function", "future", "result")

    def __init__(self, function: Callable[[apsw.Connection], Any], future: asyncio.Future[Any]) -> None:
        self.function = function
        self.future = future
        self.result: Any = None
        self.error: BaseException | None = None


class Engine:
    """The file at `path`. One per process and path: use `open_engine`.

    Attributes:
        process: number of this process in the file, never used twice.
        reader: read-only connection; sees what is committed.
        labels: subscriptions and queues that Apps of this process read.
        places_for: the stage that last placed messages, and so knows where the file goes on.
    """

    def __init__(self, path: str, clock: Clock, vfs: str | None = None, lease_s: float = LEASE_S) -> None:
        self.path = path
        self.clock = clock
        self.vfs = vfs
        self.lease_s = lease_s
        self.users = 0
        self.process = 0
        self.stages: list[Stage] = []
        self.labels: set[str] = set()
        self.places_for: Stage | None = None
        self.failure: TransportError | None = None
        self.on_failure: list[Callable[[BaseException], None]] = []
        self._parties: list[Party] = []
        self._pending = 0
        self._jobs: list[_Job] = []
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._applied = 0
        self._applied_jobs: list[_Job] = []
        self._device_error: apsw.Error | None = None
        self._holder: asyncio.Task[Any] | None = None
        self._tell_at = math.inf
        self._phase = "idle"  # idle | locking | open | held | committing
        self._scheduled = False
        self._opened_at = 0.0
        self._data_version = -1
        self._commit_s = 0.001
        self._tasks: list[asyncio.Task[None]] = []

    # --- opening and closing ---

    async def open(self) -> None:
        """Open or create the file and register this process.

        Raises: ConfigurationError E203 or E205 if the file is not ours, E225 if none can be there; TransportError E501
            if it cannot be opened.
        """
        self._loop = asyncio.get_running_loop()
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        try:
            self._writer = apsw.Connection(self.path, flags=flags, vfs=self.vfs)
            self._prepare()
            self.reader = apsw.Connection(self.path, flags=apsw.SQLITE_OPEN_READONLY, vfs=self.vfs)
            self.reader.set_busy_timeout(1000)
        except apsw.NotADBError as error:
            raise ConfigurationError("E203", f"{self.path} is not a SQLite database", "name another file") from error
        except (apsw.CantOpenError, apsw.IOError, apsw.ReadOnlyError, apsw.FullError) as error:
            raise unopened(self.path, error) from error
        except apsw.BusyError as error:
            raise locked(self.path, OPEN_WAIT_S) from error
        self._membership = Membership(self)
        self._thread = WorkerThread(f"trunkline-{Path(self.path).name}")
        self.process = await self._membership.register()
        self._tasks = [spawn(self._watch(), self.failed), spawn(self._membership.keep(), self.failed)]

    def _prepare(self) -> None:
        writer = self._writer
        writer.set_busy_timeout(int(OPEN_WAIT_S * 1000))
        layout.check(writer, self.path)  # before anything is changed: the file may be another program's
        mode = query(writer, "PRAGMA journal_mode=WAL")[0][0]
        if mode != "wal":
            raise ConfigurationError(
                "E204", f"{self.path} cannot use write-ahead logging (mode {mode!r})", "use a local file system"
            )
        # One by one: a statement that returns rows ends `execute` before the next one.
        for setting in ("synchronous=FULL", "wal_autocheckpoint=1000", "foreign_keys=ON"):
            query(writer, f"PRAGMA {setting}")
        writer.execute("BEGIN IMMEDIATE")
        if layout.check(writer, self.path) == 0:
            writer.execute(_SCHEMA + f"PRAGMA user_version={layout.VERSION}")
        writer.execute("COMMIT")
        writer.set_busy_timeout(0)

    def counter(self, name: str) -> int:
        """Return a counter as last committed.

        `row`: of the last message put into a queue; `declared`: rises with channels, subscriptions and readers;
        `returned`: when rows of queues are given back; `treated`: when dead letters are redriven or discarded;
        `staged`: when the outbox grows.
        """
        return int(query(self.reader, "SELECT value FROM trunkline_counter WHERE name = ?", (name,))[0][0])

    async def add_stage(self, stage: Stage) -> None:
        """Let `stage` take part in each group; creates its tables."""
        await self.run(lambda connection: connection.execute(stage.schema))
        self.stages.append(stage)

    def party(self, *stages: Stage) -> Party:
        """Return a Party of stages that were added; units are submitted to it."""
        party = Party(stages)
        self._parties.append(party)
        self._find_strangers()
        return party

    def remove_stage(self, stage: Stage) -> None:
        """Forget a stage and its parties."""
        self.stages.remove(stage)
        self._parties = [party for party in self._parties if stage not in party.stages]
        self._find_strangers()

    def _find_strangers(self) -> None:
        for party in self._parties:
            parties = [other for other in self._parties if not set(party.stages).isdisjoint(other.stages)]
            known = {stage for other in parties for stage in other.stages}
            party.strangers = tuple(stage for stage in self.stages if stage not in known)

    async def close(self) -> None:
        """Commit what was submitted, sign off and close the file."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.failure is None:
            process = self.process
            await self.run(lambda c: c.execute("DELETE FROM trunkline_process WHERE id = ?", (process,)))
        self._thread.stop()
        self.reader.close()
        self._writer.close()
        self._membership.close()

    # --- work for the next group ---

    def submit(self, party: Party, unit: Unit) -> None:
        """Commit `unit`, as `party` writes it, with the next group.

        Raises: TransactionError E512 in a handler whose own open transaction that group would wait for.
        """
        self._check_not_held()
        if self.failure is not None:
            self._loop.call_soon(unit.done, unit, self.failure)
            return
        party.pending.append(unit)
        self._pending += 1
        if not self._scheduled and self._phase == "idle":
            self._scheduled = True
            self._loop.call_soon(self._turn)

    async def run(self, function: Callable[[apsw.Connection], T]) -> T:
        """Run `function(connection)` inside the next group; return its result when it is on disk.

        Raises: what `function` raises (its changes are undone), or TransportError; E512 as `submit`.
        """
        self._check_not_held()
        if self.failure is not None:
            raise self.failure
        job = _Job(function, self._loop.create_future())
        self._jobs.append(job)
        self._kick()
        return cast("T", await job.future)

    def _check_not_held(self) -> None:
        if self._phase == "held" and asyncio.current_task() is self._holder:
            raise TransactionError(
                "E512",
                f"a commit to {self.path} from inside a handler's transaction, which has to end first",
                "publish with ctx.publish(...), or before ctx.transaction()",
            )

    async def acquire(self, owner: str) -> apsw.Connection:
        """Return the writing connection inside an open transaction, for one handler alone.

        What was submitted before is applied first. Give it back with `release`.

        Args:
            owner: name of the handler.
        """
        self._check_not_held()
        if self.failure is not None:
            raise self.failure
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        self._kick()
        await self._wait_turn(waiter)
        self._held_at = self.clock.monotonic()
        self._held_by, self._tell_at = owner, self._held_at + HELD_S
        self._holder = asyncio.current_task()
        self._writer.execute("SAVEPOINT trunkline_unit")
        return self._writer

    async def _wait_turn(self, waiter: asyncio.Future[None]) -> None:
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._phase = "open"
                self._proceed()
            raise

    def release(self, party: Party, unit: Unit | None) -> None:
        """Give the connection back.

        Args:
            party: whose stages write the unit.
            unit: to be committed with what its handler wrote; None undoes that.
        Raises: what writing the unit raises; then everything of it is undone.
        """
        held_s = self.clock.monotonic() - self._held_at
        if unit is not None and held_s > SLOW_TRANSACTION_S:
            log.warning(
                "%s held the transaction for %.2f s; nothing else of %s was committed meanwhile: "
                "await other things before ctx.transaction()", unit.owner, held_s, self.path,
            )  # fmt: skip
        writer = self._writer
        self._phase = "open"
        self._holder, self._tell_at = None, math.inf  # it is held again before its next holder has noted so
        if not writer.in_transaction:
            self._undone_under_handler(party, unit)
            return
        # Checked here and not at COMMIT, where it would undo the units of others too.
        broken = unit is not None and writer.status(apsw.SQLITE_DBSTATUS_DEFERRED_FKS)[0]
        if unit is None or broken:
            self._undo_unit()
            if broken:
                raise apsw.ConstraintError("FOREIGN KEY constraint failed (deferred)")
            return
        try:
            for stage in party.stages:
                stage.apply(writer, (unit,))
            writer.execute("RELEASE trunkline_unit")
        except DEVICE_ERRORS as error:
            party.applied.append(unit)
            self._fail_group(error)
            return
        except Exception:
            # Something in it cannot be stored; its neighbours can.
            self._undo_unit()
            raise
        party.applied.append(unit)
        self._applied += 1
        self._proceed()

    def _undo_unit(self) -> None:
        """Undo what the handler wrote and go on with the group; without its savepoint the whole group is undone."""
        try:
            self._writer.execute("ROLLBACK TO trunkline_unit; RELEASE trunkline_unit")
        except apsw.Error as error:
            self._fail_group(error)
        else:
            self._proceed()

    def _undone_under_handler(self, party: Party, unit: Unit | None) -> None:
        """SQLite undid the whole group under a statement of a handler: everyone in it is told.

        Raises: apsw.ConstraintError if the statement asked for it (OR ROLLBACK), a failure of this handler alone.
        """
        error, self._device_error = self._device_error, None
        if error is not None:  # the disk was full, or failed
            if unit is not None:
                party.applied.append(unit)
            self._fail_group(error)
            return
        self._fail_group(TransportError("E506", "the statement of a handler undid the transaction of others"))
        if unit is not None:
            raise apsw.ConstraintError("a statement undid the whole transaction, as OR ROLLBACK does: use OR ABORT")

    def statement_failed(self, error: apsw.Error) -> Exception:
        """Return what to raise in the handler whose statement met `error`: the device's failure, or `error` itself."""
        if not isinstance(error, DEVICE_ERRORS):
            return error
        self._device_error = error
        return translated(error, self.path)

    # --- the group: begin, apply, commit ---

    def _kick(self) -> None:
        if not self._scheduled and self._phase == "idle":
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        if self._phase == "idle" and (self._pending or self._jobs or self._waiters) and self._begin():
            self._proceed()

    def _begin(self) -> bool:
        """Open the transaction; False if another process has the lock (then `_locked` goes on)."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
        except apsw.BusyError:
            self._phase = "locking"
            self._thread.submit(self._wait_lock, self._locked)
            return False
        except apsw.Error as error:
            self._fail_group(error)
            return False
        return self._begun()

    def _wait_lock(self) -> None:
        waited = 0.0
        while True:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
            except apsw.BusyError:
                if waited > LOCK_WAIT_S:
                    raise
                block(0.0003)
                waited += 0.0003
            else:
                return

    def _locked(self, error: BaseException | None) -> None:
        if error is not None:
            self._fail_group(error)
        elif self._begun():
            self._proceed()

    def _begun(self) -> bool:
        self._phase = "open"
        self._opened_at = self.clock.monotonic()
        try:
            (version,) = query(self._writer, "PRAGMA data_version")[0]
            if version != self._data_version and not self._look_around(version):
                self._writer.execute("ROLLBACK")
                self._fail(LeaseLostError("E505", f"process {self.process} was taken over", "restart it"))
                return False
        except apsw.Error as error:
            self._fail_group(error)
            return False
        return True

    def _look_around(self, version: int) -> bool:
        """React to commits by other processes; return False if one of them took this process over (the fence).

        Only such a commit can do that, so while the version stays the same there is nothing to ask.
        """
        self._data_version = -1  # looked at again if something cannot be read now
        mine = "SELECT 1 FROM trunkline_process WHERE id = ?"
        if self.process and not query(self._writer, mine, (self.process,)):
            return False
        for stage in self.stages:
            stage.foreign_change()
        self._data_version = version
        return True

    def _proceed(self) -> None:
        """With the transaction open and nobody holding it: apply, let waiters in, commit."""
        if not self._apply_pending():
            return
        while self._waiters and self.clock.monotonic() - self._opened_at < GROUP_S:
            waiter = self._waiters.popleft()
            if not waiter.done():  # else its handler was cancelled
                self._phase = "held"
                waiter.set_result(None)
                return
        self._commit()

    def _apply_pending(self) -> bool:
        jobs, self._jobs = self._jobs, []
        try:
            if self.failure is not None:
                raise self.failure  # noqa: TRY301 - undone as by any other error
            if self._pending:
                self._pending = 0
                for party in self._parties:
                    if party.pending:
                        self._apply_units(party)
            for job in jobs:
                self._apply_job(job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the group cannot be kept
            self._applied_jobs += jobs
            self._fail_group(error)
            return False
        return True

    def _apply_units(self, party: Party) -> None:
        writer = self._writer
        units, party.pending = party.pending, []
        party.applied += units
        self._applied += len(units)
        writer.execute("SAVEPOINT units")
        try:
            for stage in party.stages:
                stage.apply(writer, units)
        except DEVICE_ERRORS:
            raise
        except (DuplicateSignal, Exception):  # noqa: BLE001 - each unit is tried again, alone
            # Rare: find out which one, by applying them one by one.
            writer.execute("ROLLBACK TO units")
            del party.applied[-len(units) :]
            self._applied -= len(units)
            for unit in units:
                self._apply_one(party, unit)
        writer.execute("RELEASE units")

    def _apply_one(self, party: Party, unit: Unit) -> None:
        """Apply a unit by itself: a duplicate leaves only its settlement, one that cannot be written nothing."""
        writer = self._writer
        writer.execute("SAVEPOINT one")
        try:
            try:
                for stage in party.stages:
                    stage.apply(writer, (unit,))
            except DuplicateSignal:
                writer.execute("ROLLBACK TO one")
                unit.duplicate = True
                unit.staged = ()
                for stage in party.stages:
                    stage.apply(writer, (unit,))
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # noqa: BLE001 - something in it cannot be stored; its neighbours can
            writer.execute("ROLLBACK TO one; RELEASE one")
            self._loop.call_soon(unit.done, unit, error)
            return
        writer.execute("RELEASE one")
        party.applied.append(unit)
        self._applied += 1

    def _apply_job(self, job: _Job) -> None:
        writer = self._writer
        writer.execute("SAVEPOINT job")
        try:
            job.result = job.function(writer)
        except (apsw.FullError, apsw.IOError):
            raise
        except Exception as error:  # noqa: BLE001 - handed to whoever awaits the job
            writer.execute("ROLLBACK TO job")
            job.error = error
        writer.execute("RELEASE job")
        self._applied_jobs.append(job)

    def _commit(self) -> None:
        self._phase = "committing"
        # On a fast disk the way to the thread and back would cost as much as the sync.
        if self._commit_s < 0.0005:  # noqa: PLR2004
            error: BaseException | None = None
            try:
                self._commit_now()
            except apsw.Error as caught:
                error = caught
            self._committed(error)
        else:
            self._thread.submit(self._commit_now, self._committed)

    def _commit_now(self) -> None:
        began = self.clock.monotonic()
        self._writer.execute("COMMIT")
        self._commit_s += 0.1 * (self.clock.monotonic() - began - self._commit_s)

    def _committed(self, error: BaseException | None) -> None:
        if (error := error or self.failure) is not None:
            self._fail_group(error)
            return
        self._phase = "idle"
        jobs, self._applied_jobs = self._applied_jobs, []
        if self._applied:
            self._applied = 0
            self._hand_over()
        for job in jobs:
            if job.future.done():
                continue
            if job.error is None:
                job.future.set_result(job.result)
            else:
                job.future.set_exception(job.error)
        if self._pending or self._jobs or self._waiters:
            self._kick()

    def _hand_over(self) -> None:
        """Tell the stages of each unit and who waits for it; other Apps of this process look for themselves."""
        strangers: tuple[Stage, ...] = ()
        for party in self._parties:
            units = party.applied
            if units:
                party.applied = []
                strangers += party.strangers
                for stage in party.stages:
                    stage.committed(units)
                for unit in units:
                    unit.done(unit, None)
        for stage in dict.fromkeys(strangers):
            stage.foreign_change()

    # --- failure ---

    def _fail_group(self, error: BaseException) -> None:
        """Undo the group and tell everyone in it; fatal if the disk did not keep its word."""
        failure = translated(error, self.path)
        if self._writer.in_transaction:
            try:
                self._writer.execute("ROLLBACK")
            except apsw.Error as again:
                failure = FatalStoreError("E503", f"{self.path} cannot roll back: {again}", "stop and check the disk")
        self._phase = "idle"
        if isinstance(failure, FatalStoreError):
            self._fail(failure)
            return
        for stage in self.stages:
            stage.aborted()
        self._tell(failure)
        self._kick()

    def _tell(self, failure: TransportError) -> None:
        units = [unit for party in self._parties for unit in (*party.applied, *party.pending)]
        for party in self._parties:
            party.applied, party.pending = [], []
        self._applied = self._pending = 0
        jobs, self._applied_jobs, self._jobs = self._applied_jobs + self._jobs, [], []
        for unit in units:
            unit.done(unit, failure)
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(failure)

    def _fail(self, failure: TransportError) -> None:
        """Stop for good: nothing is written after this."""
        self.failure = self.failure or failure
        self._phase = "failed"
        self._tell(failure)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(failure)
        self._waiters.clear()
        self.failed(failure)

    def failed(self, error: BaseException) -> None:
        """Tell the Apps that there is no going on."""
        for callback in self.on_failure:
            callback(error)

    # --- other processes ---

    async def sweep(self) -> None:
        """Take over from processes that died; see Membership."""
        await self._membership.sweep()

    async def _watch(self) -> None:
        """Notice commits by other processes."""
        wait_s = POLL_MIN_S
        while self.failure is None:
            await self.clock.sleep(wait_s)
            if self._phase != "idle":
                self._tell_held()
                wait_s = POLL_MIN_S
                continue
            try:
                (version,) = query(self._writer, "PRAGMA data_version")[0]
                if version == self._data_version:
                    wait_s = min(wait_s * 1.3, POLL_MAX_S)
                    continue
                # A lost lease is noticed here and acted on by the next group, which refuses to commit.
                self._look_around(version)
            except apsw.Error as error:
                self.cannot_read(error)
            wait_s = POLL_MIN_S

    def _tell_held(self) -> None:
        now = self.clock.monotonic()
        if self._phase == "held" and now > self._tell_at:
            self._tell_at = now + HELD_S
            log.warning(
                "%s has held the transaction for %.0f s and still does: nothing else of %s is committed; it must await "
                "nothing that publishes to it", self._held_by, now - self._held_at, self.path,
            )  # fmt: skip

    def cannot_read(self, error: apsw.Error | TransportError) -> None:
        """Stop for good if disk or file are lost; else (another process recovers the file) look again soon."""
        failure = translated(error, self.path)
        if not isinstance(failure, FatalStoreError):
            log.warning("%s cannot be read now, again soon: %s", self.path, error)
        elif self._phase == "idle":
            self._fail(failure)
        elif self.failure is None:
            self.failure = failure  # the group under way fails by it when it ends
            self.failed(failure)


def query(connection: apsw.Connection, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
    """Return the rows of a query."""
    return connection.execute(sql, parameters).fetchall()


def count_up(connection: apsw.Connection, name: str) -> None:
    """Raise a counter, so that other processes look again."""
    connection.execute("UPDATE trunkline_counter SET value = value + 1 WHERE name = ?", (name,))
