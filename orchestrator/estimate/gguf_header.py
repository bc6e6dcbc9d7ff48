"""What a GGUF file says of itself, read without its weights and without trusting it.

Every length is checked against the file's size before it is used; token lists are skipped, not built.
The file is read, not mapped: one that is cut short meanwhile must be an error and not a SIGBUS.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

Value = int | float | bool | str | tuple[int | float | bool, ...]

# Elements and bytes of one block, by ggml type. Those with K or IQ in their name have blocks of 256.
BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
    42: (64, 18),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CHUNK = 4 << 20
_MOST_HEADER, _MOST_VALUES, _MOST_TENSORS, _MOST_KEPT = 512 << 20, 65_536, 1 << 20, 4096
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


class GgufError(Exception):
    """The file is missing, cut short, or not a GGUF; the message is a sentence that names it."""


@dataclass(frozen=True)
class Header:
    """`metadata` has the file's scalars and its short numeric arrays; sizes are bytes, of all shards."""

    architecture: str
    metadata: Mapping[str, Value]
    tensor_bytes: int
    file_bytes: int
    shards: int = 1

    def number(self, key: str, default: float = 0) -> float:
        """A metadata number; of an array (one value per layer) the largest."""
        value = self.metadata.get(key, default)
        if isinstance(value, tuple):
            value = max(value, default=default)
        return default if isinstance(value, str) or not math.isfinite(value) else value

    def of(self, key: str, default: float = 0) -> int:
        """A number of the model's own, such as `block_count`, whose key begins with the architecture."""
        return max(0, int(self.number(f"{self.architecture}.{key}", default)))


def read_gguf(path: Path) -> Header:
    """The header of a file, or of a split model by its first shard (all shards must be there).

    Raises GgufError. What was read is remembered as long as size and time of change stay the same.
    """
    header = _read(path)
    split = _SHARD.fullmatch(path.name)
    if split is None:
        return header
    if int(split[2]) != 1:
        raise GgufError(
            f"{path} is a later part of a split model; name its first part, -00001-of-{split[3]}."
        )
    count = int(split[3])
    if count > 1000:
        raise GgufError(f"{path} claims to be split into {count} parts, which nothing is.")
    for part in range(2, count + 1):
        shard = _read(path.with_name(f"{split[1]}-{part:05}-of-{split[3]}{path.suffix}"))
        header = replace(
            header,
            tensor_bytes=header.tensor_bytes + shard.tensor_bytes,
            file_bytes=header.file_bytes + shard.file_bytes,
        )
    return replace(header, shards=count)


def _read(path: Path) -> Header:
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise GgufError(f"{path} is not a file.")
        return _parse(path, stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError as error:
        raise GgufError(f"There is no file {path}.") from error
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror or error}.") from error


@lru_cache(maxsize=256)
def _parse(path: Path, size: int, _changed_ns: int) -> Header:
    with path.open("rb") as file:
        reader = _Reader(file, path, size)
        if size < 4 or reader.take(4) != b"GGUF":
            raise GgufError(f"{path} is not a GGUF file.")
        version = reader.number("I")
        if version not in (2, 3):
            odd = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise GgufError(f"{path} is a GGUF file of a kind that cannot be used: {odd}.")
        tensors, values = reader.count(24, _MOST_TENSORS), reader.count(13, _MOST_VALUES)
        metadata: dict[str, Value] = {}
        for _ in range(values):
            key, value = reader.text(), reader.value()
            if value is not None:
                metadata[key] = value
        infos = [reader.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise reader.broken("its alignment makes no sense")
        total = _tensor_bytes(reader, infos, -(-reader.offset // alignment) * alignment)
    return Header(str(metadata.get("general.architecture", "")), metadata, total, size)


def _tensor_bytes(reader: _Reader, infos: list[tuple[int, int | None]], start: int) -> int:
    """The bytes of all tensors (offset from `start`, size or None); unknown ones reach to their successor."""
    infos.sort(key=lambda info: info[0])
    total, room = 0, max(0, reader.size - start)
    for place, (offset, known) in enumerate(infos):
        after = infos[place + 1][0] if place + 1 < len(infos) else room
        size = max(0, after - offset) if known is None else known
        if offset + size > room:
            raise reader.short(f"its tensors end at byte {start + offset + size:,}")
        total += size
    return total


class _Reader:
    """Takes values off the front of a file; raises GgufError before anything reaches beyond its end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self._path, self.size = file, path, size
        self._data, self.offset = bytearray(), 0

    def broken(self, reason: str) -> GgufError:
        return GgufError(f"{self._path} is not a sound GGUF file: {reason}.")

    def short(self, reason: str) -> GgufError:
        return GgufError(
            f"{self._path} is cut short: {reason}, the file at {self.size:,}. Was its download interrupted?"
        )

    def skip(self, length: int) -> int:
        """Step over bytes, having them in memory; returns where they begin."""
        begin, end = self.offset, self.offset + length
        if end > self.size:
            raise self.short(f"its header needs at least {end:,} bytes")
        if end > _MOST_HEADER:
            raise self.broken("its header is larger than 512 MiB")
        while end > len(self._data):
            piece = self._file.read(max(_CHUNK, end - len(self._data)))
            if not piece:
                raise self.short("it shrank while it was read")
            self._data += piece
        self.offset = end
        return begin

    def take(self, length: int) -> bytes:
        begin = self.skip(length)
        return bytes(self._data[begin : begin + length])

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def count(self, least_bytes: int, most: int | None = None) -> int:
        """A number of things of at least so many bytes each, which the file must have room for."""
        count = self.number("Q")
        if most is not None and count > most:
            raise self.broken(f"it claims to have {count:,} entries")
        if count * least_bytes > self.size - self.offset:
            raise self.short(f"its header announces {count:,} more entries")
        return count

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8", "replace")

    def value(self) -> Value | None:
        """The next typed value; None for what is not kept: long arrays and arrays of text."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return _plain(self._unpack(_SCALARS[kind], 1)[0])
        if kind != _ARRAY:
            raise self.broken(f"a value has the unknown type {kind}")
        kind = self.number("I")
        if kind == _STRING:
            self._skip_texts(self.count(8))
            return None
        if kind not in _SCALARS:
            raise self.broken(f"an array has the unknown type {kind}")
        width = struct.calcsize("<" + _SCALARS[kind])
        length = self.count(width)
        if length <= _MOST_KEPT:
            return tuple(_plain(item) for item in self._unpack(_SCALARS[kind], length))
        self.skip(length * width)
        return None

    def _skip_texts(self, count: int) -> None:
        """Step over a vocabulary; a loop of its own, since it turns some 300,000 times for one file."""
        length_at, position = struct.Struct("<Q").unpack_from, self.offset
        for _ in range(count):
            if position + 8 > len(self._data):
                self.offset = position
                self.skip(8)
            position += 8 + length_at(self._data, position)[0]
        self.offset = position
        self.skip(0)

    def _unpack(self, code: str, count: int) -> tuple[int | float | bool, ...]:
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def tensor(self) -> tuple[int, int | None]:
        """(offset in the data, bytes); bytes are None for a type that is newer than this table."""
        self.skip(self.count(1))
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.broken(f"a tensor has {dimensions} dimensions")
        elements = math.prod(self.number("Q") for _ in range(dimensions))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in BLOCKS:
            return offset, None
        per_block, size = BLOCKS[kind]
        return offset, -(-elements // per_block) * size


def _plain(value: int | float | bool) -> int | float | bool:
    return 0.0 if isinstance(value, float) and not math.isfinite(value) else value
