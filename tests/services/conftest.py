"""Fixtures: the image of services/llama-cpp for the CPU, a volume for its cache, and a hub to fill it from.

The programs of services/llama-cpp/image are tested where they lie: they are scripts, not a package.
"""

import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_network
from pathlib import Path

import pytest

from orchestrator.local.demo import make_demo
from tests.e2e.conftest import network as network
from tests.hub.server import Hub
from tests.images.llama_cpp import SERVICE, build_llama_cpp
from tests.services.containers import docker
from tests.services.projector import make_projector

sys.path.append(str(SERVICE / "image"))

REPO = "Qwen/Qwen3-VL-30B-A3B-Instruct-GGUF"
MODEL = "Qwen3VL-30B-A3B-Instruct-Q4_K_M.gguf"
PROJECTOR = "mmproj-Qwen3VL-30B-A3B-Instruct-F16.gguf"
"""The names which that repository really has."""


@pytest.fixture(scope="session")
def image() -> str:
    return build_llama_cpp()


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, which can call tools, and the projector with which it sees."""
    folder = tmp_path_factory.mktemp("models") / "ggufs"  # which everybody may enter
    make_demo(folder / MODEL, 7)
    make_projector(folder / PROJECTOR)
    return folder


@pytest.fixture(scope="session")
def hub(ggufs: Path) -> Iterator[Hub]:
    """A hub that containers reach under `hub_url`."""
    with closing(Hub("0.0.0.0", 0)) as hub:
        make_demo(ggufs / "other.gguf", 8)
        hub.add(REPO, {name: ggufs / name for name in (MODEL, PROJECTOR)} | {"README.md": b"# Tiny"})
        hub.add("acme/gated-GGUF", {"gated-Q4_K_M.gguf": ggufs / "other.gguf"}, gated=True)
        yield hub


@pytest.fixture(scope="session")
def hub_url(hub: Hub) -> str:
    subnet = docker("network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Subnet}}").strip()
    return hub.url_for(str(next(ip_network(subnet).hosts())))  # this machine, on Docker's default network


@pytest.fixture
def volume() -> Iterator[str]:
    """An empty volume of one test's own."""
    name = f"hf-cache-test-{uuid.uuid4().hex[:8]}"
    docker("volume", "create", name)
    yield name
    docker("volume", "rm", "--force", name)
