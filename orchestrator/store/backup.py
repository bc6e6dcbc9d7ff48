"""Making a copy of the database while it is written, and putting one back while it is not."""

from __future__ import annotations

import glob
import shutil
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from orchestrator.core.errors import StoreError
from orchestrator.store.copies import (
    Copy,
    copies_of,
    copy_problem,
    full_problem,
    new_copy,
    newest_good,
    reader_of,
    stamp,
    surplus,
)
from orchestrator.store.explain import Damaged, damaged, explained, lost
from orchestrator.store.files import Lock, beside, sync
from orchestrator.store.obstacles import obstacle
from orchestrator.store.schema import revisions

SPARE_BYTES = 8 * 2**20
"""What a copy leaves free on the disk, for the database itself."""
ABANDONED_S = 3600.0

_CLOSE_OPERATIONS = """
UPDATE operation SET state = 'failed', code = 'restored', ended_at = ?,
    message = 'An older copy of the database was put back before its end was known.'
WHERE state = 'running'
"""


@dataclass(frozen=True, slots=True)
class Restored:
    """The copy that was put back, and where the database of before was put, if there was one."""

    copy: Path
    aside: Path | None


@dataclass(frozen=True, slots=True)
class FileReport:
    """A whole check: `problem` is None if the file is sound. `copies` are the newest first."""

    problem: str | None
    size_bytes: int
    copies: tuple[Copy, ...]


def back_up(path: Path, at: float, before: str | None = None) -> Copy:
    """Copy the database as it is committed now, from a connection of its own: nobody waits for it.

    Then drop the copies that are not kept any more. Raises StoreError; the copies of before are then
    still there.
    """
    copy = new_copy(path, at, before)
    try:
        with explained(path):
            copy.path.parent.mkdir(exist_ok=True)
            _check_room(path, copy.path.parent)
            with closing(reader_of(path)) as source:
                write_copy(source, path, copy.path)
            _tidy(path, copy, at)
    except Damaged:
        raise
    except StoreError as error:
        raise type(error)(f"No copy of the database was made. {error.message}") from error
    return copy


def write_copy(source: sqlite3.Connection, path: Path, to: Path) -> None:
    """Copy what `source` has open; `to` appears whole, checked and on the disk, or not at all.

    Raises Damaged, naming `path`, if what is there is not sound.
    """
    half_done = beside(to, ".part")
    half_done.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(half_done, isolation_level=None)) as target:
            source.backup(target)  # all in one step: begun again at each write of others, it might never end
            target.execute("PRAGMA journal_mode=DELETE")  # one plain file, whoever opens it
            problem = full_problem(target)
        if problem is not None:
            _blame(source, path, to, problem)
        sync(half_done)
        half_done.replace(to)
        sync(to.parent)
    except BaseException:
        with suppress(OSError):
            half_done.unlink(missing_ok=True)
        raise


def restore(path: Path, chosen: Path | None = None, *, at: float | None = None) -> Restored:
    """Put a copy in the place of the database: this one, or the newest good one.

    What was there is kept beside it with its write-ahead log. Loads and unloads that were running in
    the copy are closed, so that no old wish is carried out again. Interrupted at any moment, it can be
    called again. Raises DatabaseInUse while a server runs, and StoreError if there is no good copy.
    """
    path = path.absolute()
    at = time.time() if at is None else at
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(Lock(path)):
            copy = _good(path, chosen.absolute() if chosen else None)
            fresh = beside(path, ".restoring")
            with closing(reader_of(copy)) as source:
                write_copy(source, copy, fresh)
            _settle(fresh, copy, at)
            aside = _set_aside(path, at)
            fresh.replace(path)
            sync(path.parent)
    return Restored(copy, aside)


def check(path: Path) -> FileReport:
    """Read all of the database, also while a server runs. Nothing is changed. Raises StoreError."""
    path = path.absolute()
    with explained(path):
        size_bytes = _size_bytes(path)
        return FileReport(copy_problem(path), size_bytes, tuple(copies_of(path)))


def _size_bytes(path: Path) -> int:
    """Raises Damaged if it is missing or empty where copies tell of an old one, and StoreError for none."""
    if (loss := lost(path)) is not None:
        raise loss
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise StoreError(
            f"There is no database {path}; the server makes it at its first start. --config or --database "
            "names another."
        ) from None


def _blame(source: sqlite3.Connection, path: Path, to: Path, problem: str) -> NoReturn:
    """A copy is not sound: because its source is not, or because the disk did not keep what it was given."""
    if full_problem(source) is None:
        raise StoreError(f"{to} was not kept by the disk as it was written ({problem}). Look at the disk.")
    raise damaged(path, problem)


def _tidy(path: Path, newest: Copy, at: float) -> None:
    for copy in surplus(copies_of(path), at):
        if copy.path != newest.path:  # the clock may have been wrong when the others were made
            copy.path.unlink(missing_ok=True)
    for half_done in newest.path.parent.glob(f"{glob.escape(path.stem)}-*.part"):  # its maker was killed
        if half_done.stat().st_mtime < time.time() - ABANDONED_S:
            half_done.unlink(missing_ok=True)


def _check_room(path: Path, folder: Path) -> None:
    needed = _size_bytes(path) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"It needs {needed >> 20} MiB and {folder} has {free >> 20} MiB free: the disk is nearly full. "
            "Free some space."
        )


def _good(path: Path, chosen: Path | None) -> Path:
    known = revisions()
    if chosen is None:
        copy = newest_good(path, known)
        if copy is None:
            raise StoreError(f"There is no good copy of the database {path} to put back.")
        return copy.path
    if chosen.exists() and path.exists() and chosen.samefile(path):
        raise StoreError(f"{chosen} is the database itself. Name a copy of it.")
    try:
        problem = copy_problem(chosen, known) if chosen.is_file() else "there is no such file"
    except (sqlite3.Error, OSError) as error:
        problem = f"it {obstacle(chosen) or f'cannot be read ({error}).'}".removesuffix(".")
    if problem is None:
        return chosen
    others = [copy.path for copy in copies_of(path) if copy.path != chosen]
    listing = f" Others: {', '.join(map(str, others))}." if others else ""
    raise StoreError(f"The copy {chosen} cannot be put back: {problem}. Nothing was changed.{listing}")


def _settle(fresh: Path, copy: Path, at: float) -> None:
    with closing(sqlite3.connect(fresh)) as connection, connection:
        connection.execute(_CLOSE_OPERATIONS, (at,))
        remember = "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)"
        connection.executemany(remember, [("restored_from", copy.name), ("restored_at", str(at))])


def _set_aside(path: Path, at: float) -> Path | None:
    """Move the database out of the way, whole: its write-ahead log may hold what the file does not."""
    aside = _free_name(beside(path, f".aside-{stamp(at)}"))
    is_there = path.exists()
    if is_there:
        path.rename(aside)  # first: without it, and with copies there, no server starts
    log = beside(path, "-wal")
    if log.exists():
        log.rename(beside(aside, "-wal"))
        is_there = True
    beside(path, "-shm").unlink(missing_ok=True)
    return aside if is_there else None


def _free_name(path: Path) -> Path:
    names = [path, *(beside(path, f".{number}") for number in range(2, 1000))]
    return next(name for name in names if not name.exists() and not beside(name, "-wal").exists())
