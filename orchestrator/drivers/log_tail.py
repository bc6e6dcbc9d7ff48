"""Logs of host processes: bounded in size, read from their last lines on, also while they are cut."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

LIMIT_BYTES = 30 * 1024 * 1024  # as containers have it: 3 x 10 MiB
_PAGE_BYTES = 4096
_CHUNK_BYTES = 64 * 1024
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of fallocate(2)

FAILURE_LINES = 20
_FAILURE_BYTES = 64 * 1024
_LINE_LIMIT = 1000  # a progress bar or a dumped tensor must not fill the event log


def last_lines(data: bytes, count: int = FAILURE_LINES) -> tuple[str, ...]:
    """The last `count` non-empty lines of `data`, oldest first, undecodable bytes replaced."""
    lines = [line.rstrip().lstrip("\0") for line in data.decode(errors="replace").splitlines()]
    return tuple(line[:_LINE_LIMIT] for line in lines if line)[-count:]


class BoundedLog:
    """A file that its writer appends to, which `cut` keeps from growing.

    What is too old is given back to the disk as a hole at the file's beginning, so that nothing moves and
    nothing that is written meanwhile is lost: a position in the file stays true for ever. The file's size
    is what was ever written; its use of the disk is what counts (`du`, not `ls`).
    Thread-safe; methods raise OSError unless they say otherwise.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path = path
        self._limit = limit_bytes
        self._lock = threading.Lock()  # or a reader would get the zeros of a hole that is just being made

    def cut(self) -> bool:
        """Whether it was too long. A file system without holes has it emptied."""
        with self._lock, suppress(FileNotFoundError), self.path.open("r+b") as file:
            begin, end = _extent(file.fileno())
            doomed = (end - self._limit) // _PAGE_BYTES * _PAGE_BYTES  # whole pages only make a hole
            if doomed <= begin:
                return False
            try:
                _punch(file.fileno(), doomed)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                log.warning("a log was emptied: its file system cannot shorten it", path=str(self.path))
                os.ftruncate(file.fileno(), 0)
            return True
        return False

    def read(self, position: int) -> tuple[bytes, int]:
        """The next bytes from there and where they end; what was cut off is skipped. Empty at the end."""
        with self._lock, suppress(FileNotFoundError), self.path.open("rb") as file:
            begin, end = _extent(file.fileno())
            position = max(position, begin) if position <= end else begin  # it was emptied
            data = os.pread(file.fileno(), _CHUNK_BYTES, position)
            return data, position + len(data)
        return b"", position

    def tail(self, lines: int) -> int:
        """The position where the last `lines` lines begin; the very last one may still be unfinished."""
        with self._lock, self.path.open("rb") as file:
            begin, end = _extent(file.fileno())
            if lines <= 0:
                return end
            missing = lines
            for start, block in _blocks_backwards(file.fileno(), begin, end):
                # The newline that ends the log begins no further line.
                stop = len(block) - 1 if start + len(block) == end and block.endswith(b"\n") else len(block)
                while (at := block.rfind(b"\n", 0, stop)) >= 0:
                    missing -= 1
                    if missing == 0:
                        return start + at + 1
                    stop = at
            return begin

    def last_lines(self, count: int = FAILURE_LINES) -> tuple[str, ...]:
        """As the function of this name says, of the log's end. No log has no lines."""
        with self._lock, suppress(FileNotFoundError), self.path.open("rb") as file:
            begin, end = _extent(file.fileno())
            begin = max(begin, end - _FAILURE_BYTES)
            return last_lines(os.pread(file.fileno(), end - begin, begin), count)
        return ()


def _extent(file: int) -> tuple[int, int]:
    """Where its data begins, behind the hole, and where it ends."""
    end = os.fstat(file).st_size
    try:
        return os.lseek(file, 0, os.SEEK_DATA), end
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data at all
            raise
        return end, end


def _punch(file: int, size: int) -> None:
    """Make a hole of the file's first `size` bytes; its length stays. Raises OSError."""
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    flags = ctypes.c_int(_PUNCH_HOLE | _KEEP_SIZE)
    if fallocate(ctypes.c_int(file), flags, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _blocks_backwards(file: int, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Position and content of each block, the last one first."""
    while end > begin:
        start = max(begin, end - _CHUNK_BYTES)
        yield start, os.pread(file, end - start, start)
        end = start
