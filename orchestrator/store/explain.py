"""Errors of SQLite and of the file system in plain words: the cause, the file, and the way out."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from sqlalchemy.exc import DBAPIError

from orchestrator.core.errors import StoreError
from orchestrator.store.copies import copies_of, way_back
from orchestrator.store.obstacles import obstacle


class Damaged(StoreError):
    """The file is not what SQLite wrote; the message says how to get a good one back."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into StoreErrors that say how to get out."""
    try:
        yield
    except DBAPIError as error:
        raise _in_words(path, cast(sqlite3.Error, error.orig)) from error
    except sqlite3.Error as error:
        raise _in_words(path, error) from error
    except OSError as error:
        cause = obstacle(path) or f"cannot be used: {_file_cause(error)}"
        raise StoreError(f"The database {path} {cause}") from error


def damaged(path: Path, problem: str) -> Damaged:
    return Damaged(f"The database {path} is damaged ({problem}). {way_back(path)}")


def lost(path: Path) -> Damaged | None:
    """If the file is missing or empty where copies tell of an old one."""
    is_there = path.exists()
    if (is_there and path.stat().st_size) or not copies_of(path):
        return None
    return Damaged(
        f"The database {path} is {'empty' if is_there else 'missing'}, but there are copies of it. "
        f"{way_back(path)} To begin with an empty database, move {copies_of(path)[0].path.parent} away too."
    )


_FULL = "the disk is full. Free some space; nothing was half written."
_READ_ONLY = (
    "its file system is mounted read-only, as the kernel does after a disk error. Look at the system's log, "
    "and mount it writable again."
)
_OF_THE_FILE = ("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH", "SQLITE_CANTOPEN", "SQLITE_IOERR")
"""Errors whose cause may be seen from outside."""
_SENTENCES = (
    (
        ("SQLITE_BUSY", "SQLITE_LOCKED"),
        "is locked by another program. Close whatever else has it open (a database browser, a copy in "
        "progress).",
    ),
    (("SQLITE_FULL",), f"cannot grow: {_FULL}"),
    (
        ("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH"),
        "cannot be written. The file and its folder must be writable by the user the server runs as.",
    ),
    (
        ("SQLITE_CANTOPEN",),
        "cannot be opened. The file and its folder must exist and be writable by the user the server "
        "runs as.",
    ),
)


def _in_words(path: Path, error: sqlite3.Error) -> StoreError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_CORRUPT"):
        return damaged(path, str(error))
    if name.startswith("SQLITE_NOTADB"):
        return _not_a_database(path, error)
    if name.startswith(_OF_THE_FILE) and (cause := obstacle(path)) is not None:
        return StoreError(f"The database {path} {cause} ({error})")
    if name.startswith("SQLITE_IOERR"):
        return StoreError(f"The database {path} cannot be read or written: {_disk_cause(path)} ({error})")
    for names, text in _SENTENCES:
        if name.startswith(names):
            return StoreError(f"The database {path} {text} ({error})")
    return StoreError(f"The database {path} failed: {error}.")


def _not_a_database(path: Path, error: sqlite3.Error) -> StoreError:
    if copies_of(path):  # it was ours
        return damaged(path, str(error))
    return Damaged(
        f"The database {path} is not a SQLite database. Name another file as the database, or move this one "
        f"away. ({error})"
    )


def _disk_cause(path: Path) -> str:
    """SQLite does not say which error the disk gave; the file system may."""
    try:
        disk = os.statvfs(path.parent)
    except OSError as error:
        return _file_cause(error)
    if disk.f_flag & os.ST_RDONLY:
        return _READ_ONLY
    if disk.f_bavail == 0:
        return _FULL
    return (
        "the disk reports an error, or a quota or a limit on the size of files is reached. Look at the "
        "system's log; nothing was half written, and a server that runs tries again."
    )


def _file_cause(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _FULL
    if error.errno == errno.EROFS:
        return _READ_ONLY
    return (
        f"{error.strerror or error}. Its folder must exist on this machine and be writable by the user the "
        "server runs as."
    )
