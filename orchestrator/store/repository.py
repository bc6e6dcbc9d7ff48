"""The store behind ports.Store: what a turn decided, the event log, and what to recover from."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Table, and_, bindparam, delete, func, or_, select, update
from sqlalchemy.dialects.sqlite import Insert, insert

from orchestrator.control.ports import Changes, Kept, LoggedEvent
from orchestrator.core.entities import (
    AttemptId,
    DeviceId,
    Failure,
    ModelId,
    Note,
    Operation,
    OperationKind,
    OperationState,
)
from orchestrator.core.errors import StoreError
from orchestrator.core.lifecycle import AT_REST, Instance, State
from orchestrator.store.choice import KEYS, choice_in
from orchestrator.store.database import BUSY_TIMEOUT_S, READERS, Database, clean
from orchestrator.store.downloads import read_downloads, write_downloads
from orchestrator.store.learned import read_learned, write_learned
from orchestrator.store.tables import (
    AttemptRow,
    EventRow,
    InstanceRow,
    MetaRow,
    ModelStateRow,
    OperationRow,
    table_of,
)

Result = TypeVar("Result")
Row = dict[str, Any]

META = table_of(MetaRow)
MODEL_STATE = table_of(ModelStateRow)
INSTANCE = table_of(InstanceRow)
ATTEMPT = table_of(AttemptRow)
OPERATION = table_of(OperationRow)
EVENT = table_of(EventRow)

# Not as `NOT IN`: SQLAlchemy cannot send a list with several rows at once.
_ATTEMPT_IS_OPEN = and_(*(ATTEMPT.c.state != state.value for state in sorted(AT_REST)))

_BOOT = "boot"
_OWNER = "owner"


def _upsert(table: Table, *columns: str) -> Insert:
    """Insert a row, or replace these columns (all, if none is named) of the one with its key."""
    statement = insert(table)
    names = columns or [c.name for c in table.columns if not c.primary_key]
    return statement.on_conflict_do_update(
        index_elements=list(table.primary_key), set_={name: statement.excluded[name] for name in names}
    )


def _upsert_attempt() -> Insert:
    """Follow an attempt: its times are those at which each stage was first seen."""
    statement = insert(ATTEMPT)
    new = statement.excluded
    first_seen = {
        name: func.coalesce(ATTEMPT.c[name], new[name]) for name in ("started_at", "ready_at", "ended_at")
    }
    return statement.on_conflict_do_update(
        index_elements=[ATTEMPT.c.id],
        set_={"state": new.state, "placement": new.placement, "reason": new.reason, **first_seen},
        where=_ATTEMPT_IS_OPEN,
    )


# Built once: SQLAlchemy then finds their SQL in its cache.
SET_META = _upsert(META)
SET_INSTANCE = _upsert(INSTANCE)
SET_OPERATION = _upsert(OPERATION)
SET_PIN = _upsert(MODEL_STATE, "pinned")
SET_HOLD = _upsert(MODEL_STATE, "hold_until")
FOLLOW_ATTEMPT = _upsert_attempt()
# Only what is still open: an instance at rest goes on naming the attempt that ended long ago.
END_ATTEMPT = (
    update(ATTEMPT)
    .where(ATTEMPT.c.id == bindparam("attempt"), _ATTEMPT_IS_OPEN)
    .values(ended_at=func.coalesce(ATTEMPT.c.ended_at, bindparam("now")))
)
# A claim that is given up leaves no process whose end would be told.
END_OTHERS = (
    update(ATTEMPT)
    .where(ATTEMPT.c.model == bindparam("of_model"), ATTEMPT.c.id != bindparam("current"), _ATTEMPT_IS_OPEN)
    .values(
        state=State.STOPPED.value,
        ended_at=func.coalesce(ATTEMPT.c.ended_at, bindparam("now")),
        reason=func.coalesce(ATTEMPT.c.reason, "given up"),
    )
)
DROP_EMPTY_STATES = delete(MODEL_STATE).where(
    MODEL_STATE.c.pinned.is_(None), MODEL_STATE.c.hold_until.is_(None)
)
ADD_EVENT = insert(EVENT)

_INSTANCE_FIELDS = tuple(f.name for f in fields(Instance))
_FORGOTTEN_TIMES = {  # what the rows of an earlier boot lose
    "since_s": 0.0,
    "retry_at_s": None,
    "claimed_at_s": 0.0,
    "started_at_s": 0.0,
    "ready_at_s": None,
    "gone_at_s": None,
}


@dataclass(frozen=True, slots=True)
class PastAttempt:
    """A row of the history. `…_at` are seconds since 1970, at the time of saving.

    `state` is the one it is in, or ended in: stopped or failed. `exit_code`, `oom` and `log_tail` are
    known of failures only.
    """

    id: AttemptId
    model: ModelId
    state: State
    placement: Mapping[DeviceId, int]
    parameters: Mapping[str, int]
    claimed_at: float
    started_at: float | None
    ready_at: float | None
    ended_at: float | None
    exit_code: int | None
    oom: bool
    reason: str | None
    log_tail: tuple[str, ...]


def open_store(
    path: Path, boot_id: str, wall: Callable[[], float], *, busy_timeout_s: float = BUSY_TIMEOUT_S
) -> tuple[SqliteStore, Kept]:
    """Open or create the database and read what it knows.

    `boot_id` names the machine's current boot; `wall` is the time in seconds since 1970.
    Raises DatabaseInUse, SchemaTooNew, or StoreError.
    """
    database = Database(path, busy_timeout_s)
    try:
        with database.transaction() as connection:
            kept = _read_kept(connection, boot_id)
            if not kept.instances:
                _set_meta(connection, {_BOOT: boot_id})
    except BaseException:
        database.close()
        raise
    unsettled_boot = boot_id if kept.instances and not kept.same_boot else None
    return SqliteStore(database, wall, unsettled_boot), kept


class SqliteStore:
    """ports.Store over SQLite. Writes happen on one thread in the order of the calls; reads on others.

    After a reboot the first `save` that holds instances also records the new boot, and forgets the
    monotonic times of the rows that it does not replace. Until then every opening says `same_boot`
    False, so a crash during recovery cannot make old times look new.
    """

    def __init__(self, database: Database, wall: Callable[[], float], unsettled_boot: str | None) -> None:
        self._database = database
        self._wall = wall
        self._unsettled_boot = unsettled_boot
        self._write_failed = False
        self._writes = 0
        self._copied_writes = -1  # how many of those the newest copy holds; unknown at first
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._reading = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="store-copy")

    async def save(self, changes: Changes) -> None:
        """Remember all of it or nothing; a caller that is cancelled does not stop it. Raises StoreError."""
        if changes:
            await _in(self._writing, lambda: self._save(changes))

    async def log(self, notes: tuple[Note, ...]) -> None:
        """Append to the event log. Raises StoreError."""
        if notes:
            rows = [_event_row(note, self._wall()) for note in notes]
            await _in(self._writing, lambda: self._write(lambda c: _many(c, ADD_EVENT, rows)))

    async def prune(self, *, keep_events: int, keep_operations: int, keep_attempts: int) -> None:
        """Drop all but the newest. What still runs is kept besides. Raises StoreError."""

        def drop(connection: Connection) -> None:
            _drop_events(connection, keep_events)
            _drop_ended(connection, OPERATION, OPERATION.c.created_at, keep_operations)
            _drop_ended(connection, ATTEMPT, ATTEMPT.c.claimed_at, keep_attempts)

        await _in(self._writing, lambda: self._write(drop))

    async def back_up(self) -> Path | None:
        """Copy the database beside itself, and check the copy; None if nothing was written since the last.

        Writers and readers do not wait for it. Raises StoreError, Damaged if the copy shows damage.
        """
        if self._writes == self._copied_writes:
            return None
        await _in(self._writing, self._check)  # a lost or replaced file is no source
        return await _in(self._copying, self._back_up)

    async def instances(self) -> Mapping[ModelId, Instance]:
        """The rows as they are stored now. Raises StoreError."""
        rows = await _in(self._reading, lambda: self._read(select(INSTANCE)))
        return {row["model"]: _to_instance(row) for row in rows}

    async def operation(self, operation_id: str) -> Operation | None:
        """Raises StoreError."""
        query = select(OPERATION).where(OPERATION.c.id == operation_id)
        rows = await _in(self._reading, lambda: self._read(query))
        return _to_operation(rows[0]) if rows else None

    async def events(self, *, limit: int, model: ModelId | None = None) -> tuple[LoggedEvent, ...]:
        """The newest events, oldest first. Raises StoreError."""
        query = select(EVENT).order_by(EVENT.c.id.desc()).limit(limit)
        if model is not None:
            query = query.where(EVENT.c.model == model)
        rows = await _in(self._reading, lambda: self._read(query))
        return tuple(LoggedEvent(**row) for row in reversed(rows))

    async def attempts(self, *, limit: int, model: ModelId | None = None) -> tuple[PastAttempt, ...]:
        """The newest attempts, newest first. Raises StoreError."""
        query = select(ATTEMPT).order_by(ATTEMPT.c.claimed_at.desc(), ATTEMPT.c.id).limit(limit)
        if model is not None:
            query = query.where(ATTEMPT.c.model == model)
        rows = await _in(self._reading, lambda: self._read(query))
        return tuple(_to_attempt(row) for row in rows)

    async def health(self) -> str | None:
        """None if the database can be written, else why not."""
        try:
            await _in(self._writing, self._check)
        except StoreError as error:
            return error.message
        return None

    def choice(self) -> tuple[str, str] | None:
        """The engine and the devices chosen at first, if that was remembered. Raises StoreError."""
        known = {row["key"]: row["value"] for row in self._read(select(META))}
        return choice_in(known)

    def remember_choice(self, engine: str, devices: str) -> None:
        """Raises StoreError. Blocks until it is written."""
        values = dict(zip(KEYS, (engine, devices), strict=True))
        self.write_now(lambda c: _set_meta(c, values))

    async def write(self, work: Callable[[Connection], object]) -> None:
        """One transaction on the writer thread. Raises StoreError."""
        await _in(self._writing, lambda: self._write(work))

    def write_now(self, work: Callable[[Connection], object]) -> None:
        """The same for before the event loop runs. Blocks until it is written; raises StoreError."""
        self._writing.submit(self._write, work).result()

    def read_now(self, work: Callable[[Connection], Result]) -> Result:
        """Blocks. Raises StoreError."""
        with self._database.reading() as connection:
            return work(connection)

    def close(self) -> None:
        """Finish the writes that were asked for, and give the database back. Blocks until then."""
        self._writing.shutdown()
        self._reading.shutdown()
        self._copying.shutdown()
        self._database.close()

    def _save(self, changes: Changes) -> None:
        boot = self._unsettled_boot if changes.instances else None

        def write(connection: Connection) -> None:
            _write_changes(connection, changes, self._wall())
            if boot is not None:
                _settle_boot(connection, boot, changes.instances)

        self._write(write)
        if boot is not None:
            self._unsettled_boot = None

    def _write(self, work: Callable[[Connection], object]) -> None:
        self._write_failed = True
        with self._database.transaction() as connection:
            work(connection)
        self._writes += 1
        self._write_failed = False

    def _back_up(self) -> Path:
        writes = self._writes  # read first: what is written meanwhile may be missing in the copy
        copy = self._database.back_up(self._wall())
        self._copied_writes = writes
        return copy.path

    def _check(self) -> None:
        # Taking the write lock notices all but a full disk, and writes nothing. After a failure only
        # a real write shows that it is over.
        if self._write_failed:
            self._write(lambda c: _set_meta(c, {"checked_at": str(self._wall())}))
            return
        with self._database.transaction():
            pass

    def _read(self, query: Any) -> list[RowMapping]:
        return self.read_now(lambda c: list(c.execute(query).mappings()))


async def _in(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    """Run in the pool. Cancelling the caller leaves the work alone, also while it still queues."""
    try:
        future = asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError as error:  # the pool was shut down
        raise StoreError("The database was closed: the server is stopping.") from error
    return await asyncio.shield(future)


def _write_changes(connection: Connection, changes: Changes, now: float) -> None:
    instances = changes.instances.values()
    _many(connection, SET_INSTANCE, [_instance_row(i) for i in instances])
    _many(connection, FOLLOW_ATTEMPT, [_open_attempt_row(i, now) for i in instances if _attempt_is_open(i)])
    for instance in instances:
        if instance.attempt is not None and not _attempt_is_open(instance):
            _end_attempt(connection, instance, now)
    between = [i for i in instances if i.is_at_rest or i.state in (State.QUEUED, State.CLAIMED)]
    others = [{"of_model": i.model, "current": i.attempt or "", "now": now} for i in between]
    _many(connection, END_OTHERS, others)
    _many(connection, SET_OPERATION, [_operation_row(o) for o in changes.operations.values()])
    _many(connection, SET_PIN, [{"model": m, "pinned": pinned} for m, pinned in changes.pins.items()])
    _many(connection, SET_HOLD, [{"model": m, "hold_until": until} for m, until in changes.holds.items()])
    write_downloads(connection, changes.downloads)
    write_learned(connection, changes.learned)
    if None in changes.pins.values() or None in changes.holds.values():
        connection.execute(DROP_EMPTY_STATES)


def _many(connection: Connection, statement: Any, rows: list[Row]) -> None:
    if rows:
        connection.execute(statement, rows)


def _instance_row(instance: Instance) -> Row:
    row: Row = {name: getattr(instance, name) for name in _INSTANCE_FIELDS}
    row.update(state=instance.state.value, stop_reason=_clean(instance.stop_reason))
    return row


def _attempt_is_open(instance: Instance) -> bool:
    return instance.attempt is not None and not instance.is_at_rest and instance.state is not State.QUEUED


def _open_attempt_row(instance: Instance, now: float) -> Row:
    return {
        "id": instance.attempt,
        "model": instance.model,
        "state": instance.state.value,
        "placement": instance.placement,
        "parameters": instance.parameters,
        "claimed_at": now,
        "started_at": now if instance.state is not State.CLAIMED else None,
        "ready_at": now if instance.ready_at_s is not None else None,
        "ended_at": now if instance.state is State.RECLAIMING else None,
        "oom": False,
        "reason": _clean(instance.stop_reason),
    }


def _end_attempt(connection: Connection, instance: Instance, now: float) -> None:
    """Close the history row. In any other state than FAILED, `failure` may be an earlier attempt's."""
    failure = instance.failure if instance.state is State.FAILED else None
    ending: Row = {"state": State.STOPPED.value, "reason": _clean(instance.stop_reason)}
    if failure is not None:
        ending = {
            "state": State.FAILED.value,
            "reason": clean(failure.message),
            "exit_code": failure.exit_code,
            "oom": failure.oom,
            "log_tail": failure.log_tail,
        }
    connection.execute(END_ATTEMPT.values(**ending), {"attempt": instance.attempt, "now": now})


def _operation_row(operation: Operation) -> Row:
    row = {f.name: getattr(operation, f.name) for f in fields(operation)}
    row.update(kind=operation.kind.value, state=operation.state.value, message=clean(operation.message))
    return row


def _event_row(note: Note, at: float) -> Row:
    return {
        "at": at,
        "kind": note.kind,
        "text": clean(note.text),
        "model": note.model,
        "attempt": note.attempt,
        "data": note.data,
    }


def _clean(text: str | None) -> str | None:
    return None if text is None else clean(text)


def _set_meta(connection: Connection, values: Mapping[str, str]) -> None:
    _many(connection, SET_META, [{"key": key, "value": value} for key, value in values.items()])


def _settle_boot(connection: Connection, boot_id: str, replaced: Iterable[ModelId]) -> None:
    rest = INSTANCE.c.model.not_in(list(replaced))
    connection.execute(update(INSTANCE).where(rest).values(_FORGOTTEN_TIMES))
    _set_meta(connection, {_BOOT: boot_id})


def _drop_events(connection: Connection, keep: int) -> None:
    newest_to_go = select(EVENT.c.id).order_by(EVENT.c.id.desc()).limit(1).offset(keep).scalar_subquery()
    connection.execute(delete(EVENT).where(EVENT.c.id <= newest_to_go))


def _drop_ended(connection: Connection, table: Table, age: Any, keep: int) -> None:
    kept = select(table.c.id).order_by(age.desc(), table.c.id).limit(keep)
    connection.execute(
        delete(table).where(
            or_(table.c.ended_at.is_not(None), table.c.state.in_(AT_REST)), table.c.id.not_in(kept)
        )
    )


def _read_kept(connection: Connection, boot_id: str) -> Kept:
    meta = {row["key"]: row["value"] for row in connection.execute(select(META)).mappings()}
    if _OWNER not in meta:
        meta[_OWNER] = str(uuid.uuid4())
        _set_meta(connection, {_OWNER: meta[_OWNER]})
    states = list(connection.execute(select(MODEL_STATE)).mappings())
    instances = [_to_instance(row) for row in connection.execute(select(INSTANCE)).mappings()]
    running = select(OPERATION).where(OPERATION.c.state == OperationState.RUNNING.value)
    operations = [_to_operation(row) for row in connection.execute(running).mappings()]
    return Kept(
        owner=meta[_OWNER],
        same_boot=meta.get(_BOOT) == boot_id,
        operations={operation.id: operation for operation in operations},
        instances={instance.model: instance for instance in instances},
        pins={row["model"]: row["pinned"] for row in states if row["pinned"] is not None},
        holds={row["model"]: row["hold_until"] for row in states if row["hold_until"] is not None},
        downloads=read_downloads(connection),
        learned=read_learned(connection),
    )


def _to_instance(row: RowMapping) -> Instance:
    values = dict(row)
    values["state"] = State(row["state"])
    values["unloads"] = tuple(row["unloads"])
    if (failure := row["failure"]) is not None:
        values["failure"] = Failure(**{**failure, "log_tail": tuple(failure["log_tail"])})
    return Instance(**values)


def _to_operation(row: RowMapping) -> Operation:
    values = {**row, "kind": OperationKind(row["kind"]), "state": OperationState(row["state"])}
    return Operation(**values)


def _to_attempt(row: RowMapping) -> PastAttempt:
    values = {**row, "state": State(row["state"]), "log_tail": tuple(row["log_tail"] or ())}
    return PastAttempt(**values)
