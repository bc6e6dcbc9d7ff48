"""The copies of the database: how they are called, which are kept, and which one is the way back.

They lie in the folder `backups` beside the database, each a plain file that was checked when it was
made. The rule: the newest three, the newest of each of the last seven days, and of those made before a
migration the newest for each schema.
"""

from __future__ import annotations

import re
import shlex
import sqlite3
import threading
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from orchestrator.core.units import age

FOLDER = "backups"
KEPT_NEWEST = 3
KEPT_DAYS = 7
_STAMP = "%Y%m%dT%H%M%SZ"
_DAY_S = 86400.0
_OF_THE_CONTENT = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT", "SQLITE_ERROR")
_OF_RIGHTS = ("SQLITE_READONLY", "SQLITE_CANTOPEN")


@dataclass(frozen=True, slots=True)
class Copy:
    """`made_at` is seconds since 1970; `before` is the schema whose migration it was made before."""

    path: Path
    made_at: float
    before: str | None = None


def stamp(at: float) -> str:
    """A moment as part of a file's name; later ones sort later."""
    return datetime.fromtimestamp(at, UTC).strftime(_STAMP)


def new_copy(database: Path, at: float, before: str | None = None) -> Copy:
    """Where a copy made at this moment belongs; nothing is written."""
    what = f"{stamp(at)}-before-{before}" if before else stamp(at)
    return Copy(database.parent / FOLDER / f"{database.stem}-{what}{database.suffix}", at, before)


def copies_of(database: Path) -> list[Copy]:
    """All there are, the newest first."""
    pattern = re.compile(
        rf"{re.escape(database.stem)}-(\d{{8}}T\d{{6}}Z)(?:-before-(\w+))?{re.escape(database.suffix)}"
    )
    found = []
    folder = database.parent / FOLDER
    for file in folder.iterdir() if folder.is_dir() else ():
        if (name := pattern.fullmatch(file.name)) is not None:
            made = datetime.strptime(name[1], _STAMP).replace(tzinfo=UTC)
            found.append(Copy(file, made.timestamp(), name[2]))
    return sorted(found, key=lambda copy: copy.made_at, reverse=True)


def surplus(copies: Iterable[Copy], now: float) -> list[Copy]:
    """Those that the rule does not keep."""
    newest_first = sorted(copies, key=lambda copy: copy.made_at, reverse=True)
    regular = [copy for copy in newest_first if copy.before is None]
    kept = regular[:KEPT_NEWEST]
    days: set[str] = set()
    schemas: set[str] = set()
    for copy in newest_first:
        day = stamp(copy.made_at)[:8]
        if copy.before is not None:
            if copy.before not in schemas:
                kept.append(copy)
            schemas.add(copy.before)
        elif day not in days and copy.made_at > now - KEPT_DAYS * _DAY_S:
            days.add(day)
            kept.append(copy)
    return [copy for copy in newest_first if copy not in kept]


def reader_of(path: Path, timeout_s: float = 5.0, *, is_alone: bool = False) -> sqlite3.Connection:
    """A connection that cannot write, and so leaves a damaged file as it is.

    With `is_alone` nobody else may write meanwhile, and SQLite looks at this one file only.
    """
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro{'&immutable=1' if is_alone else ''}",
        uri=True,
        timeout=timeout_s,
        isolation_level=None,
        check_same_thread=False,
    )


def quick_problem(connection: sqlite3.Connection, limit_s: float) -> str | None:
    """What SQLite's quick check finds wrong; None if all is well. Raises TimeoutError after `limit_s`.

    It reads every page and checks the structure, but not that indexes and tables agree.
    """
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        connection.interrupt()  # a progress handler is not asked during this check before SQLite 3.41

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        problem = _first_problem(connection, "PRAGMA quick_check(1)")
    except sqlite3.OperationalError:
        if not is_over.is_set():
            raise
    finally:
        timer.cancel()
        timer.join()  # it may not interrupt what comes next
    if is_over.is_set():  # what it says then is of what it did not read
        raise TimeoutError(f"not checked within {limit_s} s")
    return problem


def full_problem(connection: sqlite3.Connection) -> str | None:
    """What SQLite's whole check finds wrong, indexes included; None if all is well."""
    return _first_problem(connection, "PRAGMA integrity_check(1)")


def _first_problem(connection: sqlite3.Connection, check: str) -> str | None:
    (found,) = connection.execute(check).fetchone()
    return None if found == "ok" else " ".join(str(found).split())


def revision_in(connection: sqlite3.Connection) -> str | None:
    """The schema's revision; None if it is no database of ours. Raises sqlite3.DatabaseError."""
    named = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'"
    if connection.execute(named).fetchone() is None:
        return None
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else None


def copy_problem(path: Path, known: Iterable[str] | None = None) -> str | None:
    """Why this file cannot be the database; None if it can. `known` are the revisions we understand.

    Raises sqlite3.Error if it cannot be looked at, which tells nothing of what is in it.
    """
    try:
        problem, revision = _looked_at(path)
    except sqlite3.Error as error:
        if not getattr(error, "sqlite_errorname", "").startswith(_OF_THE_CONTENT):
            raise
        return str(error)
    if problem is not None:
        return problem
    if revision is None:
        return "it is not a database of this program"
    if known is not None and revision not in known:
        return f"a newer version of this program wrote it (its schema is {revision})"
    return None


def _looked_at(path: Path) -> tuple[str | None, str | None]:
    """What is wrong with the file, and its revision. Raises sqlite3.Error."""
    had_log = _has_log(path)
    with closing(open_to_read(path)) as connection:
        problem, revision = full_problem(connection), revision_in(connection)
    if problem is not None and not had_log and _has_log(path):  # a server has opened it meanwhile
        return _looked_at(path)
    return problem, revision


def open_to_read(path: Path, timeout_s: float = 5.0) -> sqlite3.Connection:
    """As `reader_of`, and for users too who may not write. Raises sqlite3.Error.

    To read beside a writer SQLite makes files beside the database. Who may not make any can read one that
    nobody has open: then all of it is in the one file.
    """
    connection = reader_of(path, timeout_s)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError as error:
        connection.close()
        if not getattr(error, "sqlite_errorname", "").startswith(_OF_RIGHTS) or _has_log(path):
            raise
        return reader_of(path, is_alone=True)
    except BaseException:
        connection.close()
        raise
    return connection


def _has_log(path: Path) -> bool:
    real = path.resolve()  # SQLite has it beside the file that a link leads to
    return real.with_name(f"{real.name}-wal").exists()


def newest_good(database: Path, known: Iterable[str] | None = None) -> Copy | None:
    """The newest copy that can be put back, checked again now."""
    known = None if known is None else frozenset(known)
    return next((copy for copy in copies_of(database) if _is_good(copy.path, known)), None)


def _is_good(copy: Path, known: Iterable[str] | None) -> bool:
    try:
        return copy_problem(copy, known) is None
    except (sqlite3.Error, OSError):
        return False


def way_back(database: Path, known: Iterable[str] | None = None) -> str:
    """Sentences: where the last good copy is, how old it is, and the command that restores it."""
    copy = newest_good(database, known)
    if copy is None:
        return (
            f"There is no copy of it that could be put back (in {database.parent / FOLDER}). With the server "
            "stopped, move the file away to begin with an empty one; containers that run are then strangers."
        )
    command = shlex.join(["orchestrator", "database", "restore", str(copy.path), "--database", str(database)])
    return (
        f"The last good copy is {copy.path}, made {age(time.time() - copy.made_at)} ago. Stop the server, "
        f"and put that copy back with: {command} (what is there now is kept beside it)."
    )
