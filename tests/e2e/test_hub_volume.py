"""From a pull to a chat with real llama.cpp in a container that has the cache as a volume, read-only."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from orchestrator.local.demo import make_demo
from tests.e2e.conftest import docker_client
from tests.e2e.test_llama import HELLO, IN_IMAGE, REPOSITORY, SERVICE
from tests.hub.server import hub_server
from tests.images.build import build_llama
from tests.server import running_server

pytestmark = [pytest.mark.llama, pytest.mark.docker]

NAME = "acme/tiny-GGUF:Q4_K_M"


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[str]:
    """A volume that is the server's own HF_HOME, as a compose file has it."""
    folder = tmp_path / "huggingface"
    folder.mkdir()
    name = f"hf-cache-{uuid.uuid4().hex[:12]}"
    with contextlib.closing(docker_client()) as client:
        options = {"type": "none", "o": "bind", "device": str(folder)}
        made = client.volumes.create(name, driver="local", driver_opts=options)
        yield name
        made.remove()


def test_what_is_pulled_is_served_from_the_volume(tmp_path: Path, volume: str, network: str) -> None:
    tmp_path.chmod(0o755)
    make_demo(tmp_path / "demo.gguf", 7)
    service = yaml.safe_load(SERVICE.read_text())
    del service["volumes"]
    service["image"] = build_llama({name: REPOSITORY / name for name in IN_IMAGE})
    settings = {"engine": "docker", "gpu_access": "none", "docker_network": network, "hub_volume": volume}
    with (
        hub_server() as hub,
        running_server(
            tmp_path, "models: {}", {"llama-cpp": service}, {**settings, "host_memory_mib": 512}, hub.env
        ) as server,
    ):
        hub.add("acme/tiny-GGUF", {"tiny-Q4_K_M.gguf": tmp_path / "demo.gguf"})
        pulled = server.run("pull", NAME)
        assert pulled.returncode == 0, pulled.stderr
        body = {"model": NAME, "messages": HELLO, "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]
        with contextlib.closing(docker_client()) as client:
            (container,) = client.containers.list(filters={"network": network})
            (mount,) = container.attrs["Mounts"]
            assert (mount["Name"], mount["Destination"]) == (volume, "/data/.huggingface")
            assert not mount["RW"]
        removed = server.run("rm", NAME)
        assert removed.returncode == 0, removed.stderr
        assert not list((tmp_path / "huggingface").rglob("blobs/*"))
