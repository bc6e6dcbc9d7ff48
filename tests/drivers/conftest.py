"""Each kind of engine, opened for one test; what it started is ended afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.drivers.engines import World, docker_world, opened, process_world


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
