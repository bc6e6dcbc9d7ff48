"""What services/llama-cpp/README.md says of the container itself, tried on the container."""

import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import Hub
from tests.services.conftest import MODEL, PROJECTOR, REPO
from tests.services.containers import SCRIPT, Container, container, docker, in_volume, run, script_environment
from tests.services.test_download import PROMISED

pytestmark = [pytest.mark.docker, pytest.mark.llama]

FOLDER = "/data/.huggingface/hub/models--Qwen--Qwen3-VL-30B-A3B-Instruct-GGUF"
CHANGED = {
    "MODEL_NAME": "salad",
    "PORT": "8123",
    "CONTEXT_SIZE": "4096",
    "N_GPU_LAYERS": "40",
    "PARALLEL": "2",
    "CACHE_TYPE_K": "bf16",
    "CACHE_TYPE_V": "bf16",
    "CACHE_RAM_MIB": "64",
    "HF_HOME": "/elsewhere",
    "PUID": "4321",
    "PGID": "4322",
    "LLAMA_ARG_BATCH": "256",
}


@pytest.fixture(scope="module")
def cache(image: str, hub: Hub, hub_url: str) -> Iterator[str]:
    """A volume that the script has filled with the default model."""
    name = "hf-cache-test-" + Path(hub_url).name.replace(":", "-")
    docker("volume", "create", name)
    done = run(str(SCRIPT), env=script_environment(image, name, hub_url))
    assert done.returncode == 0, done.stderr
    yield name
    docker("volume", "rm", "--force", name)


@pytest.fixture(scope="module")
def default(image: str, cache: str) -> Iterator[Container]:
    """A container that was told nothing at all."""
    with container(image, options=("-v", f"{cache}:/data/.huggingface")) as box:
        yield box.wait_ready()


@pytest.fixture(scope="module")
def changed(image: str, cache: str) -> Iterator[Container]:
    """A container with another value for everything."""
    with container(image, port=8123, options=("-v", f"{cache}:/elsewhere:ro"), **CHANGED) as box:
        yield box.wait_ready()


def test_model_path_has_a_default_whose_latest_and_name_are_resolved(default: Container) -> None:
    model = default.get("/props")["model_path"]
    assert re.fullmatch(rf"{FOLDER}/snapshots/[0-9a-f]{{40}}/{re.escape(MODEL)}", model)


def test_mmproj_path_is_by_default_the_projector_beside_the_model(default: Container) -> None:
    assert f"vision projector: {FOLDER}/snapshots/" in default.log()
    assert default.option("--mmproj").endswith(PROJECTOR)
    assert default.get("/props")["modalities"]["vision"] is True


def test_mmproj_path_none_leaves_it_out(image: str, cache: str) -> None:
    options = ("-v", f"{cache}:/data/.huggingface:ro")
    with container(image, options=options, MMPROJ_PATH="none") as box:
        assert box.wait_ready().get("/props")["modalities"]["vision"] is False


def test_model_name(default: Container, changed: Container) -> None:
    assert default.get("/v1/models")["data"][0]["id"] == MODEL.removesuffix(".gguf")
    assert changed.get("/v1/models")["data"][0]["id"] == "salad"


def test_host_and_port(default: Container, changed: Container) -> None:
    assert "listening on http://0.0.0.0:8000" in default.log()
    assert "listening on http://0.0.0.0:8123" in changed.log()


def test_context_size_and_parallel(default: Container, changed: Container) -> None:
    assert [slot["n_ctx"] for slot in default.get("/slots")] == [8192] * 4
    assert [slot["n_ctx"] for slot in changed.get("/slots")] == [4096] * 2


def test_n_gpu_layers(default: Container, changed: Container) -> None:
    """This variant has no GPU, and says so; what it is told is on its command line."""
    assert "no usable GPU found, --gpu-layers option will be ignored" in changed.log()
    assert (default.option("--n-gpu-layers"), changed.option("--n-gpu-layers")) == ("99", "40")


def test_cache_types(default: Container, changed: Container) -> None:
    assert "K (f16)" in default.log()
    assert "K (bf16)" in changed.log()
    assert "V (bf16)" in changed.log()


def test_cache_ram_mib(default: Container, changed: Container) -> None:
    assert "prompt cache is enabled" not in default.log()
    assert "prompt cache is enabled, size limit: 64 MiB" in changed.log()


def test_hf_home(changed: Container) -> None:
    assert changed.get("/props")["model_path"].startswith("/elsewhere/hub/models--Qwen--Qwen3-VL")


def test_puid_and_pgid(default: Container, changed: Container) -> None:
    assert default.of_server("stat -c %u:%g .") == "1000:1000\n"
    assert changed.of_server("stat -c %u:%g .") == "4321:4322\n"


def test_other_options_of_llama_cpp_pass_through(default: Container, changed: Container) -> None:
    assert re.search(r"n_batch += 2048", default.log())
    assert re.search(r"n_batch += 256", changed.log())


def test_log_verbosity(image: str, cache: str, default: Container) -> None:
    assert "KV buffer size" in default.log()
    with container(image, options=("-v", f"{cache}:/data/.huggingface:ro"), LOG_VERBOSITY="3") as box:
        assert "KV buffer size" not in box.wait_ready().log()
        assert "listening on" in box.log()


def test_docker_logs_says_that_flash_attention_is_on_and_how_much_memory_is_taken(default: Container) -> None:
    said = default.log()
    assert re.search(r"flash_attn += enabled", said)
    for kind in ("model", "KV", "compute"):
        assert re.search(rf" {kind} buffer size = +[\d.]+ MiB", said), kind


def test_docker_exec_ls(default: Container) -> None:
    shown = docker("exec", default.name, "ls", "-la", f"{FOLDER}/")
    assert {"blobs", "refs", "snapshots"} <= set(shown.split())


def test_health_metrics_and_the_health_check(default: Container, image: str) -> None:
    assert default.get("/health") == {"status": "ok"}
    assert "llamacpp:prompt_tokens_total" in default.get_text("/metrics")
    check = docker("inspect", "-f", "{{json .Config.Healthcheck.Test}}", image)
    assert "healthcheck" in check
    assert docker("exec", default.name, "python3", "/opt/llama-cpp/entrypoint.py", "healthcheck") == ""


def test_no_web_page_may_read_answers(default: Container) -> None:
    asked = urllib.request.Request(f"{default.url}/v1/models", headers={"Origin": "http://elsewhere"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        assert not answer.headers.get("Access-Control-Allow-Origin")


def test_the_server_may_do_nothing_beyond_its_user(default: Container) -> None:
    status = default.of_server("cat status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def test_what_root_left_in_the_cache_is_handed_over_and_what_others_own_is_not(
    image: str, volume: str
) -> None:
    folder = "/data/.huggingface/hub/models--a--b"
    in_volume(
        image, volume, f"mkdir -p {folder}/blobs; cd {folder}/blobs; touch root other; chown 4321 other"
    )
    docker("run", "--rm", "-v", f"{volume}:/data/.huggingface", image, "true")
    owners = in_volume(image, volume, f"cd {folder}; stat -c '%n %u' blobs blobs/*")
    assert owners.split() == ["blobs", "1000", "blobs/other", "4321", "blobs/root", "1000"]


def test_a_missing_file_is_told_with_what_is_there_and_the_command_that_downloads_it(
    image: str, cache: str
) -> None:
    path = f"{FOLDER}/snapshots/latest/qwen3-vl-30b-a3b-instruct-q5_k_m.gguf"
    with container(image, options=("-v", f"{cache}:/data/.huggingface"), MODEL_PATH=path) as box:
        assert box.wait_end() == 3
        said = box.log()
    assert f"looked for:  {path}" in said
    assert f": {MODEL}, {PROJECTOR}\n" in said
    assert f"services/llama-cpp/download-model.sh {REPO} qwen3-vl-30b-a3b-instruct-q5_k_m.gguf" in said


def test_an_empty_cache_is_told(image: str, volume: str) -> None:
    with container(image, options=("-v", f"{volume}:/data/.huggingface")) as box:
        assert box.wait_end() == 3
        assert f"services/llama-cpp/download-model.sh {REPO} {PROMISED}" in box.log()


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [
        ({"CONTEXT_SIZE": "300000"}, 2, "CONTEXT_SIZE is '300000', expected a whole number from 1 to 262144"),
        ({"PUID": "0"}, 2, "PUID is '0', expected a number from 1"),
        ({"MODEL_PATH": "/opt/llama-cpp/LICENSE"}, 3, "/opt/llama-cpp/LICENSE is not a GGUF file"),
    ],
)
def test_what_cannot_work_ends_it_with_a_code_and_the_reason(
    image: str, environment: dict[str, str], code: int, says: str
) -> None:
    with container(image, **environment) as box:
        assert box.wait_end() == code
        assert f"cannot start: {says}" in box.log()


def test_a_broken_model_ends_it_with_code_1(image: str, ggufs: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes((ggufs / MODEL).read_bytes()[:100_000])
    tmp_path.chmod(0o755)
    with container(image, options=("-v", f"{tmp_path}:/models:ro"), MODEL_PATH="/models/cut.gguf") as box:
        assert box.wait_end() == 1
        assert "tensor data is not within the file bounds" in box.log() or "failed to load model" in box.log()


def test_it_stops_at_once_and_well(image: str, cache: str) -> None:
    with container(image, options=("-v", f"{cache}:/data/.huggingface:ro")) as box:
        box.wait_ready()
        began = time.monotonic()
        docker("stop", "--time", "10", box.name)
        assert time.monotonic() - began < 5
        assert box.wait_end() == 0


def test_a_file_that_may_not_be_read_is_told(image: str, ggufs: Path, tmp_path: Path) -> None:
    shutil.copy(ggufs / MODEL, tmp_path / "mine.gguf")
    (tmp_path / "mine.gguf").chmod(0o600)
    for mode in (0o700, 0o755):
        tmp_path.chmod(mode)
        with container(
            image, options=("-v", f"{tmp_path}:/models:ro"), MODEL_PATH="/models/mine.gguf"
        ) as box:
            assert box.wait_end() == 3
            assert "cannot read /models/mine.gguf: Permission denied for 1000:1000; set PUID" in box.log()


def test_a_user_chosen_by_docker_is_kept(image: str) -> None:
    assert docker("run", "--rm", "--user", "1234:5678", image, "id", "-u").strip() == "1234"
    assert docker("run", "--rm", image, "id", "-u").strip() == "1000"
