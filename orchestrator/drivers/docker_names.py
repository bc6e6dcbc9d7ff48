"""Who may have which container name. Ours that have ended step aside; nobody else's is touched."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from docker import APIClient
from docker.errors import APIError, NotFound

from orchestrator.control.ports import StartOrder
from orchestrator.core.entities import AttemptId, ModelId
from orchestrator.core.errors import NameTaken
from orchestrator.drivers.docker_errors import CONFLICT
from orchestrator.drivers.docker_spec import (
    ADOPT_LABEL,
    ATTEMPT_LABEL,
    MODEL_LABEL,
    OWNER_LABEL,
    previous_name,
    spare_name,
)

NAME_TRIES = 50
_PAUSE_S = 0.1
_TAKE_OVER_GRACE_S = 10
_NEVER_STARTED = "created"


class Names:
    """Blocking. The engine's errors come through as they are, unless a method says otherwise."""

    def __init__(self, client: APIClient, owner: str) -> None:
        self._client = client
        self._owner = owner

    def make_way(self, order: StartOrder, name: str) -> str | None:
        """The name is taken: return the holder's id if it is this attempt's, else free it if we may.

        It may still be taken afterwards: an engine takes its time over a removal. Raises NameTaken.
        """
        holder = self._holder(name)
        if holder is None:
            time.sleep(_PAUSE_S)  # it is being removed, or was just now
            return None
        labels = _labels(holder)
        if labels.get(OWNER_LABEL) != self._owner:
            self._take_over(order, holder, name)
            return None
        if labels.get(ATTEMPT_LABEL) == order.attempt:
            return str(holder["Id"])
        if holder["State"]["Running"]:
            raise NameTaken(
                f"'{order.model}' needs the container name '{name}', which '{labels.get(MODEL_LABEL)}' has "
                f"and still runs under. Unload that, or `docker rm -f {name}`."
            )
        self._step_aside(holder, previous_name(order))
        return None

    def set_previous(self, container: str, order: StartOrder) -> None:
        """Give an ended container the name under which the order's model keeps its previous attempt."""
        holder = self._holder(container)
        wanted = previous_name(order)
        if holder is not None and holder["Name"].lstrip("/") != wanted:
            self._step_aside(holder, wanted)

    def _take_over(self, order: StartOrder, holder: Mapping[str, Any], name: str) -> None:
        """Somebody else's container goes if its label allows it. Raises NameTaken."""
        if _labels(holder).get(ADOPT_LABEL) == "true":
            self._client.stop(holder["Id"], timeout=_TAKE_OVER_GRACE_S)
            self.remove(holder["Id"], with_volumes=False)
            return
        needs = f"'{order.model}' needs the container name '{name}', which "
        if holder["State"]["Running"]:
            raise NameTaken(
                f"{needs}a running container has that is not ours. End and remove that one with "
                f"`docker rm -f {name}`, or change `container_name`. A container with the label "
                f"`{ADOPT_LABEL}=true` is stopped and replaced."
            )
        raise NameTaken(
            f"{needs}a container has that is not ours and does not run. Remove that one with "
            f"`docker rm {name}`, or change `container_name`."
        )

    def _step_aside(self, holder: Mapping[str, Any], wanted: str) -> None:
        """Free an ended container's name: its log stays under another one; without a log it is removed."""
        model, attempt = _model(holder), _attempt(holder)
        if holder["State"]["Status"] != _NEVER_STARTED:
            self._free(wanted, model)
            for name in (wanted, spare_name(model, attempt)):
                if self._rename(holder["Id"], name):
                    return
        # An engine that does not rename it is removing it already, or has failed to.
        if not self.remove(holder["Id"]):
            time.sleep(_PAUSE_S)

    def _free(self, name: str, model: ModelId) -> None:
        """Nobody's log but this model's is dropped for a name."""
        holder = self._holder(name)
        if holder is None or _labels(holder).get(OWNER_LABEL) != self._owner or holder["State"]["Running"]:
            return
        if _model(holder) == model:
            self.remove(holder["Id"])
        else:
            self._rename(holder["Id"], spare_name(_model(holder), _attempt(holder)))

    def _holder(self, name: str) -> Mapping[str, Any] | None:
        try:
            holder: Mapping[str, Any] = self._client.inspect_container(name)
        except NotFound:
            return None
        return holder

    def _rename(self, container: str, name: str) -> bool:
        """Whether its name is free now: renamed, or gone."""
        try:
            self._client.rename(container, name)
        except NotFound:
            return True
        except APIError:
            return False
        return True

    def remove(self, container: str, *, force: bool = False, with_volumes: bool = True) -> bool:
        """Remove it with its unnamed volumes; one that runs is left alone unless forced.

        False where it is still there: it runs, or is being removed by somebody.
        """
        try:
            self._client.remove_container(container, v=with_volumes, force=force)
        except NotFound:
            return True
        except APIError as error:
            if error.status_code != CONFLICT:
                raise
            return False
        return True


def _labels(holder: Mapping[str, Any]) -> Mapping[str, str]:
    return holder["Config"]["Labels"] or {}


def _model(holder: Mapping[str, Any]) -> ModelId:
    return _labels(holder).get(MODEL_LABEL, "")


def _attempt(holder: Mapping[str, Any]) -> AttemptId:
    return _labels(holder).get(ATTEMPT_LABEL, "")
