"""`auto` in an entry: the ways to run it, each with what it needs and how it is started."""

from pathlib import Path

import pytest

from orchestrator.catalogue.alternatives import alternatives_of
from orchestrator.core.entities import MIB, Model
from tests.catalogue.conftest import LLAMA, House
from tests.estimate.ggufs import Tensor, gguf_bytes

AUTO = (
    'CONTEXT_SIZE: "{context_size}", N_GPU_LAYERS: "{n_gpu_layers}", CACHE_TYPE_K: "{cache_type_k}", '
    'CACHE_TYPE_V: "{cache_type_v}"'
)
LAYERS = 40


def trained_for(path: Path, context: int | None) -> None:
    """A file of 40 layers, each with a weight of 1 MiB."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    }
    if context is not None:
        metadata["llama.context_length"] = context
    weights = [Tensor(f"blk.{i}.ffn_up.weight", (1024, 256), 0, MIB) for i in range(LAYERS)]
    path.write_bytes(gguf_bytes(metadata, weights))


def model_of(house: House, entry: str, context: int | None = 40960, **explicit: object) -> Model:
    trained_for(house.folder / "m.gguf", context)
    house.write("services/llama-cpp/service.yaml", LLAMA.replace("MODEL_PATH:", f"{AUTO}, MODEL_PATH:"))
    text = f"models: {{m: {{service: llama-cpp, path: m.gguf, {entry}}}}}"
    return house.read(text, **explicit).resolve("m")


@pytest.mark.parametrize(
    ("trained", "contexts"),
    [
        (40960, [40960, 32768, 16384, 8192, 4096]),
        (1 << 20, [262144, 131072, 65536, 32768, 16384, 8192, 4096]),
        (None, [262144, 131072, 65536, 32768, 16384, 8192, 4096]),
        (4096, [4096]),
        (512, [512]),
    ],
)
def test_contexts_up_to_what_it_was_trained_for(
    house: House, trained: int | None, contexts: list[int]
) -> None:
    model = model_of(house, "context_size: auto", trained)
    assert [v.parameters for v in model.variants] == [{"context_size": size} for size in contexts]
    needs = [v.demand.gpu_bytes for v in model.variants]
    assert needs == sorted(needs, reverse=True)
    for variant, size in zip(model.variants, contexts, strict=True):
        assert variant.launch.environment["CONTEXT_SIZE"] == str(size)
        assert variant.launch.container_environment["CONTEXT_SIZE"] == str(size)
        assert variant.launch.environment["N_GPU_LAYERS"] == "999"
    assert (model.demand, model.launch) == (model.variants[-1].demand, model.variants[-1].launch)


def test_layers_from_all_down_to_none(house: House) -> None:
    model = model_of(house, "n_gpu_layers: auto, context_size: 8192")
    counts = [v.parameters["n_gpu_layers"] for v in model.variants]
    assert (counts[0], counts[-1]) == (LAYERS + 1, 0)
    assert counts == sorted(set(counts), reverse=True)
    assert len(counts) < 25
    assert {v.launch.environment["CONTEXT_SIZE"] for v in model.variants} == {"8192"}
    assert model.variants[0].demand.gpu_bytes > model.variants[-1].demand.gpu_bytes
    assert model.variants[0].demand.host_bytes < model.variants[-1].demand.host_bytes


def test_layers_are_left_out_at_the_shortest_context_only(house: House) -> None:
    model = model_of(house, "n_gpu_layers: auto, context_size: auto", 16384)
    ways = [(v.parameters["context_size"], v.parameters["n_gpu_layers"]) for v in model.variants]
    assert ways[:3] == [(16384, LAYERS + 1), (8192, LAYERS + 1), (4096, LAYERS + 1)]
    assert all(context == 4096 and layers <= LAYERS for context, layers in ways[3:])
    assert ways[-1] == (4096, 0)


def test_in_ram_there_are_no_layers_to_choose(house: House) -> None:
    model = model_of(house, "n_gpu_layers: auto", devices="host")
    assert model.variants == ()
    assert model.launch.environment["N_GPU_LAYERS"] == "999"
    both = model_of(house, "n_gpu_layers: auto, context_size: auto", 8192, devices="host")
    assert [v.parameters for v in both.variants] == [{"context_size": 8192}, {"context_size": 4096}]


def test_a_file_that_is_not_there_is_the_problem_and_not_auto(house: House) -> None:
    house.write("services/llama-cpp/service.yaml", LLAMA.replace("MODEL_PATH:", f"{AUTO}, MODEL_PATH:"))
    model = house.read("models: {m: {service: llama-cpp, path: m.gguf, context_size: auto}}").resolve("m")
    assert "There is no file" in str(model.problem)
    assert model.demand.source == "unknown"


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ("service: llama-cpp, path: m.gguf, memory: 1GiB, context_size: auto", "context_size"),
        ("service: comfyui, memory: 1GiB, n_gpu_layers: auto", "n_gpu_layers"),
        ("service: llama-cpp, source: {demo: 1}, context_size: auto", "context_size"),
    ],
)
def test_auto_where_nothing_can_be_predicted_is_a_mistake(house: House, entry: str, field: str) -> None:
    (error,) = house.errors(f"models: {{m: {{{entry}}}}}")
    assert f"models.m.{field}: auto needs a footprint that is predicted" in error


@pytest.mark.parametrize(
    ("told", "unsaid"),
    [
        ("A: b", "context_size"),
        ('N_GPU_LAYERS: "{n_gpu_layers}"', "context_size"),
        ('CONTEXT_SIZE: "{context_size}"', "n_gpu_layers"),
    ],
)
def test_auto_that_the_service_is_never_told_is_a_mistake(house: House, told: str, unsaid: str) -> None:
    trained_for(house.folder / "m.gguf", 8192)
    house.write("services/llama-cpp/service.yaml", LLAMA.replace("MODEL_PATH:", f"{told}, MODEL_PATH:"))
    entry = "service: llama-cpp, path: m.gguf, context_size: auto, n_gpu_layers: auto"
    (error,) = house.errors(f"models: {{m: {{{entry}}}}}")
    assert f"models.m.{unsaid}: auto needs a service that is told what was chosen" in error
    assert f"'llama-cpp' does not use {{{unsaid}}}" in error
    rest = "environment: {A: '{context_size}', B: '{n_gpu_layers}'}"
    assert house.read(f"models: {{m: {{{entry}, {rest}}}}}").resolve("m").variants, "its entry can say it too"


def test_without_auto_there_is_one_way_only(house: House) -> None:
    assert model_of(house, "context_size: 4096").variants == ()


def test_what_else_would_fit_begins_at_the_least(house: House) -> None:
    model = model_of(house, "context_size: auto")
    ways = alternatives_of(house.read(), model)
    assert ways is not None
    contexts, caches, layers = ways.kinds
    assert (contexts, caches[0]["cache_type_k"], layers[0]["n_gpu_layers"]) == ([], "q8_0", LAYERS)


@pytest.mark.parametrize(
    ("entry", "told", "expected"),
    [
        ("path: m.gguf", AUTO, {"context_size", "n_gpu_layers"}),
        ("path: m.gguf, context_size: auto", AUTO, {"n_gpu_layers"}),
        ("path: m.gguf", 'CONTEXT_SIZE: "{context_size}"', {"context_size"}),
        ("path: m.gguf, environment: {NGL: '{n_gpu_layers}'}", "A: b", {"n_gpu_layers"}),
        ("path: m.gguf, memory: 1GiB", AUTO, set()),
        ("source: {demo: 1}", AUTO, set()),
    ],
)
def test_only_what_the_service_is_told_and_a_prediction_counts_can_be_tuned(
    house: House, entry: str, told: str, expected: set[str]
) -> None:
    trained_for(house.folder / "m.gguf", 8192)
    house.write("services/llama-cpp/service.yaml", LLAMA.replace("MODEL_PATH:", f"{told}, MODEL_PATH:"))
    model = house.read(f"models: {{m: {{service: llama-cpp, {entry}}}}}").resolve("m")
    assert model.tunable == expected


@pytest.mark.parametrize("unsaid", ["context_size", "n_gpu_layers", "cache_type_k"])
def test_what_the_service_is_not_told_is_not_offered(house: House, unsaid: str) -> None:
    """It would run as before, and take more than would be reserved."""
    model_of(house, "context_size: 8192")
    told = AUTO.replace(f"{{{unsaid}}}", "8")
    house.write("services/llama-cpp/service.yaml", LLAMA.replace("MODEL_PATH:", f"{told}, MODEL_PATH:"))
    ways = alternatives_of(house.read(), house.read().resolve("m"))
    assert ways is not None
    fields = {field for kind in ways.kinds for way in kind for field in way}
    known = {"context_size", "n_gpu_layers", "cache_type_k"}
    assert fields & known == known - {unsaid}


def test_what_else_would_fit_is_less_than_the_variant_that_was_refused(house: House) -> None:
    model = model_of(house, "n_gpu_layers: auto, context_size: 8192")
    ways = alternatives_of(house.read(), model, {"n_gpu_layers": 20})
    assert ways is not None
    _, caches, layers = ways.kinds
    assert layers[0] == {"n_gpu_layers": 19}
    on_gpu = {v.parameters["n_gpu_layers"]: v.demand.gpu_bytes for v in model.variants}
    assert on_gpu[11] < ways.demand(caches[0]).gpu_bytes < on_gpu[21]
