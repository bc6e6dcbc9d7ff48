"""A start order as the engine's own words: pure translation, nothing is asked or done here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.control.ports import StartOrder
from orchestrator.core.entities import AttemptId, Launch, ModelId
from orchestrator.drivers.docker_gpu import GpuPart
from orchestrator.drivers.late_placeholders import filled

OWNER_LABEL = "ai.orchestrator.owner"
ATTEMPT_LABEL = "ai.orchestrator.attempt"
MODEL_LABEL = "ai.orchestrator.model"
SPEC_LABEL = "ai.orchestrator.spec"
PORT_LABEL = "ai.orchestrator.port"
# On a container of somebody else's: its name may be taken over, for which it is stopped and removed.
ADOPT_LABEL = "ai.orchestrator.adopt"

# Everything is dropped, then what images need that begin as root, put their volume's files right
# (CHOWN, DAC_OVERRIDE, FOWNER), step down to a user (SETUID, SETGID), and whose init must still be
# able to end that user's process (KILL). None goes beyond the engine's defaults.
_KEPT_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID")
_OPEN_FILES = 1_048_576  # engines from 29 on give 1024, too few for mapped shards and many streams
_LOG_OPTIONS = {"max-size": "10m", "max-file": "3"}
_NAME_LIMIT = 40


def container_name(order: StartOrder) -> str:
    """The launch's fixed name, or one that is the attempt's alone."""
    return order.launch.container_name or spare_name(order.model, order.attempt)


def previous_name(order: StartOrder) -> str:
    """Where the model's attempt before this one is kept, for its log."""
    return f"{order.launch.container_name or _slug(order.model)}-previous"


def spare_name(model: ModelId, attempt: AttemptId) -> str:
    """A name that nobody else has, nor will have."""
    return f"{_slug(model)}-{attempt[:8]}"


def container_body(
    order: StartOrder,
    image: str,
    owner: str,
    network: str,
    gpu: GpuPart = GpuPart(),
    *,
    raises_limits: bool = True,
) -> dict[str, Any]:
    """The body of the engine API's "create a container", version 1.41.

    `raises_limits` is for engines that may; a rootless one, or one in a container, may not.
    """
    launch = order.launch
    body: dict[str, Any] = {
        "Image": image,
        "Env": [f"{name}={value}" for name, value in _environment(order, gpu).items()],
        "HostConfig": _host_config(launch, network, gpu),
    }
    if raises_limits:
        body["HostConfig"]["Ulimits"] = [
            {"Name": "memlock", "Soft": -1, "Hard": -1},
            {"Name": "nofile", "Soft": _OPEN_FILES, "Hard": _OPEN_FILES},
        ]
    if launch.container_command is not None:
        body["Cmd"] = [filled(part, launch.port, order.gpus) for part in launch.container_command]
    labels = {
        OWNER_LABEL: owner,
        ATTEMPT_LABEL: order.attempt,
        MODEL_LABEL: order.model,
        SPEC_LABEL: spec_hash(body),
        PORT_LABEL: str(launch.port),
    }
    # Only now, so that the hash is the same for every attempt at the same thing.
    body["Env"].append(f"ORCHESTRATOR_ATTEMPT={order.attempt}")
    return body | {"Labels": labels}


def spec_hash(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def missing_image_help(image: str, service: str) -> str:
    """The command that gets an image: ours are built, all others pulled."""
    if is_built_here(image):
        return f"docker build -t {image} services/{service}"
    return f"docker pull {image}"


def is_built_here(image: str) -> bool:
    """Whether no registry may be asked: under this name a stranger could offer anything there."""
    return image.startswith("orchestrator/")


def _slug(model: ModelId) -> str:
    slug = re.sub(r"[^a-zA-Z0-9_.-]+", "-", model)[:_NAME_LIMIT].strip("-_.")
    return f"orchestrator-{slug or 'model'}"


def _environment(order: StartOrder, gpu: GpuPart) -> dict[str, str]:
    """The service's, then what decides where it listens and which GPUs it has."""
    launch = order.launch
    texts = launch.container_environment.items()
    wished = {name: filled(value, launch.port, order.gpus) for name, value in texts}
    return wished | {"HOST": "0.0.0.0", "PORT": str(launch.port)} | dict(gpu.environment)


def _host_config(launch: Launch, network: str, gpu: GpuPart) -> dict[str, Any]:
    config: dict[str, Any] = {
        "NetworkMode": network,
        # PID 1 ignores the signals it has no handler for, and few servers expect to be it.
        "Init": True,
        # Who runs is decided here: the engine must not bring a model back on its own.
        "RestartPolicy": {"Name": "no"},
        "SecurityOpt": ["no-new-privileges"],
        "CapDrop": ["ALL"],
        "CapAdd": list(_KEPT_CAPABILITIES),
        # Whatever the engine's default: a log that can be read back, and that cannot fill the disk.
        "LogConfig": {"Type": "json-file", "Config": dict(_LOG_OPTIONS)},
        "Mounts": _mounts(launch, gpu),
    }
    if launch.shm_bytes is not None:
        config["ShmSize"] = launch.shm_bytes
    if gpu.device_requests:
        config["DeviceRequests"] = [dict(request) for request in gpu.device_requests]
    if gpu.devices:
        config["Devices"] = [
            {"PathOnHost": path, "PathInContainer": path, "CgroupPermissions": "rwm"} for path in gpu.devices
        ]
    return config


def _mounts(launch: Launch, gpu: GpuPart) -> list[dict[str, Any]]:
    """As mounts, not binds: a bind would make a missing host folder, empty and root's."""
    mounts: list[dict[str, Any]] = [
        {
            "Type": "bind" if source.startswith("/") else "volume",
            "Source": source,
            "Target": target,
            "ReadOnly": source in launch.read_only_volumes,
        }
        for source, target in launch.volumes.items()
    ]
    mounts += [
        {"Type": "bind", "Source": source, "Target": target, "ReadOnly": True}
        for source, target in (*launch.mounts, *gpu.binds)
    ]
    return mounts
