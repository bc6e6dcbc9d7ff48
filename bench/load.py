"""What loading through the orchestrator adds to the service's own start.

`POST /models/load` with `wait`, against starting the very same thing bare and asking its health path
every millisecond. What "the same" is, is copied from what the orchestrator itself has started: command and
environment of the process, or configuration of the container. The two are timed in turn.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import docker
from docker.errors import DockerException, NotFound

from bench.report import milliseconds, percentile, ratio, say, show
from bench.server import HOST, Catalogue, Server, serving
from tests.images.build import build_mimic
from tests.nvml.simulated import MIMIC

RUNS = 20
MODEL = "mimic"
NETWORK = "orchestrator-bench"
PROBE_EVERY_S = 0.001
LIMIT_S = 60.0
HEALTHY = b" 200 "
OUR_MARKS = "ORCHESTRATOR_"
LLAMA = Path(__file__).parents[1] / "services" / "llama-cpp" / "service.yaml"

Start = Callable[[], AbstractContextManager[float]]
"""Starts a service bare, gives the seconds until it was healthy, and ends it."""


@dataclass(frozen=True)
class Timed:
    """Seconds to ready, of each run: through the orchestrator, and bare."""

    name: str
    aim_s: float
    through: list[float]
    alone: list[float]

    def row(self) -> list[str]:
        through_s, alone_s = median(self.through), median(self.alone)
        added = [through - alone for through, alone in zip(self.through, self.alone, strict=True)]
        return [
            self.name,
            milliseconds(alone_s, 0),
            milliseconds(through_s, 0),
            milliseconds(through_s - alone_s, 0),
            milliseconds(min(self.through) - min(self.alone), 0),
            f"{milliseconds(percentile(added, 25), 0)} to {milliseconds(percentile(added, 75), 0)}",
            f"< {milliseconds(self.aim_s, 0)}",
            ratio(through_s, alone_s),
        ]


def compare(name: str, aim_s: float, server: Server, model: str, bare: Start) -> Timed:
    """Both once to warm up, then `RUNS` times in turn; only one of them runs at a time."""
    timed = Timed(name, aim_s, [], [])
    for run in range(-1, RUNS):
        through_s = server.load(model)
        server.unload(model)
        with bare() as alone_s:
            pass
        if run >= 0:
            timed.through.append(through_s)
            timed.alone.append(alone_s)
    return timed


# --- probing


def wait_healthy(host: str, port: int, begun_s: float, path: str = "/health") -> float:
    """Ask every millisecond until the answer is 200; returns the seconds since `begun_s`."""
    while time.perf_counter() < begun_s + LIMIT_S:
        asked_s = time.perf_counter()
        if is_healthy(host, port, path):
            return time.perf_counter() - begun_s
        time.sleep(max(0.0, asked_s + PROBE_EVERY_S - time.perf_counter()))
    raise RuntimeError(f"not healthy within {LIMIT_S:.0f} s when started bare")


def is_healthy(host: str, port: int, path: str) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            return HEALTHY in connection.recv(4096)[:16]
    except OSError:
        return False


# --- processes


def process_start(server: Server, model: str) -> Start:
    """A bare start of what the orchestrator runs for `model` now."""
    server.load(model)
    pid = model_pid(server.pid)
    command = [part.decode() for part in nul_separated(pid, "cmdline")]
    pairs = (part.decode().partition("=") for part in nul_separated(pid, "environ"))
    environment = {key: value for key, _, value in pairs if not key.startswith(OUR_MARKS)}
    server.unload(model)

    @contextmanager
    def start() -> Iterator[float]:
        port = free_port()
        begun_s = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=environment | {"PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield wait_healthy(HOST, port, begun_s)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(LIMIT_S)

    return start


def model_pid(server_pid: int) -> int:
    """The model's own process: the child of the shell that the engine wraps around it."""
    for wrapper in children(server_pid):
        for pid in children(wrapper):
            return pid
    raise RuntimeError("the orchestrator runs no process")


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def nul_separated(pid: int, name: str) -> list[bytes]:
    return [part for part in Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") if part]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


# --- containers


def container_start(server: Server, model: str, client: docker.DockerClient) -> Start:
    """A bare start of what the orchestrator runs for `model` now."""
    server.load(model)
    port = server.address(model)[1]
    found = client.containers.list(filters={"network": NETWORK})
    create: Callable[[Mapping[str, Any]], dict[str, str]] = client.api.create_container_from_config
    body = bare_body(client.api.inspect_container(str(found[0].id)))
    server.unload(model)

    @contextmanager
    def start() -> Iterator[float]:
        begun_s = time.perf_counter()
        created: str = create(body)["Id"]
        try:
            client.api.start(created)
            host = wait_for_address(client, created, begun_s)
            yield wait_healthy(host, port, begun_s)
        finally:
            client.api.stop(created, timeout=5)
            client.api.remove_container(created, force=True)

    return start


def bare_body(inspected: Mapping[str, Any]) -> dict[str, Any]:
    """The same container without our labels and marks: nobody takes it for one of the orchestrator's."""
    config = inspected["Config"]
    environment = [pair for pair in config["Env"] if not pair.startswith(OUR_MARKS)]
    kept = {"Image": config["Image"], "Env": environment, "HostConfig": inspected["HostConfig"]}
    return kept | {"Cmd": config["Cmd"]} if config.get("Cmd") else kept


def wait_for_address(client: docker.DockerClient, container: str, begun_s: float) -> str:
    while time.perf_counter() < begun_s + LIMIT_S:
        networks = client.api.inspect_container(container)["NetworkSettings"]["Networks"]
        address: str = networks[NETWORK]["IPAddress"]
        if address:
            return address
    raise RuntimeError("the container started bare got no address")


def answering_docker() -> docker.DockerClient | None:
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except (DockerException, OSError):
        return None
    return client


# --- what is compared


@contextmanager
def loading(services: Catalogue, models: Catalogue, engine: str) -> Iterator[Server]:
    settings = {
        "engine": engine,
        "devices": "host",
        "host_memory_mib": 1024,
        "docker_network": NETWORK,
        "stop_containers_on_exit": True,
    }
    with serving(services, models, settings) as server:
        yield server


def with_mimic_process() -> Timed:
    services = {"mimic": {"command": ["python", "-S", "-E", str(MIMIC)]}}
    with loading(services, {MODEL: {"service": "mimic", "memory": "64MiB"}}, "process") as server:
        return compare("process, mimic", 0.060, server, MODEL, process_start(server, MODEL))


def with_llama_process() -> Timed:
    import yaml

    services = {"llama-cpp": yaml.safe_load(LLAMA.read_text())}
    models = {"demo": {"service": "llama-cpp", "source": {"demo": 7}, "memory": "64MiB"}}
    with loading(services, models, "process") as server:
        return compare("process, llama.cpp demo", 0.060, server, "demo", process_start(server, "demo"))


def with_mimic_container(client: docker.DockerClient) -> Timed:
    services = {"mimic": {"image": build_mimic()}}
    models = {MODEL: {"service": "mimic", "memory": "64MiB"}}
    try:
        with loading(services, models, "docker") as server:
            return compare("Docker, mimic", 0.150, server, MODEL, container_start(server, MODEL, client))
    finally:
        remove_network(client)


def remove_network(client: docker.DockerClient) -> None:
    try:
        client.networks.get(NETWORK).remove()
    except NotFound:
        return


def main() -> None:
    say(f"load: {RUNS} runs each, about two minutes")
    timed = [with_mimic_process(), with_llama_process()]
    client = answering_docker()
    if client is None:
        say("SKIPPED: loading through Docker is not measured, because no Docker engine answers.")
    else:
        timed.append(with_mimic_container(client))
        client.close()
    show(
        "Load: POST /models/load until ready, against the bare start until healthy",
        ["service", "bare", "load", "added", "fastest's", "middle half", "aim", "ratio"],
        [one.row() for one in timed],
        [
            f"Medians of {RUNS} runs in turn; `fastest's`: the same of the two fastest runs, which is nearly "
            "free of noise; `middle half`: of what each run added to the one after it.",
            f"The bare start is asked for its health every {PROBE_EVERY_S * 1000:.0f} ms, which slows it a "
            "little. An added time far below zero is noise.",
        ],
    )


if __name__ == "__main__":
    main()
