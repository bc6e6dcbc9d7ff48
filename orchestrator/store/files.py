"""The files on the disk: locked for one server, still the ones that were opened, and written to stay."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.core.errors import DatabaseInUse

if TYPE_CHECKING:
    from typing import IO


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def sync(path: Path) -> None:
    """Have the disk keep this file, or the names in this folder. Never for a database that is open here:
    closing any descriptor of it would drop SQLite's locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Held:
    """A file as it was when it was opened, so that another of the same name is told from it.

    O_PATH: closing such a descriptor leaves the locks alone that SQLite has on the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_PATH)
        self._is_closed = False

    @property
    def is_in_place(self) -> bool:
        """Whether its path still names this very file."""
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return False
        opened = os.fstat(self._descriptor)
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    @property
    def is_deleted(self) -> bool:
        """Whether no name is left of it, and nothing lies in its place."""
        return os.fstat(self._descriptor).st_nlink == 0 and not self.path.exists()

    def close(self) -> None:
        """Twice is harmless: the number may be another file's by then."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self._descriptor)


class Lock:
    """Owns the database until it is closed. A killed owner's lock goes with it."""

    def __init__(self, database: Path) -> None:
        """Raises DatabaseInUse with the owner's PID."""
        self._database = database
        self._path = beside(database, ".lock")
        self._file = self._take()
        self._held = Held(self._path)

    def renew(self) -> None:
        """Take it again if its file was deleted, before another server does. Raises DatabaseInUse."""
        if self._held.is_in_place:
            return
        file = self._take()
        self.close()
        self._file, self._held = file, Held(self._path)

    def close(self) -> None:
        self._held.close()
        self._file.close()

    def _take(self) -> IO[str]:
        file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise DatabaseInUse(
                f"The database {self._database} belongs to a server that runs already (PID {holder}). Stop "
                "that one, or give this one a database of its own."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file
