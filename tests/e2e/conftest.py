"""Fixtures: every scenario runs once with host processes and once with containers.

A test module says what its server has in `MODELS` (by name), and where it must in `GPUS`, `SETTINGS` and
`SERVICES`. The server is shared by the tests of the module; each leaves the house empty.
"""

import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator

import docker
import pytest

from tests.e2e.world import Engine, House, World, open_house, open_world
from tests.images.build import build_mimic
from tests.nvml.simulated import DEFAULT_GPUS


def docker_client() -> docker.DockerClient:
    """Raises AssertionError without a Docker engine: these tests are never skipped."""
    try:
        client = docker.from_env(timeout=120)
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise AssertionError(
            f"these tests need a Docker engine and none answers ({error}); start one, or leave them out "
            "by name with -m 'not docker'"
        ) from error
    return client


@pytest.fixture(scope="session")
def network() -> Iterator[str]:
    """A network of this test run's own for the containers; the server makes it."""
    name = f"orchestrator-e2e-{uuid.uuid4().hex[:12]}"
    with contextlib.closing(docker_client()) as client:
        yield name
        for container in client.containers.list(all=True, ignore_removed=True, filters={"network": name}):
            container.remove(force=True)
        for made in client.networks.list(names=[name]):
            made.remove()


@pytest.fixture(scope="session")
def mimic_image(network: str) -> str:
    return build_mimic()


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "process":
        return Engine("process")
    image, network = request.getfixturevalue("mimic_image"), request.getfixturevalue("network")
    return Engine("docker", image, network)


@pytest.fixture(scope="module")
def house(
    request: pytest.FixtureRequest, engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    of_module = vars(request.module)
    with open_house(
        tmp_path_factory.mktemp(engine.name),
        engine,
        of_module["MODELS"],
        gpus=of_module.get("GPUS", DEFAULT_GPUS),
        settings=of_module.get("SETTINGS"),
        services=of_module.get("SERVICES"),
    ) as house:
        yield house


@pytest.fixture
async def world(house: House) -> AsyncIterator[World]:
    async with open_world(house) as world:
        yield world
