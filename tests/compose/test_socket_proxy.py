"""Between the orchestrator and the engine's socket: what it needs passes, and nothing else does."""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from docker.errors import NotFound

from orchestrator.control.ports import StartOrder
from orchestrator.core.entities import Device, DeviceKind, Launch
from orchestrator.drivers.docker import DockerEngine
from orchestrator.drivers.docker_gpu import GpuPart
from orchestrator.drivers.docker_spec import ADOPT_LABEL, OWNER_LABEL, container_body
from tests.compose.haproxy import Proxy, socket_proxy
from tests.drivers import test_engine_contract as contract
from tests.drivers.engines import World, docker_client, opened
from tests.images.build import build_mimic
from tests.support import eventually

pytestmark = pytest.mark.docker

IMAGE = "orchestrator-test/no-such-image:1"  # so that a body which passes makes nothing
GPU = Device("GPU-1", 0, "", DeviceKind.GPU, 1)
FOLLOWERS = 8


@pytest.fixture(scope="module")
def network() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, network: str) -> Iterator[Proxy]:
    with socket_proxy(tmp_path_factory.mktemp("haproxy"), network) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def http(proxy: Proxy) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=proxy.url.replace("tcp", "http"), timeout=20, trust_env=False) as http:
        yield http


@pytest.fixture
async def world(proxy: Proxy, network: str) -> AsyncIterator[World]:
    async with opened(world_behind(proxy, network)) as world:
        yield world


def world_behind(proxy: Proxy, network: str) -> World:
    launch = Launch("mimic", image=build_mimic())
    return World(lambda owner: DockerEngine(owner, network, "none", proxy.url), launch)


# --- what passes


@pytest.mark.parametrize(
    "claim",
    [
        contract.test_a_restarted_engine_adopts_what_runs_and_sees_its_exit,
        contract.test_a_log_is_read_from_its_tail_and_followed_to_its_end,
        contract.test_what_is_deaf_is_killed_after_the_grace,
        contract.test_an_ended_attempt_is_discarded_a_running_one_is_not,
        contract.test_a_missing_image_fails_with_the_command_that_gets_it,
        contract.test_a_fixed_name_is_taken_over_from_our_ended_containers_only,
        contract.test_a_pruned_network_is_made_again,
        contract.test_a_strangers_container_has_a_name_and_is_left_alone,
    ],
    ids=lambda claim: claim.__name__.removeprefix("test_"),
)
async def test_the_engines_contract_holds_through_it(
    world: World, claim: Callable[[World], Awaitable[None]]
) -> None:
    """With `pytest tests/drivers` this is the whole contract; here one claim for each kind of call."""
    await claim(world)


async def test_a_lent_container_is_taken_over_through_it(proxy: Proxy, network: str) -> None:
    name = f"lent-{uuid.uuid4().hex[:12]}"
    with docker_client() as client:
        lent = client.containers.run(build_mimic(), name=name, labels={ADOPT_LABEL: "true"}, detach=True)
        try:
            named = {name: ("model", 8000)}
            world = World(
                lambda owner: DockerEngine(owner, network, "none", proxy.url, named=lambda: named),
                Launch("mimic", image=build_mimic()),
            )
            async with opened(world):
                [found] = await (await world.open()).list()
                assert found.attempt == f"lent-{lent.id[:12]}"
                lent.reload()
                assert network in lent.attrs["NetworkSettings"]["Networks"]
        finally:
            with contextlib.suppress(NotFound):
                lent.remove(force=True)


async def test_followers_that_leave_leave_no_connection_to_the_engine(network: str, tmp_path: Path) -> None:
    with socket_proxy(tmp_path, network) as proxy:
        async with opened(world_behind(proxy, network)) as world:
            engine = await world.open()
            found = await contract.start_healthy(engine, world.order())
            streams = [engine.logs("model", found.attempt, tail=1, follow=True) for _ in range(FOLLOWERS)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            following = proxy.open_sockets()
            for stream in streams:
                with contextlib.suppress(StopAsyncIteration):
                    await stream.aclose()  # type: ignore[attr-defined]
            # Both sides of each, but for what other calls have opened meanwhile.
            await asyncio.to_thread(
                eventually, lambda: proxy.open_sockets() < following - 2 * FOLLOWERS + FOLLOWERS // 2
            )


# --- what does not


REFUSED = [
    ("GET", "/containers/x/top"),
    ("GET", "/containers/x/archive?path=/"),
    ("GET", "/containers/x/export"),
    ("PUT", "/containers/x/archive?path=/"),
    ("POST", "/containers/x/exec"),
    ("POST", "/containers/x/attach"),
    ("POST", "/containers/x/update"),
    ("POST", "/containers/x/restart"),
    ("POST", "/containers/prune"),
    ("POST", "/exec/x/start"),
    ("POST", "/build"),
    ("POST", "/commit?container=x"),
    ("POST", "/images/load"),
    ("POST", "/images/x/push"),
    ("POST", "/images/x/tag?repo=y"),
    ("DELETE", "/images/x"),
    ("GET", "/images/%2E%2E/containers/json"),
    ("GET", "/images/x/get"),
    ("POST", "/images/create?fromSrc=http%3A%2F%2Fexample.org%2Fx.tar"),
    ("POST", "/networks/bridge/connect"),
    ("POST", "/networks/x/disconnect"),
    ("POST", "/networks/prune"),
    ("GET", "/volumes"),
    ("POST", "/volumes/create"),
    ("DELETE", "/volumes/x"),
    ("GET", "/secrets"),
    ("GET", "/configs"),
    ("GET", "/swarm"),
    ("POST", "/swarm/init"),
    ("GET", "/plugins"),
    ("POST", "/session"),
    ("POST", "/grpc"),
    ("GET", "/system/df"),
    ("PUT", "/_ping"),
    ("GET", "/"),
    ("GET", "/containers%2Fjson"),
    ("GET", "//containers/json"),
    ("GET", "/v1.24/containers/json"),  # so old that a start may have a host configuration
    ("GET", "/v1.41/v1.41/containers/json"),
]


@pytest.mark.parametrize("version", ["", "/v1.41"])
@pytest.mark.parametrize(("method", "path"), REFUSED)
def test_other_calls_are_refused(http: httpx.Client, method: str, path: str, version: str) -> None:
    answer = http.request(method, version + path)
    assert answer.status_code == 403
    assert "socket proxy" in answer.json()["message"]


@pytest.mark.parametrize("path", ["/containers/x/start", "/containers/x/kill", "/images/create"])
def test_a_body_where_none_belongs_is_refused(http: httpx.Client, path: str) -> None:
    """Old engines took a host configuration with a start."""
    assert http.post(path, json={"Privileged": True}).status_code == 403
    assert http.post(path, content=iter([b'{"Privileged":true}'])).status_code == 403


def test_a_refusal_is_logged(http: httpx.Client, proxy: Proxy) -> None:
    http.post("/containers/logged/exec")
    eventually(lambda: "refused: POST /containers/logged/exec (403)" in proxy.log())
    http.get("/version")
    assert "version" not in proxy.log()


# --- containers that ask for more than models may have


def order() -> StartOrder:
    launch = Launch(
        "mimic",
        image=IMAGE,
        container_command=("serve", "--note", 'a "quoted": word'),
        container_environment={"NAME": "Grüße, ſtraße", "JSON": '{"Privileged": true, "PidMode": "host"}'},
        volumes={"hf-cache": "/data/.huggingface", "/srv/models": "/models"},
        read_only_volumes=frozenset({"hf-cache"}),
        mounts=(("/home/me/.cache/huggingface/hub", "/models"),),
        shm_bytes=1,
    )
    return StartOrder("attempt", "model", launch, (GPU,))


def body(network: str, gpu: GpuPart = GpuPart()) -> dict[str, Any]:
    return container_body(order(), IMAGE, "owner", network, gpu)


PLAIN = GpuPart(devices=("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"))
REQUEST = GpuPart(device_requests=({"DeviceIDs": ["GPU-1"], "Capabilities": [["gpu"]]},))
LIBRARY = GpuPart(
    binds=(("/usr/lib/x86_64-linux-gnu/libcuda.so.580.1", "/usr/local/nvidia/lib64/libcuda.so"),)
)


def create(http: httpx.Client, text: str) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return http.post("/v1.41/containers/create", content=text.encode(), headers=headers)


@pytest.mark.parametrize(
    "gpu", [GpuPart(), PLAIN, REQUEST, LIBRARY], ids=["none", "devices", "request", "libraries"]
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n\t", " :\n")])
@pytest.mark.parametrize("escapes", [True, False])
def test_what_the_driver_asks_for_passes(
    http: httpx.Client, network: str, gpu: GpuPart, separators: tuple[str, str], escapes: bool
) -> None:
    """The engine itself answers: it has no such image, or no such folder."""
    wanted = body(network, gpu)
    wanted["Env"] = [value for value in wanted["Env"] if "ſ" not in value]
    answer = create(http, json.dumps(wanted, separators=separators, ensure_ascii=escapes))
    assert answer.status_code in (400, 404), answer.text
    assert re.search("No such image|bind source path does not exist", answer.json()["message"])


def host(**more: Any) -> dict[str, Any]:
    return {"HostConfig": more}


def bind(source: str) -> dict[str, Any]:
    return host(Mounts=[{"Type": "bind", "Source": source, "Target": "/x"}])


DRIVEN = {"DriverConfig": {"Name": "local", "Options": {"type": "none", "o": "bind", "device": "/"}}}
DANGEROUS = [
    host(Privileged=True),
    host(privileged=True),
    host(PRIVILEGED=True),
    host(PidMode="host"),
    host(PidMode="container:x"),
    host(IpcMode="host"),
    host(UTSMode="host"),
    host(UsernsMode="host"),
    host(CgroupnsMode="host"),
    host(NetworkMode="host"),
    host(NetworkMode="bridge"),
    host(NetworkMode="container:x"),
    host(NetworkMode=None),
    host(networkmode="host"),
    {"NetworkingConfig": {"EndpointsConfig": {"host": {}}}},
    host(CapAdd=["SYS_ADMIN"]),
    host(CapAdd=["CHOWN", "SYS_PTRACE"]),
    host(CapAdd=["ALL"]),
    host(SecurityOpt=["no-new-privileges", "apparmor=unconfined"]),
    host(SecurityOpt=["seccomp=unconfined"]),
    host(Binds=["/:/host"]),
    host(VolumesFrom=["other"]),
    host(Devices=[{"PathOnHost": "/dev/sda", "PathInContainer": "/dev/sda", "CgroupPermissions": "rwm"}]),
    host(DeviceCgroupRules=["b *:* rwm"]),
    host(MaskedPaths=[]),
    host(Runtime="other"),
    host(PortBindings={"80/tcp": [{"HostPort": "80"}]}),
    host(RestartPolicy={"Name": "always"}),
    host(Mounts=[{"Type": "volume", "Source": "x", "Target": "/x", "VolumeOptions": DRIVEN}]),
    *map(
        bind, ["/", "//", "/etc", "/etc/shadow", "/var/run/docker.sock", "/run", "/var", "/var/run/", "/proc"]
    ),
    *map(
        bind, ["/root/.ssh", "/home", "/srv/..", "/srv/../etc", "/srv/./x", "/dev/sda", "/var/lib/docker/x"]
    ),
    {"Env": ["DOCKER_HOST=unix:///somewhere/docker.sock"]},
]


@pytest.mark.parametrize("more", DANGEROUS, ids=json.dumps)
@pytest.mark.parametrize("separators", [(",", ":"), (" , ", "\n:\t")])
def test_what_models_may_not_have_is_refused(
    http: httpx.Client, network: str, more: dict[str, Any], separators: tuple[str, str]
) -> None:
    assert_refused(http, json.dumps(merged(body(network), more), separators=separators))


def merged(wanted: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return {**wanted, **more, "HostConfig": {**wanted["HostConfig"], **more.get("HostConfig", {})}}


def assert_refused(http: httpx.Client, text: str) -> None:
    answer = create(http, text)
    assert answer.status_code == 403, answer.text
    assert "socket proxy refuses" in answer.json()["message"]


@pytest.mark.parametrize(
    "text",
    [
        r'"\u0050rivileged": true',
        r'"Pri\u0076ileged": true',
        '"Bind\u017f": ["/:/host"]',  # the engine takes a long s for an s, and the Kelvin sign for a k
        r'"Bind\u017F": ["/:/host"]',
        '"Networ\u212aMode": "host"',
        r'"Networ\u212AMode": "host"',
        r'"Mounts": [{"Type": "bind", "Source": "\/etc", "Target": "/x"}]',
        '"NetworkMode": "host"',  # the second of two keys counts
    ],
)
def test_what_is_written_otherwise_is_refused_too(http: httpx.Client, network: str, text: str) -> None:
    whole = json.dumps(body(network))
    wanted = whole.replace('"HostConfig": {', '"HostConfig": {' + text + ", ")
    assert text in wanted
    assert_refused(http, wanted)


def test_what_cannot_be_seen_whole_is_refused(http: httpx.Client, network: str) -> None:
    large = merged(body(network), {"Env": ["X=" + "x" * 300_000], **host(Privileged=True)})
    assert_refused(http, json.dumps(large))
    text = json.dumps(body(network)).encode()
    headers = {"Content-Type": "application/json"}
    answer = http.post("/v1.41/containers/create", content=iter([text]), headers=headers)
    assert answer.status_code == 403, "its length is not known before"


@pytest.mark.parametrize(
    "wanted",
    [
        {"Name": "x", "Driver": "host"},
        {"Name": "x", "Driver": "macvlan", "Options": {"parent": "eth0"}},
        {"Name": "x"},
        {"Name": "x", "Driver": "bridge", "driver": "macvlan"},
    ],
    ids=json.dumps,
)
def test_networks_other_than_bridges_are_refused(http: httpx.Client, wanted: dict[str, Any]) -> None:
    assert http.post("/networks/create", json=wanted).status_code == 403


CONTAINER = "0" * 64


@pytest.mark.parametrize("config", [{}, {"EndpointConfig": None}, {"EndpointConfig": {}}], ids=json.dumps)
def test_a_container_may_join_the_models_network(
    http: httpx.Client, network: str, config: dict[str, Any]
) -> None:
    """The engine itself answers: it has no such container."""
    answer = http.post(f"/v1.41/networks/{network}/connect", json={"Container": CONTAINER, **config})
    assert answer.status_code == 404, answer.text


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"Container": "caddy"},
        {"Container": CONTAINER, "EndpointConfig": {"Aliases": ["orchestrator"]}},
        {"Container": CONTAINER, "Force": True},
    ],
    ids=json.dumps,
)
def test_it_joins_as_it_is(http: httpx.Client, network: str, wanted: dict[str, Any]) -> None:
    """Under no name that would be taken for another's."""
    answer = http.post(f"/v1.41/networks/{network}/connect", json=wanted)
    assert answer.status_code == 403, answer.text
    assert http.post("/networks/other/connect", json={"Container": CONTAINER}).status_code == 403


def test_nothing_was_made_by_all_this() -> None:
    with docker_client() as client:
        assert not client.containers.list(all=True, filters={"label": f"{OWNER_LABEL}=owner"})
