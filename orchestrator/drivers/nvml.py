"""NVIDIA GPUs through NVML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import structlog

from orchestrator.control.ports import Roots
from orchestrator.core.entities import (
    MIB,
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
# A card nobody uses may show a little; more than this without any process means that we see none.
SILENT_BYTES = 64 * MIB

# The second is no subclass of the first: a library too old for this pynvml.
_NVML_ERRORS = (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError)
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_DEEPEST = 64  # levels of parents to walk up

# After these, handles are worthless until NVML is initialised again.
_NEEDS_INIT = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_UNKNOWN,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_GPU_IS_LOST,
    }
)
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

    A GPU that cannot be read is an error, never zeros. Where NVML itself broke down it is initialised
    again, after 1 s at first, then ever more rarely up to once a minute; until it answers, its GPUs stay
    errors.
    """

    name = "nvml"

    def __init__(self, headroom_bytes: int) -> None:
        self._headroom_bytes = headroom_bytes
        self._handles: dict[DeviceId, Any] = {}  # None: not found at the last initialisation
        self._init_error: str | None = None
        self._retry_at_s: float | None = None
        self._retry_after_s = FIRST_RETRY_S
        self._owners = _Owners()
        self._has_seen_processes = False

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
                readings[uuid] = self._read(handle, roots)
            except _NVML_ERRORS as error:
                errors[uuid] = self._init_error or f"GPU {uuid} cannot be read: {_reason(error)}."
                must_init |= handle is None or _code(error) in _NEEDS_INIT
        self._owners.forget_the_unlisted()
        self._plan_retry(must_init, now_s)
        return Sample(now_s, readings, errors)

    def close(self) -> None:
        with suppress(*_NVML_ERRORS):
            pynvml.nvmlShutdown()

    def _find(self) -> tuple[Device, ...]:
        devices, problems = [], []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid, name = _text(pynvml.nvmlDeviceGetUUID(handle)), _text(pynvml.nvmlDeviceGetName(handle))
            self._handles[uuid] = handle
            try:
                memory = _read_memory(handle)
                capacity = memory.total - memory.reserved
            except _NVML_ERRORS as error:
                problems.append(f"GPU {uuid}: {_reason(error)}")
                capacity = 0
            devices.append(Device(uuid, index, name, DeviceKind.GPU, capacity, self._headroom_bytes))
        if len(problems) == len(devices):
            raise DeviceError(
                f"NVML finds no GPU that can be used: {'; '.join(problems) or 'there is none'}."
            )
        for problem in problems:
            log.warning("a GPU cannot be read and gets nothing until a restart", problem=problem)
        return tuple(devices)

    def _read(self, handle: Any, roots: Mapping[AttemptId, Roots]) -> Reading:
        if handle is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        # Memory is read on both sides of the processes, and the fuller card counts. Otherwise what a
        # process takes or gives back in between would be free and its own at once.
        before, processes, after = _read_memory(handle), _read_processes(handle), _read_memory(handle)
        memory = min(before, after, key=lambda reading: reading.free)
        self._has_seen_processes |= bool(processes)
        by_attempt: dict[AttemptId, int] = {}
        foreign = []
        for pid, used in processes.items():
            if used is None:
                continue
            attempt, name = self._owners.find(pid, roots)
            if attempt is None:
                foreign.append(ForeignProcess(pid, name, used))
            else:
                by_attempt[attempt] = by_attempt.get(attempt, 0) + used
        listed = sum(used for used in processes.values() if used is not None)
        return Reading(
            free_bytes=memory.free,
            used_bytes=memory.used,
            by_attempt=by_attempt,
            foreign=tuple(foreign),
            unexplained_bytes=max(0, memory.used - listed),
            attributed=self._is_attributed(processes, memory),
        )

    def _is_attributed(self, processes: Mapping[int, int | None], memory: _Memory) -> bool:
        """Whether processes can be seen: not where bytes are missing, nor in a PID namespace of our own.

        There NVML lists nothing, however full the card. One process ever seen is proof enough: memory
        that comes back late looks the same for a while.
        """
        if None in processes.values():
            return False
        return self._has_seen_processes or memory.used <= SILENT_BYTES

    def _plan_retry(self, must_init: bool, now_s: float) -> None:
        if not must_init:
            self._retry_at_s, self._retry_after_s = None, FIRST_RETRY_S
        elif self._retry_at_s is None or now_s >= self._retry_at_s:
            self._retry_at_s = now_s + self._retry_after_s
            self._retry_after_s = min(LAST_RETRY_S, self._retry_after_s * 2)

    def _initialise_again(self) -> None:
        self.close()
        self._handles = dict.fromkeys(self._handles)
        try:
            pynvml.nvmlInit()
        except _NVML_ERRORS as error:
            self._init_error = f"NVML cannot be used: {_reason(error)}."
            return
        self._init_error = None
        for uuid in self._handles:
            # An index may by now mean another GPU; the UUID does not.
            with suppress(*_NVML_ERRORS):
                self._handles[uuid] = pynvml.nvmlDeviceGetHandleByUUID(uuid)


class _Owners:
    """Finds the attempt that a process belongs to. What is read from /proc is kept while it lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, _Origin]] = {}  # by PID, with its start time
        self._asked: set[int] = set()

    def find(self, pid: int, roots: Mapping[AttemptId, Roots]) -> tuple[AttemptId | None, str]:
        """The attempt, or None for a foreign process, and the process's name."""
        self._asked.add(pid)
        process = read_process(pid)
        known = self._known.get(pid)
        # A process that has just ended is listed until its memory is back; it is whose it was.
        if process is not None and (known is None or known[0] != process.started_ticks):
            known = self._known[pid] = process.started_ticks, _read_origin(pid)
        if known is None:
            return None, "?"
        return _owner(known[1], roots), known[1].name

    def forget_the_unlisted(self) -> None:
        self._known = {pid: known for pid, known in self._known.items() if pid in self._asked}
        self._asked = set()


def _owner(origin: _Origin, roots: Mapping[AttemptId, Roots]) -> AttemptId | None:
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
    except pynvml.NVMLError_FunctionNotFound:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return _Memory(memory.total, 0, memory.free, memory.used)
    return _Memory(memory.total, memory.reserved, memory.free, memory.used)


def _read_processes(handle: Any) -> dict[int, int | None]:
    """Bytes by PID, None where the driver does not tell. A PID in both lists is one process."""
    found: dict[int, int | None] = {}
    lists: tuple[Callable[[Any], Sequence[Any]], ...] = (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    )
    for processes in lists:
        for process in processes(handle):
            known, used = found.get(process.pid), process.usedGpuMemory
            found[process.pid] = used if known is None else max(known, used or 0)
    return found


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
