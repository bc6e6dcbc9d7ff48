"""Which engine and which devices: what was asked for, what is there, what was chosen first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import docker

from orchestrator.core.entities import MIB
from orchestrator.core.errors import DeviceError
from orchestrator.drivers.host import HostDevice
from orchestrator.drivers.nvml import NvmlDevices
from orchestrator.settings import Settings

PING_S = 3


@dataclass(frozen=True, slots=True)
class Choice:
    """`engine` is docker or process, `devices` nvml or host; `reasons` are sentences for the log."""

    engine: str
    devices: str
    reasons: tuple[str, ...]


def choose(settings: Settings, stored: tuple[str, str] | None, *, docker_answers: bool) -> Choice:
    """What is named counts; what `auto` chose once stays: a missing engine is never silently replaced."""
    reasons: list[str] = []
    engine: str = settings.engine
    if engine == "auto" and stored is not None:
        engine = stored[0]
        reasons.append(f"engine: {engine}, as it was chosen at the first start")
    elif engine == "auto":
        engine = "docker" if docker_answers else "process"
        why = "its socket answers" if docker_answers else "no Docker engine answers"
        reasons.append(f"engine: {engine}, because {why}")
    else:
        reasons.append(f"engine: {engine}, as the settings say")
    devices: str = settings.devices
    if devices == "auto" and stored is not None:
        devices = stored[1]
        reasons.append(f"devices: {devices}, as it was chosen at the first start")
    elif devices == "auto":
        devices, why = find_devices(engine)
        reasons.append(f"devices: {devices}, because {why}")
    else:
        reasons.append(f"devices: {devices}, as the settings say")
    return Choice(engine, devices, tuple(reasons))


def find_devices(engine: str) -> tuple[str, str]:
    if engine == "process":
        return "host", "host processes share the RAM unless told otherwise"
    problem = nvml_problem()
    return ("nvml", "NVML answers") if problem is None else ("host", f"NVML does not answer ({problem})")


def nvml_problem() -> str | None:
    """None if NVML initialises and lists a GPU, else why not."""
    probe = NvmlDevices(headroom_bytes=0)
    try:
        found = probe.open()
    except DeviceError as error:
        return error.message
    finally:
        probe.close()
    return None if found else "it lists no GPU"


def ram_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise DeviceError("/proc/meminfo does not say how much RAM there is.")


def host_device(budget_bytes: int, engine: str) -> HostDevice:
    return HostDevice(budget_bytes, f"RAM for {engine} models")


def gpu_headroom_bytes(settings: Settings) -> int:
    return settings.headroom_mib * MIB


def docker_answers() -> bool:
    """True if a Docker engine answers at its usual socket, or at DOCKER_HOST."""
    try:
        client = docker.from_env(timeout=PING_S)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.DockerException, OSError):
        return False
    finally:
        client.close()
