"""Which GPUs must not be used: what their driver reports (XID), and what it wants done about it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml
import structlog

from orchestrator.core.entities import DeviceId
from orchestrator.core.health import Blame, Incident
from orchestrator.drivers.nvml_errors import NVML_ERRORS
from orchestrator.drivers.nvml_xid import action_in_words, incident_of, works_meanwhile

FELL_OFF_THE_BUS = 79
MOST_AT_ONCE = 64
"""Reports taken in one go: a card that fails in a loop must not keep the monitor."""

_WANTED = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeGpuRecoveryAction
_ACTION = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
_BY_HAND = "stop the server, reset the GPU or reboot the machine, and start the server again"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a GPU must not be used. `is_fatal`: what runs there is lost too."""

    why: str
    is_fatal: bool


class HealthWatch:
    """Listens to the driver without waiting, from the thread that owns NVML.

    The driver's recovery action decides where it tells one. Older drivers do not: there an XID that NVIDIA
    blames on the GPU counts until this server is started again, as the GPU cannot be reset before. That a
    GPU fell off the bus is seen by its memory, and so is its return.
    """

    def __init__(self) -> None:
        self._events: Any = None
        self._by_pointer: dict[int, tuple[DeviceId, Any]] = {}
        self._actions: dict[DeviceId, int | None] = {}  # None: the driver does not tell
        self._broken: dict[DeviceId, Incident] = {}
        self._unheard: dict[DeviceId, str] = {}  # why one reports no events

    def open(self, handles: Mapping[DeviceId, Any]) -> None:
        """Listen to these GPUs, after NVML was initialised. What cannot be listened to is done without."""
        self.close()
        self._by_pointer = {_pointer(handle): (uuid, handle) for uuid, handle in handles.items() if handle}
        for uuid, handle in self._by_pointer.values():
            self.look(uuid, handle)
        try:
            self._events = pynvml.nvmlEventSetCreate()
        except NVML_ERRORS as error:
            log.info("NVML reports no events here", reason=str(error))
            return
        for uuid, handle in self._by_pointer.values():
            try:
                pynvml.nvmlDeviceRegisterEvents(handle, _supported(handle), self._events)
            except NVML_ERRORS as error:
                # Each initialisation asks again, and those of a lost GPU are many.
                if self._unheard.get(uuid) != str(error):
                    log.info("a GPU reports no events", gpu=uuid, reason=str(error))
                self._unheard[uuid] = str(error)

    def close(self) -> None:
        """Before NVML is shut down."""
        events, self._events = self._events, None
        if events is not None:
            with suppress(*NVML_ERRORS):
                pynvml.nvmlEventSetFree(events)

    def hear(self) -> tuple[Incident, ...]:
        """What was reported since the last call; never waits."""
        heard = []
        for _ in range(MOST_AT_ONCE if self._events is not None else 0):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except NVML_ERRORS:  # a time-out says that there is nothing; anything else, memory tells
                break
            uuid, handle = self._by_pointer.get(_pointer(event.device), (None, None))
            if uuid is None:
                continue
            self.look(uuid, handle)
            if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                heard.append(self._remember(incident_of(uuid, event.eventData)))
        return tuple(heard)

    def look(self, uuid: DeviceId, handle: Any) -> None:
        """Ask what the driver wants done about the GPU."""
        try:
            (field,) = pynvml.nvmlDeviceGetFieldValues(handle, [_ACTION])
        except NVML_ERRORS:  # what it wanted before still counts
            return
        if field.nvmlReturn == pynvml.NVML_SUCCESS:
            self._actions[uuid] = field.value.uiVal

    def trouble(self, uuid: DeviceId) -> Trouble | None:
        action, incident = self._actions.get(uuid), self._broken.get(uuid)
        if action is not None:
            words = action_in_words(action)
            because = f" after {incident.text}" if incident else ""
            return Trouble(f"{words}{because}", not works_meanwhile(action)) if words else None
        return Trouble(f"{incident.text}; {_BY_HAND}", True) if incident else None

    def _remember(self, incident: Incident) -> Incident:
        if incident.blame is Blame.GPU and incident.code != FELL_OFF_THE_BUS:
            self._broken[incident.device] = incident
        return incident


def _supported(handle: Any) -> int:
    """Those of the wanted kinds that the GPU knows: it refuses all if one is strange to it."""
    known: int = pynvml.nvmlDeviceGetSupportedEventTypes(handle)
    return known & int(_WANTED)


def _pointer(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
