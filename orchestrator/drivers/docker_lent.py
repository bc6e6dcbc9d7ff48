"""Somebody else's containers that we may take over: labelled so, and named as one of our models wants it.

Such a container goes on running under its own labels. An attempt id is made from its own id, so that it is
the same one after a restart of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from docker import APIClient
from docker.errors import APIError

from orchestrator.core.entities import AttemptId, DeviceId, ModelId
from orchestrator.drivers.docker_boxes import RUNNING, Row
from orchestrator.drivers.docker_spec import (
    ADOPT_LABEL,
    ATTEMPT_LABEL,
    MODEL_LABEL,
    OWNER_LABEL,
    PORT_LABEL,
)

Named = Callable[[], Mapping[str, tuple[ModelId, int]]]
"""The fixed container names of the catalogue: each with its model, and the port it listens on."""

_NO_GPU = ("", "void", "none")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which attempt it counts as, in the labels that one of ours would have; and its GPUs, None for all."""

    labels: Mapping[str, str]
    gpus: tuple[DeviceId, ...] | None


class Lent:
    """Blocking. The engine's errors come through as they are. `ensure_network` makes the models' network."""

    def __init__(
        self, client: APIClient, network: str, ensure_network: Callable[[], None], named: Named
    ) -> None:
        self._client = client
        self._network = network
        self._ensure_network = ensure_network
        self._named = named

    def rows(self, labels: Iterable[str]) -> list[Row]:
        """Those that run and can be reached; `labels` (`name=value`) choose among them as among ours."""
        named = self._named()
        if not named:
            return []
        listed = self._client.containers(filters={"label": f"{ADOPT_LABEL}=true", "status": list(RUNNING)})
        rows = []
        for item in listed:
            model = next((named[n][0] for n in map(_bare, item["Names"] or ()) if n in named), None)
            if model is None or OWNER_LABEL in item["Labels"]:
                continue
            row = Row(item["Id"], _attempt_of(item["Id"]), model, True, False, item["Created"], is_lent=True)
            shown = {f"{ATTEMPT_LABEL}={row.attempt}", f"{MODEL_LABEL}={model}"}
            if shown.issuperset(labels) and self._joins(item):
                rows.append(row)
        return rows

    def identity(self, found: Mapping[str, Any]) -> Identity | None:
        """None for one that is not lent."""
        labels = found["Config"]["Labels"] or {}
        model, port = self._named().get(_bare(found["Name"]), ("", 0))
        if not model or labels.get(ADOPT_LABEL) != "true" or OWNER_LABEL in labels:
            return None
        attempt = _attempt_of(found["Id"])
        ours = {ATTEMPT_LABEL: attempt, MODEL_LABEL: model, PORT_LABEL: str(port)}
        return Identity(ours, _gpus_of(found))

    def _joins(self, item: Mapping[str, Any]) -> bool:
        """Whether it is on the models' network, where it can be reached; it is put there if it is not.

        One that shares the host's network cannot be: it stays a stranger.
        """
        if self._network in item["NetworkSettings"]["Networks"]:
            return True
        self._ensure_network()
        with suppress(APIError):
            self._client.connect_container_to_network(item["Id"], self._network)
            return True
        return False


def _bare(name: str) -> str:
    return name.lstrip("/")


def _attempt_of(container: str) -> AttemptId:
    return f"lent-{container[:12]}"


def _gpus_of(found: Mapping[str, Any]) -> tuple[DeviceId, ...] | None:
    """By UUID; None where it has all, or where it cannot be told which."""
    config = found["HostConfig"]
    ids = [name for request in config.get("DeviceRequests") or () for name in request.get("DeviceIDs") or ()]
    listed = [line for line in found["Config"]["Env"] or () if line.startswith("NVIDIA_VISIBLE_DEVICES=")]
    if not ids and listed:
        ids = [name for name in listed[-1].split("=", 1)[1].split(",") if name not in _NO_GPU]
    if not ids:
        plain = any("nvidia" in device["PathOnHost"] for device in config.get("Devices") or ())
        return None if plain or config.get("DeviceRequests") else ()
    uuids = [name.removeprefix("nvidia.com/gpu=") for name in ids]
    return tuple(uuids) if all(name.startswith(("GPU-", "MIG-")) for name in uuids) else None
