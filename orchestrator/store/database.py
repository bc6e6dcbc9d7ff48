"""Opening the database: one server per file, checked and migrated first, and watched while it is open."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import cast
from urllib.parse import quote

import orjson
import structlog
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import QueuePool

from orchestrator.core.errors import StoreError
from orchestrator.store.backup import back_up, write_copy
from orchestrator.store.copies import Copy, quick_problem, reader_of
from orchestrator.store.explain import Damaged, damaged, explained, lost
from orchestrator.store.files import Held, Lock, beside
from orchestrator.store.schema import migrate

BUSY_TIMEOUT_S = 5.0
READERS = 2
CHECK_LIMIT_S = 2.0
"""How long a start may spend on looking for damage; each copy looks at everything."""

log = structlog.get_logger(__name__)


class Database:
    """An open, migrated database that this process owns until `close`.

    `writer` has one connection and opens every transaction with BEGIN IMMEDIATE: a transaction that
    begins as a reader cannot wait for the write lock, it fails. `reader` commits each statement
    by itself and cannot write. Neither creates the file, so a lost one is noticed, not replaced by
    an empty one. Once it is found damaged nothing more is written: `damage` says what and the way back.
    """

    def __init__(self, path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        """Raises DatabaseInUse, SchemaTooNew, Damaged, or StoreError."""
        self.path = path.absolute()
        self.damage: str | None = None
        self._held: list[Held] = []
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_dir():
                raise IsADirectoryError(self.path)  # before a lock is left beside it
            self._lock = Lock(self.path)
        self.writer = _engine(self.path, busy_timeout_s, readers=0)
        self.reader = _engine(self.path, busy_timeout_s, readers=READERS)
        try:
            with explained(self.path):
                _inspect(self.path, busy_timeout_s)
                self.path.touch()
                migrate(self.writer, self.path, lambda head: self._back_up_before(head))
                self._hold()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One write transaction: all of it or nothing. For one thread at a time. Raises StoreError."""
        with self._explained():
            self._check_files()
            with self.writer.begin() as connection:
                yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading, from any thread. Raises StoreError."""
        with self._explained(), self.reader.connect() as connection:
            yield connection

    def back_up(self, at: float) -> Copy:
        """A checked copy beside the database, from any thread; writers do not wait. Raises StoreError."""
        with self._explained():
            return back_up(self.path, at)

    def close(self) -> None:
        """Close the file and let another server have it."""
        self.reader.dispose()
        self.writer.dispose()
        self._release()
        self._lock.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """As `explained`; and damage, once seen, ends all writing: it would spread."""
        if self.damage is not None:
            raise Damaged(self.damage)
        try:
            with explained(self.path):
                yield
        except Damaged as error:
            self.damage = error.message
            raise

    def _back_up_before(self, revision: str) -> None:
        copy = back_up(self.path, time.time(), revision)
        log.info("the database was copied before its migration", copy=str(copy.path))

    def _hold(self) -> None:
        """Remember which files are open: the database and its write-ahead log."""
        with self.writer.connect() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")  # opens the log
            held = [Held(self.path), Held(beside(self.path, "-wal"))]
        self._release()
        self._held = held

    def _release(self) -> None:
        for file in self._held:
            file.close()
        self._held = []

    def _check_files(self) -> None:
        """SQLite goes on writing to files that no longer have a name; what it writes would be lost.

        What was deleted is written anew from what is still open. Raises StoreError if the database was
        moved away or replaced, and DatabaseInUse if another server took its lock.
        """
        self._lock.renew()
        if not self._held:
            self._hold()
        database, write_ahead_log = self._held
        if database.is_deleted:
            self._write_anew("the database file")
        elif not self.path.exists():
            raise StoreError(f"The database {self.path} was moved away while the server runs. Move it back.")
        elif not database.is_in_place:
            raise StoreError(
                f"The database {self.path} was replaced while the server runs. Restart the server to use "
                "the new file."
            )
        elif not write_ahead_log.is_in_place:
            self._write_anew("its write-ahead log")

    def _write_anew(self, what: str) -> None:
        fresh = beside(self.path, ".rescued")
        with self.writer.connect() as connection:
            write_copy(_raw(connection), self.path, fresh)
        for rest in ("-wal", "-shm"):  # of the lost file; SQLite would apply them to the new one
            beside(self.path, rest).unlink(missing_ok=True)
        fresh.replace(self.path)
        self._release()
        # Closed only now: SQLite sees that its file has no name any more, and leaves the new one alone.
        self.reader.dispose()
        self.writer.dispose()
        self._hold()
        log.warning(f"{what} was deleted; the database was written again", path=str(self.path))


def _inspect(path: Path, busy_timeout_s: float) -> None:
    """Look at the file before anything is opened for writing. Raises StoreError, or Damaged.

    An empty or missing file is a new database, but not where copies tell of an old one: with a new
    owner's id all containers that run would be strangers.
    """
    if not path.exists() or not path.stat().st_size:
        if (loss := lost(path)) is not None:
            raise loss
        return
    try:
        with closing(reader_of(path, busy_timeout_s)) as connection:
            problem = quick_problem(connection, CHECK_LIMIT_S)
    except TimeoutError:
        log.warning("the database is too large to be checked at the start; the next copy checks all of it")
        return
    if problem is not None:
        raise damaged(path, problem)


def _engine(path: Path, busy_timeout_s: float, *, readers: int) -> Engine:
    """An engine that reads with `readers` connections, or writes with one if that is 0."""

    def connect() -> sqlite3.Connection:
        # isolation_level None: sqlite3 opens no transactions itself.
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            timeout=busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            if not readers:
                connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute(f"PRAGMA query_only={'ON' if readers else 'OFF'}")
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine(
        "sqlite://",
        creator=connect,
        poolclass=QueuePool,
        pool_size=readers or 1,
        max_overflow=0,
        json_serializer=to_json,
        json_deserializer=json.loads,
    )
    if readers:
        return engine.execution_options(isolation_level="AUTOCOMMIT")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _raw(connection: Connection) -> sqlite3.Connection:
    return cast(sqlite3.Connection, connection.connection.driver_connection)


def to_json(value: object) -> str:
    """JSON of plain data, mappings and dataclasses. What UTF-8 cannot say becomes a question mark."""
    try:
        return orjson.dumps(value, default=_plain).decode()
    except TypeError:  # a lone surrogate, from bytes that were no text, or an integer beyond 64 bits
        return clean(json.dumps(value, default=_plain, ensure_ascii=False))


def clean(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, set | frozenset):
        return list(value)
    return str(value)
