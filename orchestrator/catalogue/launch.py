"""How a model is started: its service, with the entry's values in place of the placeholders."""

from __future__ import annotations

import sys

from orchestrator.catalogue import files
from orchestrator.catalogue.placeholders import fill, fill_all
from orchestrator.catalogue.schema import ModelEntry, ServiceEntry
from orchestrator.catalogue.volumes import volumes_of
from orchestrator.core.entities import Launch


def launch_of(
    name: str,
    entry: ModelEntry,
    service: ServiceEntry,
    found: files.Found,
    inside: files.Inside,
    hub_volume: str | None,
) -> Launch:
    """Fill placeholders twice: with the host's paths for processes, the container's for containers.

    `{port}` is known inside a container and left for the engine elsewhere; so is `{tensor_split}`, as GPUs
    are chosen later. `container_environment` is
    all that a container gets, so an engine needs no merging.
    """
    values = values_of(name, entry, found)
    contained = {
        **values,
        "path": inside.path,
        "mmproj": inside.mmproj,
        "port": str(service.port),
    }
    both = {**service.environment, **entry.environment}
    container = {**service.environment, **service.container_environment, **entry.environment}
    volumes, read_only = volumes_of(service, inside, hub_volume)
    command = service.command
    if command and command[0] == "python":
        command = (sys.executable, *command[1:])
    return Launch(
        service=entry.service,
        image=service.image,
        command=tuple(fill(part, values) for part in command) if command else None,
        container_command=tuple(fill(part, contained) for part in service.container_command)
        if service.container_command
        else None,
        port=service.port,
        health_path=service.health.path,
        environment=fill_all(both, values),
        container_environment=fill_all(container, contained),
        volumes=volumes,
        read_only_volumes=read_only,
        mounts=inside.mounts,
        container_name=entry.container_name,
        shm_bytes=service.shm_size,
    )


def values_of(name: str, entry: ModelEntry, found: files.Found) -> dict[str, str]:
    """What stands for each placeholder, on the host."""
    return {
        "path": str(found.path or ""),
        "mmproj": str(found.mmproj or ""),
        "context_size": str(entry.context_size),
        "n_gpu_layers": str(entry.n_gpu_layers),
        "parallel": str(entry.parallel),
        "cache_type_k": entry.cache_type_k,
        "cache_type_v": entry.cache_type_v,
        "model": name,
        "served_name": entry.served_name or name,
    }
