"""Volumes of containers, and which of them has the Hugging Face cache."""

from __future__ import annotations

import os
from collections.abc import Mapping

from orchestrator.catalogue.files import Inside
from orchestrator.catalogue.schema import ServiceEntry

HUB_NAME = "hf-cache"
"""What services call the volume with the Hugging Face cache, whatever its name is here."""
HUB_TARGET = "/data/.huggingface"
"""Where a container gets the volume with the Hugging Face cache if its service does not say."""


def hub_target(service: ServiceEntry, hub_volume: str | None) -> str | None:
    """Where a container of the service has the volume with HF_HOME; None if that is no volume."""
    if hub_volume is None:
        return None
    return _named(service.targets(), hub_volume).get(hub_volume, HUB_TARGET).rstrip("/")


def volumes_of(
    service: ServiceEntry, found: Inside, hub_volume: str | None
) -> tuple[dict[str, str], frozenset[str]]:
    """The service's volumes, and the one with the model's files; and which of them are read-only."""
    targets = _named(service.targets(), hub_volume)
    closed = {service.targets()[source] for source in service.read_only()}
    read_only = frozenset(source for source, target in targets.items() if target in closed)
    if hub_volume is not None and found.needs_hub and hub_volume not in targets:
        targets[hub_volume] = HUB_TARGET
        read_only |= {hub_volume}
    real = {_real(source): target for source, target in targets.items()}
    return real, frozenset(_real(source) for source in read_only)


def _named(targets: Mapping[str, str], hub_volume: str | None) -> dict[str, str]:
    """The volumes by the engine's names: the cache may have another one here."""
    if hub_volume is None or hub_volume in targets:
        return dict(targets)
    return {hub_volume if source == HUB_NAME else source: target for source, target in targets.items()}


def _real(source: str) -> str:
    """A bind mount by the folder that was checked, with no link left in it."""
    return os.path.realpath(source) if source.startswith("/") else source
