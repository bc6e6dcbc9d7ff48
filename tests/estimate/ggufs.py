"""Writes small GGUF files byte by byte, so that tests can be wrong in one place at a time."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

U32, I32, F32, BOOL, STRING, ARRAY, U64, I64 = 4, 5, 6, 7, 8, 9, 10, 11


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: object) -> bytes:
    match item:
        case bool():
            return struct.pack("<I?", BOOL, item)
        case int() if item < 0:
            return struct.pack("<Iq", I64, item)
        case int():
            return struct.pack("<II" if item < 1 << 32 else "<IQ", U32 if item < 1 << 32 else U64, item)
        case float():
            return struct.pack("<If", F32, item)
        case str():
            return struct.pack("<I", STRING) + text(item)
        case list() if item and isinstance(item[0], str):
            return struct.pack("<IIQ", ARRAY, STRING, len(item)) + b"".join(map(text, item))
        case list() if item and isinstance(item[0], bool):
            return struct.pack(f"<IIQ{len(item)}?", ARRAY, BOOL, len(item), *item)
        case list():
            return struct.pack(f"<IIQ{len(item)}i", ARRAY, I32, len(item), *item)
    raise TypeError(item)


@dataclass(frozen=True)
class Tensor:
    """`size` is what its data takes in the file, which a test may set against the type's own size."""

    name: str
    shape: tuple[int, ...]
    kind: int
    size: int


def gguf_bytes(
    metadata: Mapping[str, object], tensors: Sequence[Tensor] = (), version: int = 3, data: bool = True
) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, item in metadata.items():
        out += text(key) + value(item)
    offset = 0
    for tensor in tensors:
        out += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        out += struct.pack("<IQ", tensor.kind, offset)
        offset += -(-tensor.size // 32) * 32
    out += b"\0" * (-len(out) % 32)
    return out + b"\1" * (offset if data else 0)


def llama(path: Path, *, layers: int = 2, embedding: int = 64, prefix: str = "") -> Path:
    """A small sound file with one tensor of each of two kinds: 4096 + 1152 bytes of weights."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": layers,
        "llama.embedding_length": embedding,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    }
    tensors = [Tensor(f"{prefix}a", (64, 16), 0, 4096), Tensor(f"{prefix}b", (64, 32), 2, 1152)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path
