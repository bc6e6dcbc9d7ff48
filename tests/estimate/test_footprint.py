"""The estimate against what NVML showed on a real card, and its parts against arithmetic."""

import pytest

from orchestrator.core.entities import MIB
from orchestrator.estimate.footprint import (
    CUDA_CONTEXT,
    Plan,
    cache_bytes,
    compute_bytes,
    plain_estimate,
)
from orchestrator.estimate.gguf_header import Header, Value

GIB = 1024 * MIB


def header(architecture: str, tensor_bytes: int, **values: Value) -> Header:
    metadata = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    return Header(architecture, metadata, tensor_bytes, tensor_bytes)


DENSE = header(
    "qwen3",
    round(4.7 * GIB),
    block_count=36,
    embedding_length=4096,
    feed_forward_length=12288,
    attention__head_count=32,
    attention__head_count_kv=8,
    attention__key_length=128,
    attention__value_length=128,
)
EXPERTS = header(
    "qwen3moe",
    round(17.3 * GIB),
    block_count=48,
    embedding_length=2048,
    feed_forward_length=6144,
    expert_used_count=8,
    expert_feed_forward_length=768,
    attention__head_count=32,
    attention__head_count_kv=4,
    attention__key_length=128,
    attention__value_length=128,
)


@pytest.mark.parametrize(
    ("model", "context", "cache", "measured_mib"),
    [
        (DENSE, 4096, "f16", 5752),
        (DENSE, 8192, "f16", 6332),
        (DENSE, 32768, "f16", 9812),
        (EXPERTS, 8192, "f16", 18990),
        (EXPERTS, 32768, "f16", 21318),
        (EXPERTS, 32768, "q8_0", 19918),
    ],
)
def test_covers_what_an_h200_showed_and_not_much_more(
    model: Header, context: int, cache: str, measured_mib: int
) -> None:
    demand = plain_estimate(model, Plan(context, parallel=1, cache_type_k=cache, cache_type_v=cache))
    # the card's use grew by another 12 (dense) to 110 MiB (experts) in the first prompt
    grown = measured_mib + (12 if model is DENSE else 110)
    assert grown <= demand.gpu_bytes / MIB <= 1.10 * measured_mib


def test_cache_by_type_context_and_heads() -> None:
    per_token = 36 * 8 * 128 * 2
    assert cache_bytes(DENSE, Plan(4096)) == 4096 * per_token * 2
    assert cache_bytes(DENSE, Plan(4000)) == 4096 * per_token * 2, "cells come in blocks of 256"
    assert cache_bytes(DENSE, Plan(4096, cache_type_k="q8_0", cache_type_v="q4_0")) == round(
        4096 * per_token / 2 * (34 / 32 + 18 / 32)
    )
    assert cache_bytes(DENSE, Plan(4096, parallel=8)) == cache_bytes(DENSE, Plan(4096)), "slots share it"


def test_layers_without_attention_and_with_a_window_cost_less() -> None:
    shape = {
        "block_count": 4,
        "embedding_length": 512,
        "attention__head_count": 4,
        "attention__key_length": 128,
        "attention__value_length": 128,
    }
    row = 128 * 2 * 2
    mixed = header("hybrid", 0, **shape, attention__head_count_kv=(2, 0, 0, 1))
    assert cache_bytes(mixed, Plan(1024)) == 3 * 1024 * row

    # two of gemma3's six layers are beyond the window's period; a window holds 4 slots and a batch
    gemma = header("gemma3", 0, **shape | {"block_count": 12}, attention__head_count_kv=1,
                   attention__sliding_window=512)  # fmt: skip
    assert cache_bytes(gemma, Plan(32768)) == (2 * 32768 + 10 * (4 * 512 + 512)) * row

    latent = header("deepseek2", 0, **shape, attention__head_count_kv=4, attention__kv_lora_rank=512,
                    rope__dimension_count=64)  # fmt: skip
    assert cache_bytes(latent, Plan(1024)) == 4 * 1024 * (512 + 64) * 2


def test_layers_that_stay_behind_are_in_ram() -> None:
    everything = plain_estimate(DENSE, Plan(4096, n_gpu_layers=37))
    half = plain_estimate(DENSE, Plan(4096, n_gpu_layers=18))
    none = plain_estimate(DENSE, Plan(4096, n_gpu_layers=0))

    assert plain_estimate(DENSE, Plan(4096)) == everything, "more layers than there are means all"
    moved = everything.gpu_bytes - half.gpu_bytes
    assert moved == half.host_bytes - everything.host_bytes
    assert 0.45 < moved / (DENSE.tensor_bytes + cache_bytes(DENSE, Plan(4096))) < 0.55
    assert none.gpu_bytes == compute_bytes(DENSE) + CUDA_CONTEXT


def test_without_a_gpu_all_is_ram_and_there_is_no_cuda() -> None:
    demand = plain_estimate(DENSE, Plan(4096, on_gpu=False))
    assert demand.gpu_bytes == 0
    with_gpu = plain_estimate(DENSE, Plan(4096))
    assert demand.host_bytes < with_gpu.gpu_bytes + with_gpu.host_bytes - CUDA_CONTEXT


def test_projector_and_prompt_cache_are_counted() -> None:
    projector = header("clip", 800 * MIB)
    plain, seeing = plain_estimate(DENSE, Plan(4096)), plain_estimate(DENSE, Plan(4096), projector)
    assert seeing.gpu_bytes - plain.gpu_bytes > 800 * MIB
    cached = plain_estimate(DENSE, Plan(4096, prompt_cache_bytes=512 * MIB))
    assert cached.host_bytes - plain.host_bytes == 512 * MIB


@pytest.mark.parametrize("odd", [-1, 0, 2**63, float("inf"), float("nan"), "many", (), (-5, 2**62)])
def test_senseless_metadata_gives_a_number_all_the_same(odd: Value) -> None:
    for key in ("block_count", "embedding_length", "attention__head_count_kv", "attention__head_count"):
        values: dict[str, Value] = {"block_count": 2, "attention__head_count": 2, key: odd}
        demand = plain_estimate(header("odd", 100, **values), Plan(256))
        assert demand.gpu_bytes > 0
        assert demand.host_bytes > 0
