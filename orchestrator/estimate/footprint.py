"""A plain estimate of what a GGUF model needs, for as long as nobody has measured it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.core.entities import MIB, Demand
from orchestrator.estimate.gguf_header import Header

SOURCE = "estimated from file size and context"

# Bytes of one element in the KV cache: a block's scales are part of it.
CACHE_TYPES: Mapping[str, float] = {
    "f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip

CUDA_CONTEXT = 600 * MIB  # 594 to 599 MiB on an H200 whatever the model; small cards take less
CUDA_HOST = 256 * MIB  # CUDA's libraries and pinned buffers in RAM
PROCESS = 32 * MIB  # an interpreter and llama.cpp, beside the model
_UBATCH = 512

# Every n-th layer looks at the whole context, the others at a window, where the file does not say which.
_WINDOW_PERIOD: Mapping[str, int] = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "exaone4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How the model will be run; `n_gpu_layers` beyond the layers there are means all."""

    context_size: int
    n_gpu_layers: int = 999
    parallel: int = 4
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    prompt_cache_bytes: int = 0
    on_gpu: bool = True


def plain_estimate(header: Header, plan: Plan, projector: Header | None = None) -> Demand:
    """Bytes on the GPU and in RAM: weights, KV cache, a compute allowance, the CUDA context.

    It is no more than that. Weights count whole, though token embeddings mostly stay in RAM; layers are
    taken to be equal; the compute buffer has no closed form, so an allowance by the model's width stands
    in. Against four measured runs of a dense 8B and a 30B MoE it was 1 to 9 % high. Windowed and hybrid
    attention are counted where the header tells them apart, else as full attention, which is high.
    Without a GPU (`on_gpu` False) everything is in `host_bytes`.
    """
    layers = header.of("block_count")
    share = min(plan.n_gpu_layers, layers + 1) / (layers + 1)
    model = header.tensor_bytes + cache_bytes(header, plan)
    working = compute_bytes(header)
    if projector is not None:
        working += projector.tensor_bytes + compute_bytes(projector) + 128 * MIB
    ram = plan.prompt_cache_bytes + PROCESS
    if not plan.on_gpu:
        return Demand(gpu_bytes=0, host_bytes=model + working + ram, source=SOURCE)
    on_gpu = round(model * share)
    return Demand(
        gpu_bytes=on_gpu + working + CUDA_CONTEXT,
        host_bytes=model - on_gpu + ram + CUDA_HOST,
        source=SOURCE,
    )


def compute_bytes(header: Header) -> int:
    """An allowance for the buffers of one batch of 512 tokens."""
    width = header.of("embedding_length")
    feed = max(
        header.of("feed_forward_length"),
        header.of("expert_used_count") * header.of("expert_feed_forward_length"),
    )
    per_token = 4 * (12 * min(width, 1 << 20) + 4 * min(feed, 1 << 20))
    return _UBATCH * per_token + min(96 * MIB, 16 * MIB + header.tensor_bytes // 8)


def cache_bytes(header: Header, plan: Plan) -> int:
    """The KV cache that all slots share, and the state of recurrent layers, in every layer together."""
    per_element = CACHE_TYPES[plan.cache_type_k], CACHE_TYPES[plan.cache_type_v]
    cells, windowed = _pad(plan.context_size), _window_cells(header, plan)
    total = 0.0
    for layer in range(min(header.of("block_count"), 10_000)):
        heads = _of_layer(header, "attention.head_count_kv", layer, header.of("attention.head_count"))
        if heads == 0 or _is_recurrent(header, layer):
            total += _state_bytes(header) * plan.parallel
            continue
        key, value = _row(header, heads)
        width = key * per_element[0] + value * per_element[1]
        total += width * (windowed if _is_windowed(header, layer) else cells)
    return round(total)


def _row(header: Header, heads: int) -> tuple[int, int]:
    """Elements that one token adds to a layer's keys and values. Latent attention keeps one row for both."""
    latent = header.of("attention.kv_lora_rank")
    if latent:
        return latent + header.of("rope.dimension_count"), 0
    width = header.of("embedding_length") // max(1, header.of("attention.head_count"))
    key, value = header.of("attention.key_length", width), header.of("attention.value_length", width)
    return heads * key, heads * value


def _of_layer(header: Header, key: str, layer: int, default: int) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(value, tuple):
        return max(0, int(value[layer])) if layer < len(value) else default
    return header.of(key, default)


def _is_windowed(header: Header, layer: int) -> bool:
    if not header.of("attention.sliding_window"):
        return False
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return layer < len(pattern) and bool(pattern[layer])
    stated = pattern if isinstance(pattern, int) else 0
    period = int(stated) or _WINDOW_PERIOD.get(header.architecture, 0)
    return period > 1 and layer % period < period - 1


def _window_cells(header: Header, plan: Plan) -> int:
    window = header.of("attention.sliding_window") * plan.parallel + _UBATCH
    return _pad(min(plan.context_size, window))


def _is_recurrent(header: Header, layer: int) -> bool:
    interval = header.of("full_attention_interval")
    return interval > 1 and (layer + 1) % interval != 0


def _state_bytes(header: Header) -> int:
    """f32 state of one recurrent layer for one sequence (Mamba and its kin; nothing where not described)."""
    inner, state = header.of("ssm.inner_size"), header.of("ssm.state_size")
    window = max(0, header.of("ssm.conv_kernel") - 1)
    return 4 * (window * (inner + 2 * header.of("ssm.group_count") * state) + state * inner)


def _pad(cells: int) -> int:
    return -(-cells // 256) * 256
