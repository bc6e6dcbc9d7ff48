"""Each kind of engine, opened for one test; what it started is ended afterwards. And simulated GPUs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.drivers.engines import World, docker_world, opened, process_world
from tests.nvml.build import preload
from tests.nvml.simulated import SimulatedGpus

TWO_GPUS = [("Simulated RTX 3090", 24576, 400), ("Simulated RTX 3060", 12288, 300)]


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimulatedGpus:
    """Two GPUs that the pynvml of this very process finds."""
    gpus = SimulatedGpus.create(tmp_path / "gpus", TWO_GPUS)
    preload(gpus.library)
    monkeypatch.setenv("SIMULATED_NVML_DIR", str(gpus.root))
    return gpus


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with opened(process_world(tmp_path) if request.param == "process" else docker_world()) as world:
        yield world


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(process_world(tmp_path)) as world:
        yield world


@pytest.fixture
async def containers() -> AsyncIterator[World]:
    async with opened(docker_world()) as world:
        yield world
