"""GGUF files of real architectures and sizes, without weights: real headers over a sparse file.

What is not written reads as zeros, so a file of 17 GiB takes a few MiB of disk and no time to make. Norms
are ones, and embeddings and routers are noise, so that tokens reach different experts; all else is zero.
llama.cpp loads and runs them as it does real ones, and allocates the same bytes. The answers are nonsense.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from orchestrator.estimate.ggml_types import BLOCKS
from tests.estimate.ggufs import Tensor, gguf_bytes

F32, F16, Q8_0, Q4_K, Q6_K, MXFP4 = 0, 1, 8, 12, 14, 39
_NOISE_BYTES = 1 << 20


@dataclass(frozen=True)
class Shape:
    """`metadata` are the architecture's own keys; `tensors` are (name, dimensions, type)."""

    name: str
    architecture: str
    metadata: Mapping[str, object]
    tensors: tuple[tuple[str, tuple[int, ...], int], ...]
    vocabulary: int

    def write(self, folder: Path) -> Path:
        """The file, made once: `folder/name.gguf`."""
        path = folder / f"{self.name}.gguf"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            self._write(unfinished)
            unfinished.rename(path)
        return path

    def sized(self) -> list[Tensor]:
        return [Tensor(name, shape, kind, size_of(shape, kind)) for name, shape, kind in self.tensors]

    def head(self, more: Mapping[str, object] | None = None) -> bytes:
        """All that stands before the weights; `more` is metadata over its own."""
        own = {f"{self.architecture}.{key}": value for key, value in self.metadata.items()}
        metadata = {"general.architecture": self.architecture, "general.name": self.name, **own}
        return gguf_bytes(metadata | tokenizer(self.vocabulary) | dict(more or {}), self.sized(), data=False)

    def _write(self, path: Path) -> None:
        head, tensors = self.head(), self.sized()
        with path.open("wb") as file:
            file.write(head)
            offset = len(head)
            for tensor in tensors:
                file.seek(offset)
                file.writelines(_data(tensor))
                offset += -(-tensor.size // 32) * 32
            file.truncate(offset)


def size_of(shape: tuple[int, ...], kind: int) -> int:
    per_block, size = BLOCKS[kind]
    return math.prod(shape) // per_block * size


def _data(tensor: Tensor) -> Iterator[bytes]:
    """What is written of a tensor, from its beginning."""
    if "norm" in tensor.name and tensor.kind == F32:
        yield b"\0\0\x80\x3f" * (tensor.size // 4)
    elif "gate_inp" in tensor.name or tensor.name == "token_embd.weight":
        noise = _noise(tensor.kind)
        for begin in range(0, tensor.size, len(noise)):
            yield noise[: tensor.size - begin]


@lru_cache
def _noise(kind: int) -> bytes:
    """About a MiB of random blocks whose scales are small and finite."""
    _, size = BLOCKS[kind]
    count = _NOISE_BYTES // size
    noise = bytearray(random.Random(kind).randbytes(count * size))
    if kind == F32:
        noise[3::8], noise[7::8] = (
            b"\x3c" * (count // 2),
            b"\xbc" * (count // 2),
        )  # 0.008 to 0.03, either sign
    scales = {Q8_0: (0, b"\x00\x14"), Q4_K: (0, b"\x8e\x0e\xea\x0c"), Q6_K: (208, b"\x50\x01")}
    if kind == F16:
        noise[1::2] = b"\x28" * count
    elif kind in scales:
        place, scale = scales[kind]
        for index, byte in enumerate(scale):
            noise[place + index :: size] = bytes([byte]) * count
    return bytes(noise)


def tokenizer(size: int) -> dict[str, object]:
    """A byte-level vocabulary of so many tokens, with one merge."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    alphabet = [chr(b) if b in kept else chr(next(spare)) for b in range(256)]
    tokens = [*alphabet, "th", "<|endoftext|>"]
    tokens += [f"token-{number}" for number in range(len(tokens), size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3] + [1] * (size - 258),
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
    }


# --- the shapes


@dataclass(frozen=True)
class Width:
    """The numbers most architectures have in common."""

    layers: int
    embedding: int
    feed: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    context: int
    kind: int = Q4_K
    tied: bool = False
    more: Mapping[str, object] = field(default_factory=dict)

    def metadata(self) -> dict[str, object]:
        return {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.embedding,
            "feed_forward_length": self.feed,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head,
            "attention.value_length": self.head,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "rope.freq_base": 1e6,
            "vocab_size": self.vocabulary,
            **self.more,
        }

    @property
    def rough(self) -> int:
        """The better type that Q4_K_M gives to some tensors."""
        return Q6_K if self.kind == Q4_K else self.kind


Rows = list[tuple[str, tuple[int, ...], int]]


def _ends(w: Width) -> Rows:
    rows: Rows = [
        ("token_embd.weight", (w.embedding, w.vocabulary), w.rough if w.tied else w.kind),
        ("output_norm.weight", (w.embedding,), F32),
    ]
    return rows if w.tied else [*rows, ("output.weight", (w.embedding, w.vocabulary), w.rough)]


def _attention(w: Width, block: str, qk_norm: bool = False) -> Rows:
    rows: Rows = [
        (block + "attn_norm.weight", (w.embedding,), F32),
        (block + "attn_q.weight", (w.embedding, w.heads * w.head), w.kind),
        (block + "attn_k.weight", (w.embedding, w.kv_heads * w.head), w.kind),
        (block + "attn_v.weight", (w.embedding, w.kv_heads * w.head), w.rough),
        (block + "attn_output.weight", (w.heads * w.head, w.embedding), w.kind),
    ]
    if qk_norm:
        rows += [(block + f"attn_{part}_norm.weight", (w.head,), F32) for part in ("q", "k")]
    return rows


def _feed(w: Width, block: str, layer: int) -> Rows:
    return [
        (block + "ffn_norm.weight", (w.embedding,), F32),
        (block + "ffn_gate.weight", (w.embedding, w.feed), w.kind),
        (block + "ffn_up.weight", (w.embedding, w.feed), w.kind),
        (block + "ffn_down.weight", (w.feed, w.embedding), w.rough if layer % 2 else w.kind),
    ]


def _experts(w: Width, block: str, layer: int, kind: int | None = None) -> Rows:
    count, feed = int(str(w.more["expert_count"])), int(str(w.more["expert_feed_forward_length"]))
    down = kind or (w.rough if layer % 2 else w.kind)
    return [
        (block + "ffn_gate_inp.weight", (w.embedding, count), F32),
        (block + "ffn_gate_exps.weight", (w.embedding, feed, count), kind or w.kind),
        (block + "ffn_up_exps.weight", (w.embedding, feed, count), kind or w.kind),
        (block + "ffn_down_exps.weight", (feed, w.embedding, count), down),
    ]


def _shape(name: str, architecture: str, w: Width, layer: Callable[[str, int], Rows]) -> Shape:
    rows = _ends(w)
    for number in range(w.layers):
        rows += layer(f"blk.{number}.", number)
    return Shape(name, architecture, w.metadata(), tuple(rows), w.vocabulary)


def named(name: str, layers: int, all_layers: int) -> str:
    return name if layers == all_layers else f"{name}-{layers}-layers"


def qwen3_8b(layers: int = 36, vocabulary: int = 151936) -> Shape:
    """Dense, grouped queries: 4.7 GiB with all its layers."""
    w = Width(layers, 4096, 12288, 32, 8, 128, vocabulary, 40960)
    name = named("qwen3-8b", layers, 36)
    return _shape(name, "qwen3", w, lambda b, i: _attention(w, b, qk_norm=True) + _feed(w, b, i))


def qwen3_30b_a3b(layers: int = 48, vocabulary: int = 151936) -> Shape:
    """128 experts, 8 of them used: 17.3 GiB with all its layers."""
    more = {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768}
    w = Width(layers, 2048, 6144, 32, 4, 128, vocabulary, 262144, more=more)

    def layer(block: str, number: int) -> Rows:
        norm: Rows = [(block + "ffn_norm.weight", (w.embedding,), F32)]
        return _attention(w, block, qk_norm=True) + norm + _experts(w, block, number)

    return _shape(named("qwen3-30b-a3b", layers, 48), "qwen3moe", w, layer)


def llama_70b(layers: int = 4) -> Shape:
    """Wide and dense."""
    w = Width(layers, 8192, 28672, 64, 8, 128, 128256, 131072)
    return _shape(named("llama-70b", layers, 80), "llama", w, lambda b, i: _attention(w, b) + _feed(w, b, i))


def gemma3_12b(layers: int = 12, vocabulary: int = 262208) -> Shape:
    """Five of six layers see a window of 1024 tokens; embeddings are tied; a vocabulary of 262,208."""
    more = {"attention.sliding_window": 1024}
    w = Width(layers, 3840, 15360, 16, 8, 256, vocabulary, 131072, tied=True, more=more)

    def layer(block: str, number: int) -> Rows:
        after: Rows = [
            (block + f"post_{part}_norm.weight", (w.embedding,), F32) for part in ("attention", "ffw")
        ]
        return _attention(w, block, qk_norm=True) + _feed(w, block, number) + after

    return _shape(named("gemma3-12b", layers, 48), "gemma3", w, layer)


def gpt_oss_20b(layers: int = 6, vocabulary: int = 201088) -> Shape:
    """Experts in MXFP4 as wide as the embeddings, every second layer with a window of 128 tokens."""
    more = {
        "attention.sliding_window": 128, "expert_count": 32, "expert_used_count": 4,
        "expert_feed_forward_length": 2880,
    }  # fmt: skip
    w = Width(layers, 2880, 2880, 64, 8, 64, vocabulary, 131072, kind=Q8_0, more=more)

    def layer(block: str, number: int) -> Rows:
        biases = {
            "attn_q": (w.heads * w.head,), "attn_k": (w.kv_heads * w.head,), "attn_v": (w.kv_heads * w.head,),
            "attn_output": (w.embedding,), "ffn_gate_inp": (32,), "ffn_gate_exps": (2880, 32),
            "ffn_up_exps": (2880, 32), "ffn_down_exps": (w.embedding, 32),
        }  # fmt: skip
        rows = _attention(w, block) + _experts(w, block, number, MXFP4)
        rows += [(block + f"{name}.bias", shape, F32) for name, shape in biases.items()]
        rows += [(block + "attn_sinks.weight", (w.heads,), F32)]
        return [*rows, (block + "post_attention_norm.weight", (w.embedding,), F32)]

    return _shape(named("gpt-oss-20b", layers, 24), "gpt-oss", w, layer)


def qwen3_next_80b(layers: int = 8, vocabulary: int = 151936) -> Shape:
    """Three of four layers are recurrent; 512 experts, 10 of them used, and a shared one."""
    more = {
        "expert_count": 512, "expert_used_count": 10, "expert_feed_forward_length": 512,
        "expert_shared_feed_forward_length": 512, "rope.dimension_count": 64, "ssm.conv_kernel": 4,
        "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": 32, "ssm.inner_size": 4096,
    }  # fmt: skip
    w = Width(layers, 2048, 5120, 16, 2, 256, vocabulary, 262144, more=more)

    def layer(block: str, number: int) -> Rows:
        rows = _gated_attention(w, block) if number % 4 == 3 else _delta_net(w, block)
        rows += [(block + "post_attention_norm.weight", (w.embedding,), F32), *_experts(w, block, 0)]
        rows += [(block + "ffn_gate_inp_shexp.weight", (w.embedding,), F32)]
        rows += [(block + f"ffn_{part}_shexp.weight", (w.embedding, 512), w.kind) for part in ("gate", "up")]
        return [*rows, (block + "ffn_down_shexp.weight", (512, w.embedding), w.kind)]

    return _shape(named("qwen3-next-80b", layers, 48), "qwen3next", w, layer)


def _gated_attention(w: Width, block: str) -> Rows:
    """Queries with a gate as wide."""
    gated = (block + "attn_q.weight", (w.embedding, 2 * w.heads * w.head), w.kind)
    return [gated if row[0] == gated[0] else row for row in _attention(w, block, qk_norm=True)]


def _delta_net(w: Width, block: str) -> Rows:
    inner, keys = 4096, 2 * 16 * 128
    return [
        (block + "attn_norm.weight", (w.embedding,), F32),
        (block + "attn_qkv.weight", (w.embedding, keys + inner), w.kind),
        (block + "attn_gate.weight", (w.embedding, inner), w.kind),
        (block + "ssm_conv1d.weight", (4, keys + inner), F32),
        (block + "ssm_dt.bias", (32,), F32),
        (block + "ssm_a", (32,), F32),
        (block + "ssm_ba.weight", (w.embedding, 64), w.kind),
        (block + "ssm_norm.weight", (128,), F32),
        (block + "ssm_out.weight", (inner, w.embedding), w.kind),
    ]


SHAPES: Mapping[str, Callable[[], Shape]] = {
    "qwen3-8b": qwen3_8b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "llama-70b-4-layers": llama_70b,
    "gemma3-12b-12-layers": gemma3_12b,
    "gpt-oss-20b-6-layers": gpt_oss_20b,
    "qwen3-next-80b-8-layers": qwen3_next_80b,
}
