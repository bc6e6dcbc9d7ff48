"""The compose files and the catalogues beside them say what the documents promise; nothing is started."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.catalogue.read import Catalogue, read_catalogue
from orchestrator.settings import load_settings
from tests.compose.stack import ROOT, compose
from tests.images.llama_cpp import ARGUMENTS, SERVICE

HOME = ROOT / "examples" / "home"
GPU, CPU, HOUSE = "compose.yaml", "compose.cpu.yaml", "examples/home/compose.yaml"
DOWNLOADS = "get it with: orchestrator pull"


@functools.cache
def config(*files: str, **env: str) -> dict[str, Any]:
    """What docker-compose makes of the files."""
    found: dict[str, Any] = yaml.safe_load(compose("config", env=env, files=files))
    return found


@pytest.mark.parametrize("files", [(GPU,), (GPU, CPU), (GPU, HOUSE), (GPU, CPU, HOUSE)], ids="+".join)
def test_compose_accepts_the_files(files: tuple[str, ...]) -> None:
    services = config(*files)["services"]
    assert {"orchestrator", "caddy", "socket-proxy"} <= set(services)
    for name in set(services) - {"llama-cpp"}:
        assert services[name]["restart"] == "unless-stopped"
    assert services["llama-cpp"]["profiles"] == ["build"], "the orchestrator starts models, compose does not"


def test_only_caddy_is_open_to_the_house() -> None:
    services = config(GPU)["services"]
    assert [name for name, service in services.items() if "ports" in service] == ["caddy"]
    assert [port["published"] for port in services["caddy"]["ports"]] == [80, 443]


def test_the_engines_socket_is_the_socket_proxys_alone() -> None:
    found = config(GPU)
    services = found["services"]
    assert found["networks"]["control"]["internal"] is True
    on_control = {name for name, service in services.items() if "control" in service.get("networks", {})}
    assert on_control == {"orchestrator", "socket-proxy"}
    assert set(services["socket-proxy"]["networks"]) == {"control"}
    with_socket = [name for name, service in services.items() if "docker.sock" in str(service.get("volumes"))]
    assert with_socket == ["socket-proxy"]


def test_names_are_fixed_and_can_be_chosen() -> None:
    found = config(GPU)
    volumes = {name: volume["name"] for name, volume in found["volumes"].items()}
    assert volumes == {"hf-cache": "hf-cache", "state": "orchestrator-state", "caddy": "orchestrator-caddy"}
    assert found["networks"]["models"]["name"] == "orchestrator-models"
    chosen = config(GPU, HF_CACHE_VOLUME="other", MODELS_NETWORK="mine")
    assert chosen["volumes"]["hf-cache"]["name"] == "other"
    assert chosen["networks"]["models"]["name"] == "mine"
    proxy, orchestrator = chosen["services"]["socket-proxy"], chosen["services"]["orchestrator"]
    assert proxy["environment"]["MODELS_NETWORK"] == "mine"
    assert orchestrator["environment"]["ORCHESTRATOR_DOCKER_NETWORK"] == "mine"
    assert orchestrator["environment"]["ORCHESTRATOR_HUB_VOLUME"] == "other"


def test_new_volumes_belong_to_who_runs() -> None:
    orchestrator = config(GPU, PUID="1234", PGID="5678")["services"]["orchestrator"]
    assert orchestrator["user"] == "1234:5678"
    assert orchestrator["build"]["args"] == {"PUID": "1234", "PGID": "5678"}


def test_without_a_gpu_nothing_asks_for_one() -> None:
    services = config(GPU, CPU)["services"]
    assert services["orchestrator"]["runtime"] == "runc"
    assert services["orchestrator"]["environment"]["ORCHESTRATOR_DEVICES"] == "host"
    llama = services["llama-cpp"]
    assert llama["image"] == "orchestrator/llama-cpp:cpu"
    assert Path(llama["build"]["context"]) == SERVICE
    given = llama["build"]["args"]
    assert given["CUDA"] == ARGUMENTS["CUDA"]
    assert given.keys() <= ARGUMENTS.keys() and given["BUILD_BASE"] == given["RUNTIME_BASE"]


# --- catalogues


def catalogue(
    folder: Path, services: Mapping[str, Path], config: Path, monkeypatch: pytest.MonkeyPatch
) -> Catalogue:
    """What the orchestrator reads with these mounted. Raises CatalogueError."""
    monkeypatch.setenv("HF_HOME", str(folder / "empty"))
    (folder / "services").mkdir()
    for name, source in services.items():
        (folder / "services" / name).symlink_to(source)
    models = config / "models.yaml"
    settings = load_settings(config / "orchestrator.yaml", models=models, services=folder / "services")
    return read_catalogue(settings, on_gpu=True)


@pytest.mark.parametrize("llama", ["services/llama-cpp", "deploy/cpu/llama-cpp"])
def test_the_first_evenings_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: str) -> None:
    """They wait for their download, and say how."""
    found = catalogue(tmp_path, {"llama-cpp": ROOT / llama}, ROOT / "config", monkeypatch)
    assert set(found.models) == {"qwen3-0.6b", "qwen3-vl-30b"}
    assert all(DOWNLOADS in (model.problem or "") for model in found.models.values())
    assert found.hostnames == {"llama.lan": "llama-cpp"}


def test_the_houses_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = {name: HOME / "services" / name for name in ("comfyui", "whisper")}
    services["llama-cpp"] = ROOT / "services" / "llama-cpp"
    found = catalogue(tmp_path, services, HOME / "config", monkeypatch)
    assert {m.id for m in found.models.values() if m.problem is None} == {"comfyui", "whisper"}
    assert all(DOWNLOADS in problem for problem in found.problems)
    whisper = found.models["whisper"].launch.container_environment
    assert whisper["PRELOAD_MODELS"] == '["Systran/faster-whisper-large-v3"]'
    assert found.models["comfyui"].api == "http"
    mounted = [
        volume["source"] for volume in house_mounts() if volume["target"].startswith("/home/services/")
    ]
    assert {Path(source) for source in mounted} == set(services.values()), "compose mounts the same ones"


def house_mounts() -> list[dict[str, str]]:
    mounts = config(GPU, HOUSE)["services"]["orchestrator"]["volumes"]
    split = [mount.split(":") for mount in mounts]
    return [{"source": parts[0], "target": parts[1]} for parts in split]


def test_the_cpu_service_is_the_gpu_one_with_another_image() -> None:
    texts = [(ROOT / folder / "llama-cpp/service.yaml").read_text() for folder in ("services", "deploy/cpu")]
    one, other = (yaml.safe_load(text) for text in texts)
    assert other == {**one, "image": "orchestrator/llama-cpp:cpu"}


# --- what the image is made of


def test_the_images_packages_are_those_that_the_tests_use() -> None:
    """Made with pip-compile from pyproject.toml and requirements.lock; see docs/operating.md."""
    ours, tested = (pins(ROOT / name) for name in ("requirements-server.lock", "requirements.lock"))
    assert ours.items() <= tested.items()
    pyproject = (ROOT / "pyproject.toml").read_text()
    wanted = pyproject.partition("dependencies = [")[2].partition("]\n")[0]
    for line in wanted.splitlines():
        name = line.strip(' ",').partition(">")[0].partition("[")[0]
        assert not name or name in ours, f"{name} is not in requirements-server.lock"


def pins(path: Path) -> dict[str, str]:
    lines = [line.rstrip("\\ ") for line in path.read_text().splitlines() if "==" in line and line[0] != " "]
    return {line.partition("==")[0].partition("[")[0]: line.partition("==")[2].split()[0] for line in lines}
