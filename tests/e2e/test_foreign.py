"""A container of somebody else that holds GPU memory: told by its name, counted, and never touched."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.models.containers import Container

from tests.crash.engine_proxy import EngineProxy
from tests.e2e.conftest import docker_client
from tests.e2e.world import SIMULATED, USABLE_MIB, Engine, House, World, mimic, open_house, open_world, until
from tests.nvml.simulated import SimulatedGpus

GIB = 1024
MAIN_MIB, CHILD_MIB = 12 * GIB, 288
THEIRS_MIB = MAIN_MIB + CHILD_MIB
MODELS = {"small": mimic(4 * GIB), "large": mimic(16 * GIB)}
pytestmark = pytest.mark.docker


@contextmanager
def started_by_a_person(image: str, gpus: SimulatedGpus) -> Iterator[Container]:
    """Without a label of ours, on Docker's own network; the second process is like a worker of the first."""
    environment = {"NVIDIA_VISIBLE_DEVICES": gpus.uuids[0], "SIMULATED_NVML_DIR": SIMULATED}
    worker = environment | {"MIMIC_MIB": str(CHILD_MIB), "MIMIC_HOLD_ONLY": "1"}
    options: dict[str, Any] = {"volumes": {str(gpus.root): {"bind": SIMULATED, "mode": "rw"}}, "init": True}
    with contextlib.closing(docker_client()) as client:
        name = f"comfyui-{uuid.uuid4().hex[:8]}"
        environment["MIMIC_MIB"] = str(MAIN_MIB)
        container = client.containers.run(image, name=name, environment=environment, detach=True, **options)
        try:
            container.exec_run(["python3", "-S", "-E", "/mimic.py"], environment=worker, detach=True)
            container.reload()
            yield container
        finally:
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True)


@pytest.fixture
def theirs(house: House, mimic_image: str) -> Iterator[Container]:
    with started_by_a_person(mimic_image, house.gpus) as container:
        yield container


def life(container: Container) -> tuple[str, int, str]:
    """The same as long as nobody has stopped, killed or restarted it."""
    container.reload()
    state = container.attrs["State"]
    return container.status, state["Pid"], state["StartedAt"]


async def seen(world: World, container: Container, name: str | None) -> list[dict[str, Any]]:
    """Its processes, once the server shows both of them under this name."""

    async def there() -> list[dict[str, Any]]:
        found = [dict(p) for p in (await world.device())["foreign"]]
        told = [(p["container"], p["container_name"]) for p in found]
        return found if told == [(container.id, name)] * 2 else []

    return await until(there, what=f"two processes in {name or container.id} should be shown")


def named_by(engine: str, container: Container) -> str | None:
    """Only an engine of containers knows their names."""
    return str(container.name) if engine == "docker" else None


async def test_its_name_is_told_and_it_is_left_alone(world: World, theirs: Container) -> None:
    before = await asyncio.to_thread(life, theirs)
    name = named_by(world.engine, theirs)
    processes = await seen(world, theirs, name)
    assert sorted(p["used_mib"] for p in processes) == [CHILD_MIB, MAIN_MIB]
    assert {p["pid"]: p["used_mib"] for p in processes} == world.gpus.processes(0)
    who = name or f"2 processes in {(theirs.id or '')[:12]}"

    answer = await world.chat("large")
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert f"held by {who} {THEIRS_MIB} MiB (container, not ours). " in error["message"]
    assert error["available_mib"] == USABLE_MIB - THEIRS_MIB
    holder = {"holder": who, "held_mib": THEIRS_MIB, "why_kept": "container, not ours"}
    assert error["holders"] == [holder]
    planned = (await world.post("/plan", load="large")).json()
    assert planned["refusal"]["holders"] == [holder]
    shown = (await asyncio.to_thread(world.server.run, "ps")).stdout
    assert f"· not ours on GPU 0: {name} (container)" in shown or f"in container {theirs.short_id}" in shown
    assert f"{THEIRS_MIB} MiB" in shown
    doctor = (await asyncio.to_thread(world.server.run, "doctor")).stdout
    assert f"{who} {THEIRS_MIB} MiB" in " ".join(doctor.split())

    await world.load("small", pin=True)
    await world.unload("small", force=True)
    world.server.kill()
    world.server.restart()
    await seen(world, theirs, name)
    assert await asyncio.to_thread(life, theirs) == before
    assert sum(world.gpus.processes(0).values()) == THEIRS_MIB


async def test_when_it_is_gone_its_room_and_its_name_go_with_it(world: World, theirs: Container) -> None:
    await seen(world, theirs, named_by(world.engine, theirs))
    await asyncio.to_thread(theirs.remove, force=True)
    await world.wait_served("large")
    assert (await world.device())["foreign"] == []
    world.seen.one_run("large")


@pytest.fixture
async def proxied(
    mimic_image: str, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[World, EngineProxy]]:
    """A world whose server reaches the engine through the proxy only."""
    with EngineProxy(tmp_path / "engine.sock") as proxy:
        monkeypatch.setenv("DOCKER_HOST", proxy.url)
        with open_house(tmp_path, Engine("docker", mimic_image, network), MODELS) as house:
            monkeypatch.delenv("DOCKER_HOST")
            async with open_world(house) as world:
                try:
                    yield world, proxy
                finally:
                    proxy.clear()


async def test_while_the_engine_does_not_tell_its_name_everything_else_goes_on(
    proxied: tuple[World, EngineProxy], mimic_image: str
) -> None:
    world, proxy = proxied
    hung = proxy.hold_requests(r"^GET /containers/[0-9a-f]{64}/json")
    with started_by_a_person(mimic_image, world.gpus) as theirs:
        await asyncio.to_thread(hung.wait_hit)
        assert hung.hits == [f"GET /containers/{theirs.id}/json"]
        await seen(world, theirs, None)
        error = (await world.chat("large")).json()["error"]
        assert f"2 processes in {(theirs.id or '')[:12]} {THEIRS_MIB} MiB" in error["message"]
        assert len(hung.hits) == 1, "one question at a time"
        await asyncio.to_thread(theirs.rename, f"{theirs.name}-renamed")
        hung.end()
        await asyncio.to_thread(theirs.reload)
        await seen(world, theirs, str(theirs.name))
        assert (await world.chat("small")).status_code == 200
