"""The last lines of a log, for failures and for `logs --tail`."""

from __future__ import annotations

import os
from pathlib import Path

_CHUNK_BYTES = 64 * 1024

FAILURE_LINES = 20
_FAILURE_BYTES = 64 * 1024
_LINE_LIMIT = 1000  # a progress bar or a dumped tensor must not fill the event log
_BLOCK_BYTES = 64 * 1024


def last_lines(data: bytes, count: int = FAILURE_LINES) -> tuple[str, ...]:
    """The last `count` non-empty lines of `data`, oldest first, undecodable bytes replaced."""
    lines = [line.rstrip() for line in data.decode(errors="replace").splitlines()]
    return tuple(line[:_LINE_LIMIT] for line in lines if line)[-count:]


def last_lines_of(path: Path, count: int = FAILURE_LINES) -> tuple[str, ...]:
    """The same of a file, reading only its end. No file has no lines."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _FAILURE_BYTES))
            return last_lines(file.read(), count)
    except FileNotFoundError:
        return ()


def tail_offset(path: Path, lines: int) -> int:
    """Where in the file its last `lines` lines begin, in bytes; a last line may still be unfinished.

    Raises OSError.
    """
    with path.open("rb") as file:
        size = end = file.seek(0, os.SEEK_END)
        if lines <= 0:
            return size
        missing = lines
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            block = file.read(end - start)
            # The newline that ends the file begins no further line.
            stop = len(block) - 1 if end == size and block.endswith(b"\n") else len(block)
            while (at := block.rfind(b"\n", 0, stop)) >= 0:
                missing -= 1
                if missing == 0:
                    return start + at + 1
                stop = at
            end = start
        return 0


def read_chunk(path: Path, offset: int) -> bytes:
    """The next bytes; none at the end, or once the log was removed."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(_CHUNK_BYTES)
    except FileNotFoundError:
        return b""
