"""The cache from first principles: cells, times heads, times width, times bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.estimate.gguf_header import Header, Value
from orchestrator.estimate.kv_cache import placed_cache
from orchestrator.estimate.layers import layers_of
from orchestrator.estimate.offload import offload_of
from orchestrator.estimate.plan import Plan
from tests.estimate.headers import header, header_of
from tests.estimate.shapes import qwen3_next_80b

SHAPE: dict[str, Value] = {
    "block_count": 4,
    "embedding_length": 512,
    "attention__head_count": 4,
    "attention__head_count_kv": 2,
    "attention__key_length": 128,
    "attention__value_length": 64,
}
KEYS, VALUES = 2 * 128, 2 * 64


def model(architecture: str = "llama", **more: Value) -> Header:
    return header(architecture, **SHAPE | more)


def cache(found: Header, plan: Plan) -> int:
    return sum(placed_cache(layers_of(found), plan, offload_of(found, plan)).values())


@pytest.mark.parametrize(
    ("kind", "bytes_per_32"),
    [("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34), ("q5_1", 24), ("q5_0", 22), ("q4_1", 20),
     ("q4_0", 18), ("iq4_nl", 18)],
)  # fmt: skip
def test_true_block_sizes(kind: str, bytes_per_32: int) -> None:
    both = cache(model(), Plan(4096, cache_type_k=kind, cache_type_v=kind))
    assert both == 4 * 4096 * (KEYS + VALUES) * bytes_per_32 // 32
    only_keys = cache(model(), Plan(4096, cache_type_k=kind))
    assert only_keys == 4 * 4096 * (KEYS * bytes_per_32 // 32 + VALUES * 2)


@pytest.mark.parametrize(("asked", "given"), [(1, 256), (256, 256), (257, 512), (4000, 4096), (4096, 4096)])
def test_a_context_comes_in_steps_of_256(asked: int, given: int) -> None:
    assert cache(model(), Plan(asked)) == 4 * given * (KEYS + VALUES) * 2


def test_slots_share_one_cache_or_have_a_part_each() -> None:
    assert cache(model(), Plan(4096, parallel=8)) == cache(model(), Plan(4096, parallel=1))
    # 4000 tokens for three slots: each has 1333, which is 1536 cells
    split = Plan(4000, parallel=3, unified=False)
    assert cache(model(), split) == 3 * 1536 * 4 * (KEYS + VALUES) * 2


def test_each_layer_has_its_own_heads() -> None:
    mixed = model(attention__head_count_kv=(2, 0, 1, 4))
    assert cache(mixed, Plan(1024)) == 1024 * (2 + 0 + 1 + 4) * (128 + 64) * 2
    assert cache(model(attention__head_count_kv=0), Plan(1024)) == 0


def test_latent_attention_keeps_one_row_for_keys_and_values() -> None:
    latent = model(
        "deepseek2",
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=192,
        attention__value_length_mla=128,
    )
    assert cache(latent, Plan(1024)) == 4 * 1024 * 576 * 2


@pytest.mark.parametrize(
    ("architecture", "layers", "whole"),
    [
        ("gemma2", 4, 2),
        ("gemma3", 12, 2),
        ("gpt-oss", 4, 2),
        ("cohere2", 8, 2),
        ("llama", 4, 4),
        ("phi3", 4, 4),
    ],
)
def test_windowed_layers_keep_a_window_for_every_slot_and_a_batch(
    architecture: str, layers: int, whole: int
) -> None:
    found = model(architecture, block_count=layers, attention__sliding_window=512)
    row = (KEYS + VALUES) * 2
    windowed = layers - whole
    assert cache(found, Plan(32768, parallel=4)) == (whole * 32768 + windowed * (4 * 512 + 512)) * row
    assert cache(found, Plan(1024, parallel=4)) == layers * 1024 * row, "a short context is kept whole"
    split = Plan(32768, parallel=4, unified=False)
    assert cache(found, split) == 4 * (whole * 8192 + windowed * (512 + 512)) * row


def test_which_layers_are_windowed_can_be_said_in_the_file() -> None:
    row = (KEYS + VALUES) * 2
    listed = model(
        "new", attention__sliding_window=512, attention__sliding_window_pattern=(True, False, True, False)
    )
    assert cache(listed, Plan(8192, parallel=1)) == (2 * 8192 + 2 * 1024) * row
    every_second = model("new", attention__sliding_window=512, attention__sliding_window_pattern=2)
    assert cache(every_second, Plan(8192, parallel=1)) == (2 * 8192 + 2 * 1024) * row
    own_widths = model(
        "gemma4",
        attention__sliding_window=512,
        attention__sliding_window_pattern=(True, True, True, False),
        attention__key_length_swa=32,
        attention__value_length_swa=32,
    )
    assert cache(own_widths, Plan(8192, parallel=1)) == 3 * 1024 * 2 * 64 * 2 + 8192 * row


def test_the_last_layers_of_some_look_into_earlier_caches() -> None:
    shared = model("gemma4", attention__shared_kv_layers=1)
    assert cache(shared, Plan(1024)) == 3 * 1024 * (KEYS + VALUES) * 2
    assert cache(model("gemma3n", block_count=30), Plan(1024)) == 20 * 1024 * (KEYS + VALUES) * 2


MAMBA: dict[str, Value] = {
    "ssm__inner_size": 1024, "ssm__state_size": 16, "ssm__conv_kernel": 4, "ssm__group_count": 2,
}  # fmt: skip
MAMBA_STATE = 4 * (3 * (1024 + 2 * 2 * 16) + 16 * 1024)


def test_recurrent_layers_have_a_state_for_each_slot_whatever_the_context() -> None:
    pure = model("mamba2", **MAMBA)
    assert cache(pure, Plan(1024, parallel=1)) == cache(pure, Plan(10**6, parallel=1)) == 4 * MAMBA_STATE
    assert cache(pure, Plan(1024, parallel=3)) == 3 * 4 * MAMBA_STATE
    rwkv = model("rwkv7", wkv__head_size=64, token_shift_count=2)
    assert cache(rwkv, Plan(1024, parallel=1)) == 4 * 4 * (2 * 512 + 512 * 64)


def test_hybrids_have_a_state_in_some_layers_and_a_cache_in_the_others() -> None:
    attention = 1024 * (KEYS + VALUES) * 2
    jamba = model("jamba", attention__head_count_kv=(0, 2, 0, 0), **MAMBA)
    assert cache(jamba, Plan(1024, parallel=1)) == attention + 3 * MAMBA_STATE
    by_interval = model("qwen3next", full_attention_interval=4, **MAMBA)
    assert cache(by_interval, Plan(1024, parallel=1)) == attention + 3 * MAMBA_STATE
    both = model("falcon-h1", **MAMBA)
    assert cache(both, Plan(1024, parallel=1)) == 4 * (attention + MAMBA_STATE)
    lfm2 = model("lfm2", attention__head_count_kv=(0, 2, 0, 2), shortconv__l_cache=3)
    assert cache(lfm2, Plan(1024, parallel=1)) == 2 * attention + 2 * 4 * 512 * 2
    nemotron = model(
        "nemotron_h", attention__head_count_kv=(0, 2, 0, 0), feed_forward_length=(0, 0, 0, 999), **MAMBA
    )
    assert cache(nemotron, Plan(1024, parallel=1)) == attention + 2 * MAMBA_STATE


def test_a_real_hybrid_is_what_llama_cpp_says() -> None:
    """Its log for the first 8 layers of Qwen3-Next, 32768 tokens, 4 slots: KV 128 MiB, RS 50.25 MiB."""
    assert cache(header_of(qwen3_next_80b()), Plan(32768, parallel=4)) == 178.25 * 2**20


def test_encoders_remember_nothing() -> None:
    assert cache(model("bert"), Plan(4096)) == 0


@settings(deadline=None)
@given(
    context=st.integers(1, 10**6),
    more=st.integers(0, 10**5),
    parallel=st.integers(1, 64),
    unified=st.booleans(),
    architecture=st.sampled_from(["llama", "gemma3", "qwen3next", "mamba"]),
)
def test_more_context_or_slots_never_cost_less(
    context: int, more: int, parallel: int, unified: bool, architecture: str
) -> None:
    found = model(architecture, attention__sliding_window=1024, **MAMBA)
    small = cache(found, Plan(context, parallel=parallel, unified=unified))
    assert small <= cache(found, Plan(context + more, parallel=parallel, unified=unified))
    assert small <= cache(found, Plan(context, parallel=2 * parallel, unified=True)) or not unified
