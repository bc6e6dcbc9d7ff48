"""`orchestrator estimate`, without a server: a file, a model of the catalogue, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli.main import app
from tests.estimate.shapes import qwen3_8b
from tests.services.projector import make_projector


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_8b(2, vocabulary=4096).write(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["estimate", *map(str, words)])


def view(*words: object) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_a_files_parts_as_json(file: Path) -> None:
    found = view(file, "--gpu", "RTX 5090", "--context-size", 4096)
    assert found["source"] == "predicted"
    gpu = found["breakdown"]["gpu0"]
    assert gpu["kv_cache"] == 2 * 4096 * 8 * 128 * 2 * 2 / 2**20
    assert gpu["cuda_context"] == 510
    assert found["total_mib"] == pytest.approx(sum(gpu.values()), abs=0.5)
    assert found["low_mib"] < found["total_mib"] < found["high_mib"]


def test_every_option_changes_what_it_says(file: Path) -> None:
    plain = view(file)
    cache = plain["breakdown"]["gpu0"]["kv_cache"]
    assert view(file, "--context-size", 16384)["breakdown"]["gpu0"]["kv_cache"] == 2 * cache
    assert view(file, "--cache-type-k", "q8_0", "--cache-type-v", "q4_0")["breakdown"]["gpu0"][
        "kv_cache"
    ] == (pytest.approx(cache / 4 * (34 + 18) / 32, abs=0.1))
    assert view(file, "--n-gpu-layers", 0)["breakdown"]["host"]["kv_cache"] == cache
    assert (
        view(file, "--parallel", 64)["breakdown"]["host"]["compute"] > plain["breakdown"]["host"]["compute"]
    )
    in_ram = view(file, "--gpu", "none")
    assert set(in_ram["breakdown"]) == {"host"}


def test_over_several_gpus_each_has_its_layers(file: Path) -> None:
    one, two = view(file), view(file, "--gpus", 2)
    assert set(two["breakdown"]) == {"gpu0", "gpu1", "host"}
    cache = sum(two["breakdown"][gpu].get("kv_cache", 0) for gpu in ("gpu0", "gpu1"))
    assert cache == one["breakdown"]["gpu0"]["kv_cache"]
    assert two["breakdown"]["gpu1"]["cuda_context"] == one["breakdown"]["gpu0"]["cuda_context"]
    assert (one["gpus"], two["gpus"], view(file, "--gpu", "none")["gpus"]) == (1, 2, 0)


def test_a_projector_may_come_with_a_file(file: Path, tmp_path: Path) -> None:
    projector = tmp_path / "mmproj.gguf"
    make_projector(projector)
    parts = view(file, "--mmproj", projector)["breakdown"]["gpu0"]
    assert parts["projector"] > 0
    assert "projector" not in view(file)["breakdown"]["gpu0"]
    assert "is no projector: its architecture is 'qwen3', not 'clip'" in " ".join(
        run(file, "--mmproj", file).stderr.split()
    )
    assert "There is no file /nowhere.gguf" in run(file, "--mmproj", "/nowhere.gguf").stderr


def test_a_projector_alone_is_no_model(tmp_path: Path) -> None:
    make_projector(tmp_path / "mmproj.gguf")
    result = run(tmp_path / "mmproj.gguf")
    assert result.exit_code == 1
    assert "is a projector: name its model's file, and this one with --mmproj" in " ".join(
        result.stderr.split()
    )


def test_a_card_is_known_by_its_number(file: Path) -> None:
    assert view(file, "--gpu", "4090")["total_mib"] == view(file, "--gpu", "RTX 4090")["total_mib"]
    assert "is not known here" not in run(file, "--gpu", "5070 ti").stdout


def test_of_a_declared_memory_it_says_that_this_counts(file: Path, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        f"models:\n  told: {{service: llama-cpp, path: {file}, memory: 3GiB}}\n"
    )
    (tmp_path / "orchestrator.yaml").write_text("devices: nvml\n")
    text = " ".join(run("told").stdout.split())
    assert "Its entry declares its memory, and that counts: 3072 MiB of GPU and 0 MiB of RAM." in text


def test_the_settings_that_it_holds_for_are_said(file: Path) -> None:
    found = view(file, "--context-size", 4096, "--n-gpu-layers", 1, "--cache-type-k", "q8_0")
    said = {"context_size": 4096, "n_gpu_layers": 1, "parallel": 4, "cache_type_k": "q8_0"}
    assert {name: found[name] for name in said} == said
    assert view(file)["n_gpu_layers"] == "all"
    assert view(file, "--gpu", "RTX 5090")["gpu"] == "RTX 5090"


def test_the_table_names_the_parts_and_what_is_not_known(file: Path) -> None:
    text = run(file).stdout
    for words in (
        "weights",
        "kv cache",
        "compute",
        "cuda context",
        "together",
        "MiB on the GPU, between",
        "--gpu",
    ):
        assert words in text
    assert "is not known here" in run(file, "--gpu", "Voodoo 2").stdout
    assert "largest known" not in run(file, "--gpu", "NVIDIA GeForce RTX 5090").stdout


def test_a_model_of_the_catalogue_brings_its_own_settings(file: Path, tmp_path: Path) -> None:
    models = f"""\
models:
  mine:
    service: llama-cpp
    path: {file}
    context_size: 1024
    cache_type_k: q8_0
    aliases: [also]
"""
    (tmp_path / "models.yaml").write_text(models)
    (tmp_path / "orchestrator.yaml").write_text("devices: nvml\n")
    own, other = view("mine"), view(file, "--context-size", 1024, "--cache-type-k", "q8_0")
    assert own == other == view("also")
    assert view("mine", "--context-size", 2048)["total_mib"] > own["total_mib"]


def test_of_auto_it_says_that_it_is_the_least(file: Path, tmp_path: Path) -> None:
    entry = f"{{service: llama-cpp, path: {file}, context_size: auto}}"
    two = f"{{service: llama-cpp, path: {file}, gpus: 2}}"
    (tmp_path / "models.yaml").write_text(f"models:\n  some: {entry}\n  two: {two}\n")
    (tmp_path / "orchestrator.yaml").write_text("devices: nvml\n")
    assert "says auto for context_size: this is the least." in run("some").stdout
    assert "auto" not in run("some", "--context-size", 8192).stdout
    assert "auto" not in run("two").stdout
    assert "MiB on 2 GPUs together, between" in " ".join(run("two").stdout.split())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ("nobody",),
            1,
            "There is no file 'nobody' here. There is no model 'nobody'. The catalogue has: demo",
        ),
        (("/nowhere/at-all.gguf",), 1, "There is no file /nowhere/at-all.gguf."),
        ((__file__,), 1, "is not a GGUF file"),
        (("demo",), 1, "'demo' has no GGUF file to read; it is put down with 64 MiB"),
        (("x.gguf", "--cache-type-k", "q9"), 2, "--cache-type-k: got 'q9', expected one of f32, f16,"),
        (("x.gguf", "--context-size", "0"), 2, "--context-size"),
        (("x.gguf", "--parallel", "many"), 2, "--parallel"),
        (("x.gguf", "--gpus", "0"), 2, "--gpus"),
        (("x.gguf", "--gpus", "2", "--gpu", "none"), 2, "--gpus: there are none with --gpu none"),
    ],
)
def test_bad_input_gets_a_clear_error(words: tuple[str, ...], code: int, says: str) -> None:
    result = run(*words)
    assert result.exit_code == code
    assert says in " ".join(result.stderr.split())
