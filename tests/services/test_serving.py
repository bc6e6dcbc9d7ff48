"""The container's variables become llama-server's arguments, by the rules of the one that is a process."""

from pathlib import Path

import pytest
import yaml

import entrypoint
import serving
from orchestrator.local import llama

SERVICES = Path(__file__).parents[2] / "services"
SHARED = (
    "MODEL_NAME",
    "CONTEXT_SIZE",
    "N_GPU_LAYERS",
    "PARALLEL",
    "CACHE_TYPE_K",
    "CACHE_TYPE_V",
    "CACHE_RAM_MIB",
    "TENSOR_SPLIT",
)
DIFFER_BY_DESIGN = {"host", "gpu_layers"}
"""A container listens on all its addresses; its users were promised 99 layers, where the other has 999."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF and more")
    return path


def value_after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_defaults_are_those_of_the_process_but_for_what_differs_by_design(model: Path) -> None:
    here = vars(serving.read_options({"MODEL_PATH": str(model)}))
    there = vars(llama.read_options({"MODEL_PATH": str(model)}))
    assert {key for key in there if here[key] != there[key]} == DIFFER_BY_DESIGN
    assert (here["host"], here["port"], here["context_size"], here["gpu_layers"]) == (
        "0.0.0.0",
        8000,
        8192,
        99,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"PORT": "x"},
        {"PORT": "65536"},
        {"PARALLEL": "0"},
        {"CONTEXT_SIZE": "-1"},
        {"CACHE_TYPE_V": "q3"},
        {"CACHE_RAM_MIB": "1.5"},
        {"N_GPU_LAYERS": "many"},
        {"TENSOR_SPLIT": "1;1"},
        {"TENSOR_SPLIT": "1,-1"},
        {"TENSOR_SPLIT": "nan,1"},
        {"TENSOR_SPLIT": ",".join("1" * 16)},
        {"MODEL_PATH": __file__},
    ],
)
def test_what_is_wrong_is_refused_in_the_words_of_the_process(model: Path, wrong: dict[str, str]) -> None:
    told = {"MODEL_PATH": str(model)} | wrong
    with pytest.raises(serving.Unusable) as here:
        serving.read_options(told)
    with pytest.raises(llama.Unusable) as there:
        llama.read_options(told)
    assert here.value.code == there.value.code
    assert str(here.value).partition(" from ")[0] == str(there.value).partition(" from ")[0]


def test_exit_codes_and_cache_types_are_those_of_the_process() -> None:
    codes = ("ENDED", "NOT_LOADED", "BAD_VARIABLE", "BAD_FILE", "CACHE_TYPES")
    assert {name: getattr(serving, name) for name in codes} == {name: getattr(llama, name) for name in codes}


def test_a_context_of_256k_is_the_most(model: Path) -> None:
    told = {"MODEL_PATH": str(model), "CONTEXT_SIZE": "262144"}
    assert serving.read_options(told).context_size == 262_144
    with pytest.raises(
        serving.Unusable, match="CONTEXT_SIZE is '262145', expected a whole number from 1 to 262144"
    ):
        serving.read_options(told | {"CONTEXT_SIZE": "262145"})


def test_nothing_is_left_for_llama_cpp_to_choose(model: Path) -> None:
    told = {"MODEL_PATH": str(model), "CONTEXT_SIZE": "4096", "N_GPU_LAYERS": "40", "PARALLEL": "2"}
    words = serving.command_line(serving.read_options(told), {})
    assert value_after(words, "--ctx-size") == "4096"
    assert value_after(words, "--n-gpu-layers") == "40"
    assert value_after(words, "--parallel") == "2"
    assert value_after(words, "--fit") == "off"
    assert value_after(words, "--flash-attn") == "on"
    assert {"--kv-unified", "--cont-batching", "--metrics", "--slots"} <= set(words)


@pytest.mark.parametrize(("theirs", "ours"), serving.SET_BY_US.items())
def test_a_variable_of_llama_cpp_that_would_lose_is_refused(model: Path, theirs: str, ours: str) -> None:
    with pytest.raises(serving.Unusable, match=f"{theirs} is set, which would not count; set {ours} instead"):
        serving.read_options({"MODEL_PATH": str(model), theirs: "1"})


@pytest.mark.parametrize(("told", "seen"), [(None, True), ("", False), ("none", False)])
def test_the_projector_beside_the_model_is_used_unless_told_otherwise(
    tmp_path: Path, told: str | None, seen: bool
) -> None:
    snapshot = tmp_path / "hub" / "models--a--VL" / "snapshots" / "c1"
    snapshot.mkdir(parents=True)
    for name in ("vl.gguf", "mmproj-vl-f16.gguf"):
        (snapshot / name).write_bytes(b"GGUF")
    environment = {"MODEL_PATH": str(snapshot / "vl.gguf")} | ({} if told is None else {"MMPROJ_PATH": told})
    options = serving.read_options(environment)
    assert options.mmproj == (snapshot / "mmproj-vl-f16.gguf" if seen else None)
    assert ("--mmproj" in serving.command_line(options, {})) is seen


def test_a_command_runs_in_place_of_the_server(model: Path) -> None:
    told = {"MODEL_PATH": str(model)}
    assert entrypoint.command(["ls", "-la"], told) == ["ls", "-la"]
    assert entrypoint.command(["download", "a/b"], told) == ["huggingface-cli", "download", "a/b"]
    assert entrypoint.command(["--threads", "2"], told)[-2:] == ["--threads", "2"]


def test_the_manifest_sets_only_what_the_container_reads() -> None:
    service = yaml.safe_load((SERVICES / "llama-cpp" / "service.yaml").read_text())
    assert set(SHARED) <= set(service["environment"])
    assert set(service["environment"]) - set(SHARED) == {"MODEL_PATH", "MMPROJ_PATH"}
