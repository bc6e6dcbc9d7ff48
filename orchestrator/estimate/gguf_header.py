"""What a GGUF file says of itself, read without its weights and without trusting it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from stat import S_ISREG

from orchestrator.estimate.gguf_reader import GgufError, Reader, TensorInfo, Value

__all__ = ["GgufError", "Header", "Value", "read_gguf"]

_MOST_VALUES, _MOST_TENSORS, _MOST_SHARDS = 65_536, 65_536, 1000
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class Header:
    """What matters of a file, or of all shards of a split one.

    `metadata` has the scalars and the short numeric arrays; `lengths` has the length of every array, so
    also of the vocabulary; `tensors` has the bytes of each by its name, `matrix_kinds` the ggml types of
    those that are more than a row.
    """

    architecture: str
    metadata: Mapping[str, Value]
    tensors: Mapping[str, int] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    matrix_kinds: frozenset[int] = frozenset()
    file_bytes: int = 0
    shards: int = 1

    @cached_property
    def tensor_bytes(self) -> int:
        return sum(self.tensors.values())

    def number(self, key: str, default: float = 0) -> float:
        """A metadata number; of an array (one value per layer) the largest."""
        value = self.metadata.get(key, default)
        if isinstance(value, tuple):
            value = max(value, default=default)
        return default if isinstance(value, str) or not math.isfinite(value) else value

    def of(self, key: str, default: float = 0) -> int:
        """A number of the model's own, such as `block_count`, whose key begins with the architecture."""
        return max(0, int(self.number(f"{self.architecture}.{key}", default)))

    def own(self, key: str) -> Value | None:
        """The model's own value as it is, an array too; None where the file has none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def of_layer(self, key: str, layer: int, default: int) -> int:
        """The same for one layer: of an array its place, of a scalar the one value for all."""
        value = self.own(key)
        if isinstance(value, tuple):
            value = value[layer] if layer < len(value) else default
        if value is None or isinstance(value, str) or not math.isfinite(value):
            return default
        return max(0, int(value))


def read_gguf(path: Path) -> Header:
    """The header of a file, or of a split model by its first shard (all shards must be there).

    Raises GgufError. What was read is remembered as long as size and time of change stay the same.
    """
    header = _read(path)
    split = _SHARD.fullmatch(path.name)
    if split is None:
        return _whole(path, header)
    if int(split[2]) != 1:
        raise GgufError(
            f"{path} is a later part of a split model; name its first part, -00001-of-{split[3]}."
        )
    count = int(split[3])
    if count > _MOST_SHARDS:
        raise GgufError(f"{path} claims to be split into {count} parts, which nothing is.")
    tensors, kinds, file_bytes = dict(header.tensors), header.matrix_kinds, header.file_bytes
    for part in range(2, count + 1):
        shard_path = path.with_name(f"{split[1]}-{part:05}-of-{split[3]}{path.suffix}")
        shard = _read(shard_path)
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            raise GgufError(f"{shard_path} has the tensor '{min(twice)}', which an earlier part has too.")
        tensors |= shard.tensors
        kinds |= shard.matrix_kinds
        file_bytes += shard.file_bytes
    return replace(header, tensors=tensors, matrix_kinds=kinds, file_bytes=file_bytes, shards=count)


def _whole(path: Path, header: Header) -> Header:
    count = int(header.number("split.count", 1))
    if count > 1:
        raise GgufError(
            f"{path} is one of {count} parts of a split model, whose names must end in "
            f"-00001-of-{count:05}.gguf and so on: give the parts their names again."
        )
    return header


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
    with path.open("rb", buffering=0) as file:
        reader = Reader(file, path, size)
        if size < 4 or reader.take(4) != b"GGUF":
            raise GgufError(f"{path} is not a GGUF file.")
        version = reader.number("I")
        if version not in (2, 3):
            odd = "big-endian" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise GgufError(f"{path} is a GGUF file of a kind that cannot be used: {odd}.")
        tensors, values = reader.count(24, _MOST_TENSORS), reader.count(13, _MOST_VALUES)
        metadata, lengths = _metadata(reader, values)
        infos = [reader.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise reader.broken("its alignment makes no sense")
        sizes = _sizes(reader, infos, -(-reader.offset // alignment) * alignment)
    kinds = frozenset(info.kind for info in infos if info.dimensions > 1)
    return Header(str(metadata.get("general.architecture", "")), metadata, sizes, lengths, kinds, size)


def _metadata(reader: Reader, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(count):
        key = reader.key()
        value, length = reader.value()
        if value is not None:
            metadata[key] = value
        if length:
            lengths[key] = length
    return metadata, lengths


def _sizes(reader: Reader, infos: Sequence[TensorInfo], start: int) -> dict[str, int]:
    """The bytes of each tensor; one of an unknown type reaches to its successor."""
    sizes: dict[str, int] = {}
    in_order = sorted(infos, key=lambda info: info.offset)
    room = max(0, reader.size - start)
    for place, info in enumerate(in_order):
        after = in_order[place + 1].offset if place + 1 < len(in_order) else room
        size = after - info.offset if info.bytes is None else info.bytes
        if place + 1 < len(in_order) and info.offset + size > after:
            raise reader.broken(f"the tensor '{info.name}' reaches into '{in_order[place + 1].name}'")
        if size < 0 or info.offset + size > room:
            raise reader.short(f"its tensors end at byte {start + info.offset + max(0, size):,}")
        if info.name in sizes:
            raise reader.broken(f"it has two tensors '{info.name}'")
        sizes[info.name] = size
    return sizes
