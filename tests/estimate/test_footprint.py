"""Properties of the whole prediction; test_measured_cards.py has it against real cards."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.entities import MIB
from orchestrator.estimate.context import BLAS, SCRATCH, UNKNOWN_CARD, context_bytes
from orchestrator.estimate.footprint import demand_of, predict
from orchestrator.estimate.ggml_types import CACHE_TYPES
from orchestrator.estimate.gguf_header import Header, Value
from orchestrator.estimate.plan import Plan
from tests.estimate import shapes
from tests.estimate.headers import header, header_of

DENSE, EXPERTS = header_of(shapes.qwen3_8b()), header_of(shapes.qwen3_30b_a3b())
ALL = [header_of(make()) for make in shapes.SHAPES.values()]


def test_parts_add_up_and_name_themselves() -> None:
    found = predict(DENSE, Plan(4096, 20, prompt_cache_bytes=512 * MIB, gpu="H200"))
    assert found.source == "predicted"
    assert set(found.breakdown) == {"gpu0", "host"}
    assert found.total == found.on("gpu0")
    assert found.low < found.total < found.high
    assert found.breakdown["host"]["prompt_cache"] == 512 * MIB
    demand = demand_of(found)
    assert (demand.gpu_bytes, demand.host_bytes) == (found.on("gpu0"), found.on("host"))
    assert demand.breakdown == found.breakdown


def test_without_a_gpu_all_is_in_ram_and_there_is_no_cuda() -> None:
    found = predict(DENSE, Plan(4096, on_gpu=False))
    assert set(found.breakdown) == {"host"}
    assert found.breakdown["host"]["weights"] == DENSE.tensor_bytes
    assert not {"cuda_context", "first_prompt"} & found.breakdown["host"].keys()
    assert demand_of(found).gpu_bytes == 0


def test_the_planner_gives_each_gpu_of_a_split_what_the_fullest_needs() -> None:
    found = predict(DENSE, Plan(32768, split=(1, 1)))
    sizes = [found.on("gpu0"), found.on("gpu1")]
    assert found.total == sum(sizes)
    assert sizes[0] != sizes[1]
    assert demand_of(found).gpu_bytes == 2 * max(sizes)


def test_a_projector_and_a_draft_model_are_on_the_first_gpu() -> None:
    plan = Plan(4096, gpu="H200")
    projector = header(
        "clip", {"v.patch_embd.weight": 800 * MIB}, vision__image_size=448, vision__patch_size=14
    )
    plain, seeing = predict(DENSE, plan), predict(DENSE, plan, projector)
    assert seeing.total - plain.total > 800 * MIB
    assert seeing.high - seeing.low > plain.high - plain.low, "pictures are known less well"
    draft = header_of(shapes.qwen3_8b(2))
    drafted, alone = predict(DENSE, plan, draft=draft), predict(draft, plan)
    parts = alone.breakdown["gpu0"]
    assert drafted.breakdown["gpu0"]["draft"] == parts["weights"] + parts["kv_cache"] + parts["compute"]


def test_what_goes_through_cublas_takes_its_workspace_too() -> None:
    def first_prompt(model: Header, **plan: str) -> int:
        return predict(model, replace(Plan(4096), **plan)).breakdown["gpu0"]["first_prompt"]  # type: ignore[arg-type]

    assert first_prompt(DENSE) == SCRATCH
    assert first_prompt(EXPERTS) == SCRATCH + BLAS, "a router is never quantised"
    assert first_prompt(DENSE, cache_type_k="q8_0") == SCRATCH, "flash attention needs no cuBLAS"


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA H200", 594),
        ("NVIDIA H100 80GB HBM3", 597),
        ("NVIDIA GeForce RTX 5090", 510),
        ("rtx 5090", 510),
        ("NVIDIA GeForce RTX 4060 Ti", 102),
        ("NVIDIA GeForce RTX 4060", 72),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 564),
        ("NVIDIA A100-SXM4-80GB", 324),
        ("NVIDIA L40S", 426),
        ("NVIDIA L4", 174),
        ("NVIDIA RTX A1000", UNKNOWN_CARD // MIB),
        ("Something new", UNKNOWN_CARD // MIB),
        (None, UNKNOWN_CARD // MIB),
    ],
)
def test_cudas_own_share_by_card(name: str | None, mib: int) -> None:
    assert context_bytes(name) == mib * MIB


def test_an_unknown_card_widens_the_bounds_downwards() -> None:
    known, unknown = predict(DENSE, Plan(4096, gpu="H200")), predict(DENSE, Plan(4096))
    assert unknown.total - unknown.low > known.total - known.low + 400 * MIB
    assert known.high <= unknown.high


@settings(max_examples=100, deadline=None)
@given(
    model=st.sampled_from(ALL),
    context=st.integers(256, 200_000),
    more=st.integers(0, 100_000),
    layers=st.integers(0, 60),
    parallel=st.integers(1, 16),
    cache=st.sampled_from(list(CACHE_TYPES)),
)
def test_more_of_anything_never_costs_less(
    model: Header, context: int, more: int, layers: int, parallel: int, cache: str
) -> None:
    plan = Plan(context, layers, parallel, cache, cache)
    found = predict(model, plan)
    longer = predict(model, replace(plan, context_size=context + more))
    assert found.total <= longer.total
    assert found.on("host") <= longer.on("host")
    assert found.total <= predict(model, replace(plan, parallel=parallel + 1)).total
    weights = [
        predict(model, replace(plan, n_gpu_layers=count)).breakdown["gpu0"]["weights"]
        for count in (layers, layers + 1)
    ]
    assert weights[0] <= weights[1]


@settings(max_examples=50, deadline=None)
@given(model=st.sampled_from(ALL), layers=st.integers(0, 60), n_cpu_moe=st.integers(0, 60))
def test_no_weight_is_lost_between_the_devices(model: Header, layers: int, n_cpu_moe: int) -> None:
    found = predict(model, Plan(4096, layers, n_cpu_moe=n_cpu_moe))
    placed = sum(parts["weights"] for parts in found.breakdown.values())
    twice = model.tensors["token_embd.weight"] if "output.weight" not in model.tensors and layers else 0
    assert placed == model.tensor_bytes + twice


@pytest.mark.parametrize("odd", [-1, 0, 2**63, float("inf"), float("nan"), "many", (), (-5, 2**62)])
def test_senseless_metadata_gives_a_number_all_the_same(odd: Value) -> None:
    for key in (
        "block_count", "embedding_length", "attention__head_count_kv", "attention__head_count",
        "attention__sliding_window", "attention__sliding_window_pattern", "expert_used_count",
        "nextn_predict_layers", "ssm__inner_size", "full_attention_interval",
    ):  # fmt: skip
        values: dict[str, Value] = {"block_count": 2, "attention__head_count": 2, key: odd}
        for architecture in ("odd", "gemma3", "qwen3next", "jamba", "mamba"):
            found = predict(header(architecture, {"blk.0.x": 100}, **values), Plan(256))
            assert found.total > 0
            assert found.low <= found.total <= found.high
