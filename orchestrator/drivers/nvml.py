"""NVIDIA GPUs through NVML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

import pynvml
import structlog

from orchestrator.control.ports import Roots
from orchestrator.core.entities import (
    AttemptId,
    Device,
    DeviceId,
    DeviceKind,
    ForeignProcess,
    Reading,
    Sample,
)
from orchestrator.core.errors import DeviceError
from orchestrator.core.health import Telemetry
from orchestrator.drivers.nvml_errors import CANNOT, IS_BROKEN, NEEDS_INIT, NVML_ERRORS, code_of, reason_of
from orchestrator.drivers.nvml_health import HealthWatch
from orchestrator.drivers.nvml_owners import Owner, Owners
from orchestrator.drivers.nvml_telemetry import TelemetryReader

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
LIST_EVERY_S = 5.0
TELL_EVERY_S = 5.0
LIST_TRIES = 3

_COMPUTE, _GRAPHICS = "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Bytes. `reserved` is the driver's own share: no process can ever have it."""

    total: int
    reserved: int
    free: int
    used: int


@dataclass(frozen=True, slots=True)
class _Listed:
    """A reading with its processes, and what it was made of: while that is the same, so is the reading."""

    reading: Reading
    at_s: float
    memory: _Memory
    roots: Mapping[AttemptId, Roots]
    has_seen_processes: bool
    pids: frozenset[int]

    def still_holds(
        self, memory: _Memory, roots: Mapping[AttemptId, Roots], has_seen_processes: bool
    ) -> bool:
        return (memory, roots, has_seen_processes) == (self.memory, self.roots, self.has_seen_processes)


class NvmlDevices:
    """The machine's NVIDIA GPUs by UUID, `headroom_bytes` of each kept free.

    A GPU that cannot be read is an error, never zeros. Where NVML itself broke down, or a GPU was lost, it
    is initialised again and the GPUs are found by UUID, after 1 s at first, then ever more rarely up to once
    a minute; until then such GPUs stay errors. Where only the list of processes cannot be had, memory counts
    and belongs to nobody (`attributed` is False).

    Processes are listed where memory has moved or the attempts are others, else every `list_every_s`:
    listing takes the driver's lock for milliseconds, where memory takes microseconds.
    """

    name = "nvml"

    def __init__(self, headroom_bytes: int, *, list_every_s: float = LIST_EVERY_S) -> None:
        self._headroom_bytes = headroom_bytes
        self._list_every_s = list_every_s
        self._handles: dict[DeviceId, Any] = {}  # None: not found at the last initialisation
        self._why_missing: dict[DeviceId, int] = {}  # the error that it was not found with
        self._init_error: str | None = None
        self._retry_at_s: float | None = None
        self._retry_after_s = FIRST_RETRY_S
        self._owners = Owners()
        self._has_seen_processes = False
        self._hides_usage: set[DeviceId] = set()
        self._cannot_list: set[tuple[DeviceId, str]] = set()
        self._could_read = False  # any GPU, at the last sample
        self._lost: set[DeviceId] = set()  # until they can be read again, whatever else they say meanwhile
        self._listed: dict[DeviceId, _Listed] = {}
        self._teller = TelemetryReader()
        self._telemetry: dict[DeviceId, Telemetry] = {}
        self._told_at_s = -inf
        self._health = HealthWatch()

    def open(self) -> tuple[Device, ...]:
        """Raises DeviceError without a driver, without a GPU, or if none of them can be read.

        A GPU that cannot be read beside one that can has capacity 0, and an error in every sample.
        """
        try:
            pynvml.nvmlInit()
        except NVML_ERRORS as error:
            raise DeviceError(f"NVML cannot be used: {reason_of(error)}.") from error
        try:
            return self._find()
        except NVML_ERRORS as error:
            self.close()
            raise DeviceError(f"NVML cannot list the GPUs: {reason_of(error)}.") from error
        except DeviceError:
            self.close()
            raise

    def sample(self, roots: Mapping[AttemptId, Roots], now_s: float) -> Sample:
        if self._retry_at_s is not None and now_s >= self._retry_at_s:
            self._initialise_again()
        incidents = self._health.hear()
        readings: dict[DeviceId, Reading] = {}
        errors: dict[DeviceId, str] = {}
        broken: set[DeviceId] = set()
        must_init = self._init_error is not None
        for uuid, handle in self._handles.items():
            try:
                readings[uuid] = self._read(uuid, handle, roots, now_s)
                self._lost.discard(uuid)
            except NVML_ERRORS as error:
                errors[uuid] = self._init_error or f"it cannot be read: {reason_of(error)}."
                must_init |= handle is None or code_of(error) in NEEDS_INIT
                if code_of(error) in IS_BROKEN:
                    self._lost.add(uuid)
            if trouble := self._health.trouble(uuid):
                readings.pop(uuid, None)
                errors[uuid] = f"it is not used: {trouble.why}."
                if trouble.is_fatal:
                    broken.add(uuid)
        self._owners.forget_all_but({pid for listed in self._listed.values() for pid in listed.pids})
        self._could_read = bool(readings)
        self._plan_retry(must_init, now_s)
        self._tell(now_s)
        broken |= self._lost
        return Sample(now_s, readings, errors, frozenset(broken), dict(self._telemetry), incidents)

    def close(self) -> None:
        self._health.close()
        with suppress(*NVML_ERRORS):
            pynvml.nvmlShutdown()

    def _find(self) -> tuple[Device, ...]:
        devices, problems = [], []
        count, driver = pynvml.nvmlDeviceGetCount(), _driver()
        for index in range(count):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                uuid, name = _text(pynvml.nvmlDeviceGetUUID(handle)), _text(pynvml.nvmlDeviceGetName(handle))
            except NVML_ERRORS as error:  # it has no name by which it could ever be found again
                problems.append(f"GPU {index}: {reason_of(error)}")
                continue
            self._handles[uuid] = handle
            try:
                memory = _read_memory(handle)
                capacity = memory.total - memory.reserved
            except NVML_ERRORS as error:
                problems.append(f"GPU {uuid}: {reason_of(error)}")
                capacity = 0
            devices.append(Device(uuid, index, name, DeviceKind.GPU, capacity, self._headroom_bytes, driver))
        if len(problems) == count:
            raise DeviceError(
                f"NVML finds no GPU that can be used: {'; '.join(problems) or 'there is none'}."
            )
        for problem in problems:
            log.warning("a GPU cannot be read and gets nothing until a restart", problem=problem)
        self._health.open(self._handles)
        return tuple(devices)

    def _tell(self, now_s: float) -> None:
        """Now and then, after memory: nothing waits for what is only shown."""
        if now_s - self._told_at_s < TELL_EVERY_S:
            return
        self._told_at_s = now_s
        found = {uuid: handle for uuid, handle in self._handles.items() if handle is not None}
        self._telemetry = {uuid: self._teller.read(uuid, handle) for uuid, handle in found.items()}
        for uuid, handle in found.items():
            self._health.look(uuid, handle)

    def _read(self, uuid: DeviceId, handle: Any, roots: Mapping[AttemptId, Roots], now_s: float) -> Reading:
        if handle is None:
            raise pynvml.NVMLError(self._why_missing.get(uuid, pynvml.NVML_ERROR_NOT_FOUND))
        before, known = _read_memory(handle), self._listed.get(uuid)
        if (
            known is not None
            and now_s - known.at_s < self._list_every_s
            and known.still_holds(before, roots, self._has_seen_processes)
        ):
            return known.reading
        processes, memory = self._listed_between(uuid, handle, before)
        reading = self._reading(uuid, memory, processes, roots)
        self._listed[uuid] = _Listed(
            reading, now_s, memory, dict(roots), self._has_seen_processes, frozenset(processes or ())
        )
        return reading

    def _listed_between(
        self, uuid: DeviceId, handle: Any, before: _Memory
    ) -> tuple[Mapping[int, int | None] | None, _Memory]:
        """The processes, and memory of the same moment: read on both sides of them, until it stood still.

        Where it does not, the fuller card counts. Otherwise what a process takes or gives back in between
        would be free and its own at once.
        """
        for _ in range(LIST_TRIES):
            processes, after = self._processes(uuid, handle), _read_memory(handle)
            fuller = min(before, after, key=lambda reading: reading.free)
            if after == before:
                break
            before = after
        return processes, fuller

    def _reading(
        self,
        uuid: DeviceId,
        memory: _Memory,
        processes: Mapping[int, int | None] | None,
        roots: Mapping[AttemptId, Roots],
    ) -> Reading:
        owners = {pid: self._owners.find(pid, roots) for pid in processes or ()}
        attributed = self._is_attributed(uuid, processes, owners)
        by_attempt: dict[AttemptId, int] = {}
        foreign = []
        for pid, used in (processes or {}).items():
            owner = owners[pid]
            if used is None or not (owner.is_readable or attributed):
                continue
            if owner.attempt is None:
                foreign.append(ForeignProcess(pid, owner.name, used, owner.container))
            else:
                by_attempt[owner.attempt] = by_attempt.get(owner.attempt, 0) + used
        told = sum(by_attempt.values()) + sum(process.used_bytes for process in foreign)
        return Reading(
            free_bytes=memory.free,
            used_bytes=memory.used,
            by_attempt=by_attempt,
            foreign=tuple(foreign),
            unexplained_bytes=max(0, memory.used - told),
            attributed=attributed,
        )

    def _is_attributed(
        self, uuid: DeviceId, processes: Mapping[int, int | None] | None, owners: Mapping[int, Owner]
    ) -> bool:
        """Whether processes can be seen, and how much each has.

        Not in a PID namespace of our own, where NVML lists nothing, however full the card, or (older drivers)
        PIDs that mean nothing here. So an empty list proves nothing; one process ever seen does, since memory
        that comes back late looks the same for a while.
        """
        if processes is None:
            return False
        if None in processes.values():
            self._hides_usage.add(uuid)
        elif processes:
            self._hides_usage.discard(uuid)
        self._has_seen_processes |= any(
            owners[pid].is_readable for pid, used in processes.items() if used is not None
        )
        return self._has_seen_processes and uuid not in self._hides_usage

    def _processes(self, uuid: DeviceId, handle: Any) -> dict[int, int | None] | None:
        """Bytes by PID, None where the driver does not tell. A PID in both lists is one process.

        None instead of all where the GPU does not list who computes on it.
        """
        found: dict[int, int | None] = {}
        for query in (_COMPUTE, _GRAPHICS):
            for process in self._list(uuid, handle, query):
                known, used = found.get(process.pid), process.usedGpuMemory
                found[process.pid] = used if known is None else max(known, used or 0)
        return None if (uuid, _COMPUTE) in self._cannot_list else found

    def _list(self, uuid: DeviceId, handle: Any, query: str) -> Sequence[Any]:
        """Nothing where the GPU has said that it cannot list these processes."""
        if (uuid, query) in self._cannot_list:
            return ()
        try:
            processes: Sequence[Any] = getattr(pynvml, query)(handle)
        except pynvml.NVMLError as error:
            if code_of(error) not in CANNOT:
                raise
            self._cannot_list.add((uuid, query))
            log.warning("a GPU does not list its processes", gpu=uuid, query=query, reason=reason_of(error))
            return ()
        return processes

    def _plan_retry(self, must_init: bool, now_s: float) -> None:
        if not must_init:
            self._retry_at_s, self._retry_after_s = None, FIRST_RETRY_S
        elif self._retry_at_s is None or now_s >= self._retry_at_s:
            self._retry_at_s = now_s + self._retry_after_s
            self._retry_after_s = min(LAST_RETRY_S, self._retry_after_s * 2)

    def _initialise_again(self) -> None:
        self.close()
        self._handles = dict.fromkeys(self._handles)
        self._why_missing.clear()
        self._cannot_list.clear()
        self._listed.clear()
        self._teller.forget()
        self._told_at_s = -inf
        try:
            pynvml.nvmlInit()
        except NVML_ERRORS as error:
            self._init_error = f"NVML cannot be used: {reason_of(error)}."
            if self._could_read:  # the trouble of one GPU has now become everybody's: no long pause for that
                self._retry_after_s = FIRST_RETRY_S
            return
        self._init_error = None
        for uuid in self._handles:
            # An index may by now mean another GPU; the UUID does not.
            try:
                self._handles[uuid] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            except NVML_ERRORS as error:
                self._why_missing[uuid] = code_of(error) or pynvml.NVML_ERROR_NOT_FOUND
        self._health.open(self._handles)


def _read_memory(handle: Any) -> _Memory:
    """Version 1 counts the driver's share as used, so it serves only where there is no version 2."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return _Memory(memory.total, 0, memory.free, memory.used)
    return _Memory(memory.total, memory.reserved, memory.free, memory.used)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _driver() -> str:
    """The driver's version; empty where it does not tell."""
    try:
        return _text(pynvml.nvmlSystemGetDriverVersion())
    except NVML_ERRORS:
        return ""
