"""Where a model's tensors lie: bytes by device, from their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.layers import run_layers
from orchestrator.estimate.offload import HOST, Offload
from orchestrator.estimate.plan import Plan

_BLOCK = re.compile(r"blk\.(\d+)\.(.*)")
_EXPERTS = re.compile(r"ffn_(up|down|gate|gate_up)_(ch|)exps\b")
_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
"""Looked up by row, which pays nowhere but in RAM."""


def placed_weights(header: Header, plan: Plan, offload: Offload) -> Mapping[str, int]:
    """Bytes of weights by device."""
    total: Counter[str] = Counter()
    for device, size in _placed(header, plan, offload):
        total[device] += size
    return total


def largest_on_host(header: Header, plan: Plan, offload: Offload) -> int:
    """The largest tensor of a layer that stays in RAM; the GPU borrows one at a time for large batches."""
    sizes = (
        size
        for name, size in header.tensors.items()
        if _BLOCK.fullmatch(name) and _device(header, plan, offload, name) == HOST
    )
    return max(sizes, default=0)


def _placed(header: Header, plan: Plan, offload: Offload) -> Iterator[tuple[str, int]]:
    for name, size in header.tensors.items():
        device = _device(header, plan, offload, name)
        if device is not None:
            yield device, size
    if is_tied(header) and offload.output != HOST:
        yield offload.output, header.tensors["token_embd.weight"]


def is_tied(header: Header) -> bool:
    """The embeddings serve as output too, and are on both devices then."""
    return "token_embd.weight" in header.tensors and "output.weight" not in header.tensors


def _device(header: Header, plan: Plan, offload: Offload, name: str) -> str | None:
    """None for what is not loaded: layers that predict further tokens."""
    block = _BLOCK.fullmatch(name)
    if block is None:
        return HOST if name.startswith(_INPUT) else offload.output
    number = int(block[1])
    if number >= max(1, run_layers(header)) and header.of("nextn_predict_layers"):
        return None
    if number < plan.n_cpu_moe and _EXPERTS.match(block[2]):
        return HOST
    return offload.of(number)
