"""Opening the database: one server per file, migrated first, and every error said in plain words."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

import orjson
import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

import orchestrator
from orchestrator.core.errors import DatabaseInUse, SchemaTooNew, StoreError

if TYPE_CHECKING:
    from typing import IO

BUSY_TIMEOUT_S = 5.0
READERS = 2
_PACKAGE = Path(orchestrator.__file__).parent

log = structlog.get_logger(__name__)


class Database:
    """An open, migrated database that this process owns until `close`.

    `writer` has one connection and opens every transaction with BEGIN IMMEDIATE: a transaction that
    begins as a reader cannot wait for the write lock, it fails. `reader` commits each statement
    by itself and cannot write. Neither creates the file, so a lost one is noticed, not replaced by
    an empty one.
    """

    def __init__(self, path: Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        """Raises DatabaseInUse, SchemaTooNew, or StoreError."""
        self.path = path.absolute()
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
        self.writer = _engine(self.path, busy_timeout_s, readers=0)
        self.reader = _engine(self.path, busy_timeout_s, readers=READERS)
        self._identity: int | None = None
        try:
            with explained(self.path):
                self.path.touch()
                self._identity = os.open(self.path, os.O_PATH)
                _migrate(self.writer, self.path)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One write transaction: all of it or nothing. For one thread at a time. Raises StoreError."""
        with explained(self.path):
            self._check_file()
            with self.writer.begin() as connection:
                yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for reading, from any thread. Raises StoreError."""
        with explained(self.path), self.reader.connect() as connection:
            yield connection

    def close(self) -> None:
        """Close the file and let another server have it."""
        self.reader.dispose()
        self.writer.dispose()
        if self._identity is not None:
            os.close(self._identity)
            self._identity = None
        self._lock.close()

    def _check_file(self) -> None:
        """SQLite goes on writing to a file that no longer has a name; what it writes would be lost.

        A deleted file is written anew from what is still open. Raises StoreError if it was moved away
        or replaced.
        """
        assert self._identity is not None
        opened = os.fstat(self._identity)
        try:
            named = self.path.stat()
        except FileNotFoundError:
            if opened.st_nlink:
                raise StoreError(
                    f"The database {self.path} was moved away while the server runs. Move it back."
                ) from None
            self._write_anew()
            return
        if (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            raise StoreError(
                f"The database {self.path} was replaced while the server runs. Restart the server to use "
                "the new file."
            )

    def _write_anew(self) -> None:
        copy = _beside(self.path, ".rescued")
        with self.writer.connect() as connection:
            _copy(_raw(connection), copy)
        self.reader.dispose()
        self.writer.dispose()
        for rest in ("-wal", "-shm"):  # of the lost file; SQLite would apply them to the new one
            _beside(self.path, rest).unlink(missing_ok=True)
        copy.replace(self.path)
        os.close(cast(int, self._identity))
        self._identity = os.open(self.path, os.O_PATH)
        log.warning("the database file was deleted; it was written again", path=str(self.path))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into StoreErrors that say how to get out."""
    try:
        yield
    except DBAPIError as error:
        raise StoreError(_sentence(path, cast(sqlite3.Error, error.orig))) from error
    except sqlite3.Error as error:
        raise StoreError(_sentence(path, error)) from error
    except OSError as error:
        raise StoreError(
            f"The database {path} cannot be used: {error.strerror or error}. Its folder must exist on this "
            "machine and be writable by the user the server runs as."
        ) from error


_SENTENCES = (
    (
        ("SQLITE_BUSY", "SQLITE_LOCKED"),
        "is locked by another program. Close whatever else has it open (a database browser, a copy in "
        "progress).",
    ),
    (("SQLITE_FULL",), "cannot grow: the disk is full. Free some space; nothing was half written."),
    (
        ("SQLITE_CORRUPT",),
        "is damaged. Stop the server, set the file aside, and put a copy of it back or start with a new one.",
    ),
    (
        ("SQLITE_NOTADB",),
        "is not a SQLite database. Name another file as the database, or move this one away.",
    ),
    (
        ("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH"),
        "cannot be written. The file and its folder must be writable by the user the server runs as.",
    ),
    (
        ("SQLITE_CANTOPEN",),
        "cannot be opened. The file and its folder must exist and be writable by the user the server "
        "runs as.",
    ),
    (("SQLITE_IOERR",), "cannot be read or written: the disk reports an error. Look at the system's log."),
)


def _sentence(path: Path, error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", "")
    for names, text in _SENTENCES:
        if name.startswith(names):
            return f"The database {path} {text} ({error})"
    return f"The database {path} failed: {error}."


def _lock(path: Path) -> IO[str]:
    """Own the database until the returned file is closed. A killed owner's lock goes with it."""
    file = _beside(path, ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise DatabaseInUse(
            f"The database {path} belongs to a server that runs already (PID {holder}). Stop that one, or "
            "give this one a database of its own."
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


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


def _migrate(engine: Engine, path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations_dir()).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        current = _revision(connection, path)
        _refuse_unknown(current, scripts, path)
        head = scripts.get_current_head()
        if current == head:
            return
        connection.rollback()  # SQLite cannot copy through a connection that is writing
        if current is not None:
            _copy(_raw(connection), _beside(path, f".before-{head}.bak"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(connection: Connection, path: Path) -> str | None:
    """The schema's revision, None if the database is empty."""
    problem = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    if problem != "ok":
        raise StoreError(
            f"The database {path} is damaged ({problem}). Put a copy back, or start with a new one."
        )
    current = MigrationContext.configure(connection).get_current_revision()
    tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
    if current is None and tables:
        raise StoreError(f"{path} is a database of another program. Name another file as the database.")
    return current


def _refuse_unknown(current: str | None, scripts: ScriptDirectory, path: Path) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    if current is None or current in known:
        return
    copies = ", ".join(sorted(copy.name for copy in path.parent.glob(f"{path.name}.before-*.bak")))
    raise SchemaTooNew(
        f"The database {path} was written by a newer version of this program (its schema is {current}, this "
        f"program knows up to {scripts.get_current_head()}). Install the newer version again, or put back a "
        f"copy made before the change ({copies or 'none lies beside it'}), or name another database."
    )


def migrations_dir() -> Path:
    """Where the migrations are: inside an installed package, or beside it in a checkout."""
    # The installed place first: beside an installed package, `migrations` may be anybody's.
    for place in (_PACKAGE / "_shipped" / "migrations", _PACKAGE.parent / "migrations"):
        if (place / "env.py").is_file():
            return place
    raise StoreError("The installation is incomplete: the folder 'migrations' is missing. Install it again.")


def _copy(source: sqlite3.Connection, to: Path) -> None:
    """Copy a database as it is committed now; `to` appears whole or not at all."""
    half_done = _beside(to, ".part")
    half_done.unlink(missing_ok=True)
    target = sqlite3.connect(half_done)
    try:
        source.backup(target)
    finally:
        target.close()
    half_done.replace(to)


def _raw(connection: Connection) -> sqlite3.Connection:
    return cast(sqlite3.Connection, connection.connection.driver_connection)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


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
