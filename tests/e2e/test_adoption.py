"""A container that a person started before, under the name that a model wants: taken over, never doubled."""

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from orchestrator.drivers.docker_spec import ADOPT_LABEL
from tests.e2e.conftest import docker_client
from tests.e2e.world import SIMULATED, Engine, mimic, open_house, open_world, until
from tests.nvml.simulated import SimulatedGpus

GIB = 1024
pytestmark = pytest.mark.docker


@pytest.fixture
def name() -> str:
    return f"llama-cpp-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def engine(mimic_image: str, network: str) -> Engine:
    return Engine("docker", mimic_image, network)


@contextmanager
def started_by_a_person(name: str, engine: Engine, gpus: SimulatedGpus, mib: int) -> Iterator[Container]:
    """`docker run` as somebody types it: on Docker's own network, and with the label that lends it."""
    environment = {"MIMIC_MIB": str(mib), "MIMIC_NAME": "theirs", "SIMULATED_NVML_DIR": SIMULATED}
    command: dict[str, Any] = {
        "name": name,
        "labels": {ADOPT_LABEL: "true"},
        "environment": environment | {"NVIDIA_VISIBLE_DEVICES": gpus.uuids[0]},
        "volumes": {str(gpus.root): {"bind": SIMULATED, "mode": "rw"}},
        "init": True,
        "detach": True,
    }
    with contextlib.closing(docker_client()) as client:
        container = client.containers.run(engine.image, **command)
        try:
            yield container
        finally:
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True)


async def test_what_runs_under_the_models_name_is_taken_over_then_replaced(
    tmp_path: Path, engine: Engine, name: str
) -> None:
    models = {"qwen": mimic(16 * GIB, container_name=name)}
    with (
        open_house(tmp_path, engine, models, starts=False) as house,
        started_by_a_person(name, engine, house.gpus, 16 * GIB) as theirs,
    ):
        await until(lambda: house.gpus.used_mib(0) == 16 * GIB, what="it should take its memory")
        house.server.start()
        async with open_world(house) as world:
            view = await world.wait_state("qwen", "ready")
            assert view["instance"]["attempt"].endswith(theirs.id[:12])
            assert (await world.chat("qwen")).status_code == 200
            assert (await world.device())["foreign_mib"] == 0, "its memory is the model's now"

            world.server.kill()
            world.server.restart()
            await world.wait_state("qwen", "ready")
            await asyncio.to_thread(theirs.reload)
            assert theirs.status == "running"

            assert (await world.unload("qwen"))["freed_mib"] == 16 * GIB
            await asyncio.to_thread(theirs.reload)
            assert theirs.status == "exited", "stopped, and left to its owner"

            await world.load("qwen")
            assert house.gpus.used_mib(0) == 16 * GIB
            with contextlib.closing(docker_client()) as client:
                [one] = await asyncio.to_thread(client.containers.list, filters={"name": name})
            assert one.id != theirs.id, "the next start takes its place"


async def test_it_is_evicted_for_another_model_like_any(tmp_path: Path, engine: Engine, name: str) -> None:
    models = {"qwen": mimic(16 * GIB, container_name=name), "other": mimic(12 * GIB)}
    with (
        open_house(tmp_path, engine, models, starts=False) as house,
        started_by_a_person(name, engine, house.gpus, 16 * GIB) as theirs,
    ):
        await until(lambda: house.gpus.used_mib(0) == 16 * GIB, what="it should take its memory")
        house.server.start()
        async with open_world(house) as world:
            assert (await world.chat("other")).status_code == 200
            await asyncio.to_thread(theirs.reload)
            assert theirs.status == "exited"
            assert house.gpus.used_mib(0) == 12 * GIB
