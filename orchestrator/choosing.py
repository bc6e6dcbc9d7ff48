"""Which engine and which devices: what was asked for, what is there, what was chosen first."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import docker

from orchestrator.core.errors import DeviceError
from orchestrator.drivers.nvml import NvmlDevices
from orchestrator.settings import Settings

PING_S = 3


@dataclass(frozen=True, slots=True)
class Choice:
    """`engine` is docker or process, `devices` nvml or host; `reasons` are sentences for the log."""

    engine: str
    devices: str
    reasons: tuple[str, ...]


def choose(settings: Settings, stored: tuple[str, str] | None) -> Choice:
    """What is named counts; what `auto` chose once stays: a missing engine is never silently replaced."""
    first_engine, first_devices = stored or (None, None)
    engine, engine_why = pick(settings.engine, first_engine, find_engine)
    devices, devices_why = pick(settings.devices, first_devices, lambda: find_devices(engine))
    return Choice(engine, devices, (f"engine: {engine}, {engine_why}", f"devices: {devices}, {devices_why}"))


def pick(named: str, stored: str | None, find: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """A choice and why; only what nobody has named or chosen before is looked for."""
    if named != "auto":
        return named, "as the settings say"
    if stored is not None:
        return stored, "as it was chosen at the first start"
    found, why = find()
    return found, f"because {why}"


def find_engine() -> tuple[str, str]:
    return ("docker", "its socket answers") if docker_answers() else ("process", "no Docker engine answers")


def find_devices(engine: str) -> tuple[str, str]:
    if engine == "process":
        return "host", "host processes share the RAM unless told otherwise"
    problem = nvml_problem()
    return ("nvml", "NVML answers") if problem is None else ("host", f"NVML does not answer ({problem})")


def nvml_problem() -> str | None:
    """None if NVML initialises and lists a GPU, else why not."""
    try:
        return None if find_gpus() else "it lists no GPU"
    except DeviceError as error:
        return error.message


def unused_gpus(named: str, chosen: str) -> list[str]:
    """GPUs that are here although the RAM alone is managed, which nobody asked for by name."""
    if named != "auto" or chosen != "host":
        return []
    try:
        return find_gpus()
    except DeviceError:
        return []


def find_gpus() -> list[str]:
    """Names of the GPUs that NVML lists. Raises DeviceError."""
    probe = NvmlDevices(headroom_bytes=0)
    try:
        return [device.label for device in probe.open()]
    finally:
        probe.close()


def docker_answers() -> bool:
    return docker_version()[1] is None


def docker_version() -> tuple[str, str | None]:
    """The version of the engine at its usual socket, or at DOCKER_HOST; or why it does not answer."""
    try:
        client = docker.from_env(timeout=PING_S)
        try:
            return str(client.version().get("Version", "")), None
        finally:
            client.close()
    except (docker.errors.DockerException, OSError) as error:
        where = os.environ.get("DOCKER_HOST") or "/var/run/docker.sock"
        return "", f"no Docker engine answers at {where}: {root_of(error)}"


def root_of(error: BaseException) -> str:
    """The operating system's own word for it, which libraries wrap three times."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0][:200]
