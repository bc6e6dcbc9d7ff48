"""NVIDIA GPUs through NVML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
from orchestrator.drivers.process_tree import ATTEMPT_MARK, read_environment, read_process

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0

# The second is no subclass of the first: a library too old for this pynvml.
_NVML_ERRORS = (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError)
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_DEEPEST = 64  # levels of parents to walk up

# After these, handles are worthless until NVML is initialised again. A GPU that is lost or must be reset
# comes back, if ever, with another handle. What we ask is the same each time, so that an invalid argument
# is a handle that died.
_NEEDS_INIT = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
        pynvml.NVML_ERROR_UNKNOWN,
    }
)
# What a GPU says that cannot do a thing, or not for us, and never will: it is not asked again.
_CANNOT = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION})
_COMPUTE, _GRAPHICS = "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"
_ADVICE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "the NVIDIA driver's library (libnvidia-ml.so.1) is not here; "
    "install the driver, or hand the GPUs to this container",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not use the GPU",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU fell off the bus; usually only a reboot brings it back",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU must be reset",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was changed under this program; restart the "
    "server, or the machine",
    pynvml.NVML_ERROR_UNKNOWN: "the driver gives no reason; a container that lost its right to the devices "
    "sees this, and must be created again",
    pynvml.NVML_ERROR_NOT_FOUND: "the GPU is not there any more",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "the GPU is not there any more",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU does not tell its memory",
}

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Bytes. `reserved` is the driver's own share: no process can ever have it."""

    total: int
    reserved: int
    free: int
    used: int


@dataclass(frozen=True, slots=True)
class _Origin:
    """What never changes about a process, and so is read once: whose it may be."""

    name: str
    containers: frozenset[str]
    lineage: tuple[int, ...]  # its PID, its parent's, and so on up
    mark: AttemptId | None


class NvmlDevices:
    """The machine's NVIDIA GPUs by UUID, `headroom_bytes` of each kept free.

    A GPU that cannot be read is an error, never zeros. Where NVML itself broke down, or a GPU was lost, it
    is initialised again and the GPUs are found by UUID, after 1 s at first, then ever more rarely up to once
    a minute; until then such GPUs stay errors. Where only the list of processes cannot be had, memory counts
    and belongs to nobody (`attributed` is False).
    """

    name = "nvml"

    def __init__(self, headroom_bytes: int) -> None:
        self._headroom_bytes = headroom_bytes
        self._handles: dict[DeviceId, Any] = {}  # None: not found at the last initialisation
        self._why_missing: dict[DeviceId, int] = {}  # the error that it was not found with
        self._init_error: str | None = None
        self._retry_at_s: float | None = None
        self._retry_after_s = FIRST_RETRY_S
        self._owners = _Owners()
        self._has_seen_processes = False
        self._hides_usage: set[DeviceId] = set()
        self._cannot_list: set[tuple[DeviceId, str]] = set()
        self._could_read = False  # any GPU, at the last sample

    def open(self) -> tuple[Device, ...]:
        """Raises DeviceError without a driver, without a GPU, or if none of them can be read.

        A GPU that cannot be read beside one that can has capacity 0, and an error in every sample.
        """
        try:
            pynvml.nvmlInit()
        except _NVML_ERRORS as error:
            raise DeviceError(f"NVML cannot be used: {_reason(error)}.") from error
        try:
            return self._find()
        except _NVML_ERRORS as error:
            self.close()
            raise DeviceError(f"NVML cannot list the GPUs: {_reason(error)}.") from error
        except DeviceError:
            self.close()
            raise

    def sample(self, roots: Mapping[AttemptId, Roots], now_s: float) -> Sample:
        if self._retry_at_s is not None and now_s >= self._retry_at_s:
            self._initialise_again()
        readings: dict[DeviceId, Reading] = {}
        errors: dict[DeviceId, str] = {}
        must_init = self._init_error is not None
        for uuid, handle in self._handles.items():
            try:
                readings[uuid] = self._read(uuid, handle, roots)
            except _NVML_ERRORS as error:
                errors[uuid] = self._init_error or f"GPU {uuid} cannot be read: {_reason(error)}."
                must_init |= handle is None or _code(error) in _NEEDS_INIT
        self._owners.forget_the_unlisted()
        self._could_read = bool(readings)
        self._plan_retry(must_init, now_s)
        return Sample(now_s, readings, errors)

    def close(self) -> None:
        with suppress(*_NVML_ERRORS):
            pynvml.nvmlShutdown()

    def _find(self) -> tuple[Device, ...]:
        devices, problems = [], []
        count, driver = pynvml.nvmlDeviceGetCount(), _driver()
        for index in range(count):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                uuid, name = _text(pynvml.nvmlDeviceGetUUID(handle)), _text(pynvml.nvmlDeviceGetName(handle))
            except _NVML_ERRORS as error:  # it has no name by which it could ever be found again
                problems.append(f"GPU {index}: {_reason(error)}")
                continue
            self._handles[uuid] = handle
            try:
                memory = _read_memory(handle)
                capacity = memory.total - memory.reserved
            except _NVML_ERRORS as error:
                problems.append(f"GPU {uuid}: {_reason(error)}")
                capacity = 0
            devices.append(Device(uuid, index, name, DeviceKind.GPU, capacity, self._headroom_bytes, driver))
        if len(problems) == count:
            raise DeviceError(
                f"NVML finds no GPU that can be used: {'; '.join(problems) or 'there is none'}."
            )
        for problem in problems:
            log.warning("a GPU cannot be read and gets nothing until a restart", problem=problem)
        return tuple(devices)

    def _read(self, uuid: DeviceId, handle: Any, roots: Mapping[AttemptId, Roots]) -> Reading:
        if handle is None:
            raise pynvml.NVMLError(self._why_missing.get(uuid, pynvml.NVML_ERROR_NOT_FOUND))
        # Memory is read on both sides of the processes, and the fuller card counts. Otherwise what a
        # process takes or gives back in between would be free and its own at once.
        before, processes, after = _read_memory(handle), self._processes(uuid, handle), _read_memory(handle)
        memory = min(before, after, key=lambda reading: reading.free)
        owners = {pid: self._owners.find(pid, roots) for pid in processes or ()}
        attributed = self._is_attributed(uuid, processes, owners)
        by_attempt: dict[AttemptId, int] = {}
        foreign = []
        for pid, used in (processes or {}).items():
            owner = owners[pid]
            if used is None or not (owner.is_readable or attributed):
                continue
            if owner.attempt is None:
                foreign.append(ForeignProcess(pid, owner.name, used))
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
        self, uuid: DeviceId, processes: Mapping[int, int | None] | None, owners: Mapping[int, _Owner]
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
            if _code(error) not in _CANNOT:
                raise
            self._cannot_list.add((uuid, query))
            log.warning("a GPU does not list its processes", gpu=uuid, query=query, reason=_reason(error))
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
        self._cannot_list.clear()
        try:
            pynvml.nvmlInit()
        except _NVML_ERRORS as error:
            self._init_error = f"NVML cannot be used: {_reason(error)}."
            if self._could_read:  # the trouble of one GPU has now become everybody's: no long pause for that
                self._retry_after_s = FIRST_RETRY_S
            return
        self._init_error = None
        for uuid in self._handles:
            # An index may by now mean another GPU; the UUID does not.
            try:
                self._handles[uuid] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            except _NVML_ERRORS as error:
                self._why_missing[uuid] = _code(error) or pynvml.NVML_ERROR_NOT_FOUND


@dataclass(frozen=True, slots=True)
class _Owner:
    """Whose a process is: None for a foreign one. One that was never readable has no name either."""

    attempt: AttemptId | None = None
    name: str = "?"
    is_readable: bool = False


class _Owners:
    """Finds the attempt that a process belongs to. What is read from /proc is kept while it lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, _Origin]] = {}  # by PID, with its start time
        self._attempts: dict[int, AttemptId] = {}  # by PID: whose it was when that could be told
        self._asked: set[int] = set()

    def find(self, pid: int, roots: Mapping[AttemptId, Roots]) -> _Owner:
        self._asked.add(pid)
        process = read_process(pid)
        known = self._known.get(pid)
        # A process that has just ended is listed until its memory is back; it is whose it was.
        if process is not None and (known is None or known[0] != process.started_ticks):
            known = self._known[pid] = process.started_ticks, _read_origin(pid)
            self._attempts.pop(pid, None)
        if known is None:
            return _Owner()
        attempt = _attempt_of(known[1], roots) or self._attempts.get(pid)
        if attempt is not None:  # the engine may see the end before the device does
            self._attempts[pid] = attempt
        return _Owner(attempt, known[1].name, is_readable=True)

    def forget_the_unlisted(self) -> None:
        self._known = {pid: known for pid, known in self._known.items() if pid in self._asked}
        self._attempts = {pid: found for pid, found in self._attempts.items() if pid in self._asked}
        self._asked = set()


def _attempt_of(origin: _Origin, roots: Mapping[AttemptId, Roots]) -> AttemptId | None:
    by_container = {root.container_id: attempt for attempt, root in roots.items() if root.container_id}
    for container in origin.containers & by_container.keys():
        return by_container[container]
    by_pid = {root.pid: attempt for attempt, root in roots.items()}
    for pid in origin.lineage:  # the nearest first
        if pid in by_pid:
            return by_pid[pid]
    return origin.mark if origin.mark in roots else None


def _read_origin(pid: int) -> _Origin:
    return _Origin(
        name=_read_text(pid, "comm").strip() or "?",
        containers=frozenset(_CONTAINER_ID.findall(_read_text(pid, "cgroup"))),
        lineage=tuple(_lineage(pid)),
        mark=read_environment(pid).get(ATTEMPT_MARK),
    )


def _lineage(pid: int) -> Iterable[int]:
    for _ in range(_DEEPEST):
        yield pid
        process = read_process(pid)
        if process is None or process.parent <= 1:
            return
        pid = process.parent


def _read_text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it ended meanwhile, or is hidden from us
        return ""


def _read_memory(handle: Any) -> _Memory:
    """Version 1 counts the driver's share as used, so it serves only where there is no version 2."""
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return _Memory(memory.total, 0, memory.free, memory.used)
    return _Memory(memory.total, memory.reserved, memory.free, memory.used)


def _code(error: Exception) -> int | None:
    return getattr(error, "value", None)


def _reason(error: Exception) -> str:
    if not isinstance(error, pynvml.NVMLError):
        return "the NVIDIA driver is too old for this program; it lacks a function that it needs"
    said = str(error).strip()
    advice = _ADVICE.get(_code(error))
    return f"{advice} (NVML: {said})" if advice else f"NVML says: {said}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _driver() -> str:
    """The driver's version; empty where it does not tell."""
    try:
        return _text(pynvml.nvmlSystemGetDriverVersion())
    except _NVML_ERRORS:
        return ""
