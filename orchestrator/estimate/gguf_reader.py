"""Takes values off a file from its front, with every length checked before it is used.

What is not wanted is stepped over without being read: a vocabulary of 150,000 tokens costs its lengths only.
The file is read, not mapped: one that is cut short meanwhile must be an error and not a SIGBUS.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from sys import intern
from typing import BinaryIO, NamedTuple

from orchestrator.estimate.ggml_types import BLOCKS

Value = int | float | bool | str | tuple[int | float | bool, ...]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CHUNK = 1 << 20
_LONGEST_HEADER, _LONGEST_KEY = 512 << 20, 65_535
_LONGEST_NAME = 256  # llama.cpp allows 63
_LONGEST_KEPT = 4096  # a text in bytes, an array in elements; the longest that matter have one for each layer
_MOST_KEPT = 4 << 20  # bytes of all values together


class GgufError(Exception):
    """The file is missing, cut short, or not a GGUF; the message is a sentence that names it."""


class TensorInfo(NamedTuple):
    """`offset` counts from where the data begins; `bytes` is None for a type newer than our table."""

    name: str
    offset: int
    bytes: int | None
    kind: int = 0
    dimensions: int = 1


class Reader:
    """Raises GgufError before anything reaches beyond the file's end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self._path, self.size = file, path, size
        self._window, self._window_at, self.offset = b"", 0, 0
        self._kept = 0

    def broken(self, reason: str) -> GgufError:
        return GgufError(f"{self._path} is not a sound GGUF file: {reason}.")

    def short(self, reason: str) -> GgufError:
        return GgufError(
            f"{self._path} is cut short: {reason}, the file at {self.size:,}. Was its download interrupted?"
        )

    def skip(self, length: int) -> None:
        end = self.offset + length
        if end > self.size:
            raise self.short(f"its header needs at least {end:,} bytes")
        if end > _LONGEST_HEADER:
            raise self.broken(f"its header is longer than {_LONGEST_HEADER >> 20} MiB")
        self.offset = end

    def take(self, length: int) -> bytes:
        """The next bytes; callers bound `length`."""
        begin = self.offset
        self.skip(length)
        place = begin - self._window_at
        if place < 0 or place + length > len(self._window):
            self._fill(begin, length)
            place = 0
        return self._window[place : place + length]

    def _fill(self, begin: int, least: int) -> None:
        self._file.seek(begin)
        self._window, self._window_at = self._file.read(max(_CHUNK, least)), begin
        if len(self._window) < least:
            raise self.short("it shrank while it was read")

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def count(self, least_bytes: int, most: int | None = None) -> int:
        """A number of things of at least so many bytes each, which the file must have room for."""
        count = self.number("Q")
        if most is not None and count > most:
            raise self.broken(f"it claims to have {count:,} entries, {most:,} at most make sense")
        if count * least_bytes > self.size - self.offset:
            end = self.offset + count * least_bytes
            raise self.short(f"the {count:,} entries that it announces end at byte {end:,} or later")
        return count

    def key(self) -> str:
        return self.take(self.count(1, _LONGEST_KEY)).decode("utf-8", "replace")

    def value(self) -> tuple[Value | None, int]:
        """The next typed value, and an array's length; None for what is too long, and for arrays of text."""
        kind = self.number("I")
        if kind == _STRING:
            return self._text(), 0
        if kind in _SCALARS:
            return _plain(self._unpack(_SCALARS[kind], 1)[0]), 0
        if kind == _ARRAY:
            return self._array()
        raise self.broken(f"a value has the unknown type {kind}")

    def _text(self) -> str | None:
        length = self.count(1)
        if length > _LONGEST_KEPT:
            self.skip(length)
            return None
        self._keep(length)
        return self.take(length).decode("utf-8", "replace")

    def _array(self) -> tuple[Value | None, int]:
        kind = self.number("I")
        if kind == _STRING:
            length = self.count(8)
            self._skip_texts(length)
            return None, length
        if kind not in _SCALARS:
            raise self.broken(f"an array has the unknown type {kind}")
        width = struct.calcsize("<" + _SCALARS[kind])
        length = self.count(width)
        if length > _LONGEST_KEPT:
            self.skip(length * width)
            return None, length
        self._keep(length * width)
        return tuple(_plain(item) for item in self._unpack(_SCALARS[kind], length)), length

    def _keep(self, length: int) -> None:
        self._kept += length
        if self._kept > _MOST_KEPT:
            raise self.broken(f"its metadata is larger than {_MOST_KEPT >> 20} MiB beside the vocabulary")

    def _skip_texts(self, count: int) -> None:
        """Step over a vocabulary; a loop of its own, since it turns some 300,000 times for one file."""
        length_at = struct.Struct("<Q").unpack_from
        while count:
            self.take(8)  # so that the window has at least one length, or the file's end is told
            window, place = self._window, self.offset - 8 - self._window_at
            last = len(window) - 8
            for _ in range(count):
                if place > last:
                    break
                place += 8 + length_at(window, place)[0]
                count -= 1
            self.offset = self._window_at
            self.skip(place)

    def _unpack(self, code: str, count: int) -> tuple[int | float | bool, ...]:
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def tensor(self) -> TensorInfo:
        name = self.take(self.count(1, _LONGEST_NAME)).decode("utf-8", "replace")
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.broken(f"the tensor '{name}' has {dimensions} dimensions")
        shape = [self.number("Q") for _ in range(dimensions)]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in BLOCKS:
            return TensorInfo(intern(name), offset, None, kind, dimensions)
        per_block, size = BLOCKS[kind]
        if shape[0] % per_block:
            raise self.broken(f"the tensor '{name}' has rows of {shape[0]}, no multiple of {per_block}")
        return TensorInfo(intern(name), offset, math.prod(shape) // per_block * size, kind, dimensions)


def _plain(value: int | float | bool) -> int | float | bool:
    return 0.0 if isinstance(value, float) and not math.isfinite(value) else value
