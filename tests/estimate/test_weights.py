"""Which tensors lie where, from their names and the number of layers on the GPU."""

import pytest

from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.offload import HOST, offload_of
from orchestrator.estimate.plan import Plan
from orchestrator.estimate.weights import largest_on_host, placed_weights
from tests.estimate.headers import header

LAYER, INPUT, OUTPUT, NORM = 1_000, 70, 500, 3


def model(layers: int = 4, *, tied: bool = False, **more: int) -> Header:
    tensors = {f"blk.{i}.attn_q.weight": LAYER for i in range(layers)}
    tensors |= {"token_embd.weight": INPUT, "output_norm.weight": NORM}
    if not tied:
        tensors["output.weight"] = OUTPUT
    return header("llama", tensors, block_count=layers, **more)


def placed(found: Header, plan: Plan) -> dict[str, int]:
    return dict(placed_weights(found, plan, offload_of(found, plan)))


@pytest.mark.parametrize(
    ("n_gpu_layers", "on_gpu", "in_ram"),
    [
        (0, 0, 4 * LAYER + INPUT + OUTPUT + NORM),
        (1, OUTPUT + NORM, 4 * LAYER + INPUT),  # the output is the first to go
        (2, OUTPUT + NORM + LAYER, 3 * LAYER + INPUT),
        (4, OUTPUT + NORM + 3 * LAYER, LAYER + INPUT),
        (5, OUTPUT + NORM + 4 * LAYER, INPUT),  # embeddings are looked up by row, in RAM
        (99, OUTPUT + NORM + 4 * LAYER, INPUT),
    ],
)
def test_layers_go_to_the_gpu_from_the_end(n_gpu_layers: int, on_gpu: int, in_ram: int) -> None:
    found = placed(model(), Plan(4096, n_gpu_layers))
    assert (found.get("gpu0", 0), found.get(HOST, 0)) == (on_gpu, in_ram)


def test_tied_embeddings_are_on_both_sides_as_soon_as_the_output_is_on_the_gpu() -> None:
    tied = model(tied=True)
    assert placed(tied, Plan(4096)) == {"gpu0": 4 * LAYER + NORM + INPUT, HOST: INPUT}
    assert placed(tied, Plan(4096, 0)) == {HOST: 4 * LAYER + NORM + INPUT}


def test_experts_of_the_first_layers_can_stay_in_ram() -> None:
    tensors = {f"blk.{i}.ffn_{part}_exps.weight": 100 for i in range(3) for part in ("gate", "up", "down")}
    tensors |= {f"blk.{i}.ffn_gate_inp.weight": 1 for i in range(3)}
    found = header("qwen3moe", tensors, block_count=3)
    plan = Plan(4096, n_cpu_moe=2)
    assert placed(found, plan) == {"gpu0": 303, HOST: 600}
    assert largest_on_host(found, plan, offload_of(found, plan)) == 100


def test_the_largest_that_is_lent_is_of_a_layer_not_the_embeddings() -> None:
    found = header(
        "llama", {"token_embd.weight": 10**9, "blk.0.ffn_up.weight": 7, "blk.1.x.weight": 9}, block_count=2
    )
    for layers, size in ((3, 0), (2, 7), (0, 9)):
        assert largest_on_host(found, Plan(4096, layers), offload_of(found, Plan(4096, layers))) == size


def test_layers_that_predict_further_tokens_are_not_loaded() -> None:
    found = model(layers=5, nextn_predict_layers=1)
    assert placed(found, Plan(4096)) == {"gpu0": 4 * LAYER + OUTPUT + NORM, HOST: INPUT}


def test_several_gpus_share_the_layers_by_ratio() -> None:
    """Of five parts (four layers and the output) llama.cpp gives three to the first of two equal cards."""
    found = placed(model(), Plan(4096, split=(1, 1)))
    assert found == {"gpu0": 3 * LAYER, "gpu1": LAYER + OUTPUT + NORM, HOST: INPUT}
    found = placed(model(layers=9), Plan(4096, split=(3, 1)))
    assert found == {"gpu0": 8 * LAYER, "gpu1": LAYER + OUTPUT + NORM, HOST: INPUT}
    assert placed(model(), Plan(4096, on_gpu=False)) == {HOST: 4 * LAYER + INPUT + OUTPUT + NORM}
