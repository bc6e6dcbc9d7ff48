"""Engines with a place of their own, and what every test of them needs."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docker
import httpx
from docker.models.containers import Container

from orchestrator.control.ports import Engine, Exit, Found, StartOrder
from orchestrator.core.entities import Launch, Progress
from orchestrator.core.errors import EngineError
from orchestrator.drivers import docker_spec, process_tree
from orchestrator.drivers.docker import DockerEngine
from orchestrator.drivers.process import ProcessEngine
from tests.images.build import build_base, build_mimic
from tests.support import eventually

MIMIC = Path(__file__).parents[1] / "mimic" / "mimic.py"
WAIT_S = 20


@dataclass
class Exits:
    """What an engine has told: the first exit of each attempt, which tests wait for."""

    seen: dict[str, asyncio.Future[Exit]] = field(default_factory=dict)

    def __call__(self, attempt: str, ended: Exit) -> None:
        if not self._of(attempt).done():
            self._of(attempt).set_result(ended)

    async def of(self, attempt: str) -> Exit:
        return await asyncio.wait_for(asyncio.shield(self._of(attempt)), WAIT_S)

    def has(self, attempt: str) -> bool:
        return self._of(attempt).done()

    def _of(self, attempt: str) -> asyncio.Future[Exit]:
        return self.seen.setdefault(attempt, asyncio.get_running_loop().create_future())


class World:
    """A kind of engine with a place of its own. `restart` makes an engine that remembers nothing."""

    def __init__(self, make: Callable[[str], Engine], launch: Launch) -> None:
        self.owner = f"test-{uuid.uuid4().hex[:12]}"
        self.stranger = f"{self.owner}-stranger"
        self.launch = launch
        self.exits = Exits()
        self.engines: list[Engine] = []
        self._make = make

    async def open(self, owner: str | None = None, exits: Exits | None = None) -> Engine:
        engine = self._make(owner or self.owner)
        await engine.open(exits or self.exits)
        self.engines.append(engine)
        return engine

    async def restart(self, engine: Engine) -> Engine:
        await engine.close()
        self.exits = Exits()
        return await self.open()

    def order(self, model: str = "model", **settings: str) -> StartOrder:
        """An attempt at a mimic; `load_s="1"` becomes MIMIC_LOAD_S."""
        env = {f"MIMIC_{name.upper()}": value for name, value in settings.items()}
        launch = replace(self.launch, environment=env, container_environment=env)
        return StartOrder(uuid.uuid4().hex, model, launch)

    async def close(self) -> None:
        for engine in self.engines:
            with contextlib.suppress(EngineError, RuntimeError, TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    for found in await engine.list():
                        await engine.stop(found.attempt, 0)
                        await engine.discard(found.attempt)
            await engine.close()


def process_world(tmp_path: Path) -> World:
    command = ("python3", "-S", "-E", str(MIMIC))
    return World(lambda owner: ProcessEngine(tmp_path / "state", owner), Launch("mimic", command=command))


def docker_world() -> World:
    network = f"test-{uuid.uuid4().hex[:12]}"
    launch = Launch("mimic", image=build_mimic())
    return World(lambda owner: DockerEngine(owner, network, gpu_access="none"), launch)


@contextlib.asynccontextmanager
async def opened(world: World) -> AsyncIterator[World]:
    try:
        yield world
    finally:
        try:
            await world.close()
        finally:
            if world.launch.image:
                await asyncio.to_thread(remove_all, world.owner, world.stranger)


def remove_all(*owners: str) -> None:
    labels: list[dict[str, str | list[str] | bool]] = [
        {"label": f"{docker_spec.OWNER_LABEL}={owner}"} for owner in owners
    ]
    with docker_client() as client:
        for label in labels:
            for container in client.containers.list(all=True, filters=label, ignore_removed=True):
                container.remove(force=True, v=True)
        for label in labels:
            for network in client.networks.list(filters=label):
                network.remove()


@contextmanager
def docker_client() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    try:
        yield client
    finally:
        client.close()


@contextmanager
def strangers_container(world: World) -> Iterator[Container]:
    """One that runs without any label of ours, as somebody else has started it; named `world.stranger`."""
    with docker_client() as client:
        theirs = client.containers.run(world.launch.image or "", name=world.stranger, detach=True)
        try:
            theirs.reload()
            yield theirs
        finally:
            with contextlib.suppress(docker.errors.NotFound):
                theirs.remove(force=True)


def ignore(progress: Progress) -> None:
    pass


def url(found: Found) -> str:
    return f"http://{found.host}:{found.port}"


def answers(found: Found, path: str = "/health") -> bool:
    try:
        return httpx.get(url(found) + path, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


async def wait_healthy(found: Found) -> None:
    await asyncio.to_thread(eventually, lambda: answers(found), WAIT_S)


async def start_healthy(engine: Engine, order: StartOrder) -> Found:
    found = await engine.start(order, ignore)
    assert found.is_running, found
    await wait_healthy(found)
    return found


def die(found: Found, code: int) -> None:
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(url(found) + "/die", json={"code": code}, timeout=2, trust_env=False)


async def read_until(stream: AsyncIterator[bytes], text: bytes) -> bytes:
    data = b""
    async with asyncio.timeout(WAIT_S):
        while text not in data:
            data += await anext(stream)
    return data


async def read_all(stream: AsyncIterator[bytes]) -> bytes:
    async with asyncio.timeout(WAIT_S):
        return b"".join([chunk async for chunk in stream])


def lives(pid: int) -> bool:
    return process_tree.read_process(pid) is not None


def with_script(order: StartOrder, script: str) -> StartOrder:
    """The order with this Python to run in place of the mimic."""
    command = ("python3", "-S", "-c", script)
    image = order.launch.image and build_base()  # the mimic's own runs nothing else
    launch = replace(order.launch, image=image, command=command, container_command=command)
    return replace(order, launch=launch)


def descendants(root: int) -> list[int]:
    everyone = [p for pid in process_tree._pids() if (p := process_tree.read_process(pid))]
    ours = {root}
    while more := {p.pid for p in everyone if p.parent in ours} - ours:
        ours |= more
    return sorted(ours)


def create_only(world: World, order: StartOrder) -> str:
    """What a server leaves that is killed between the creation of a container and its start."""
    image = world.launch.image or ""
    body = docker_spec.container_body(order, image, world.owner, "bridge", raises_limits=False)
    with docker_client() as client:
        api: Any = client.api  # its stubs leave this call without types
        return str(api.create_container_from_config(body, docker_spec.container_name(order))["Id"])


def status_of(container: str) -> str | None:
    with docker_client() as client, contextlib.suppress(docker.errors.NotFound):
        return str(client.containers.get(container).status)
    return None
