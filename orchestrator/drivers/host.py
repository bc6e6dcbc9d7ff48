"""The machine's RAM as a device, read from /proc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from orchestrator.control.ports import Roots
from orchestrator.core.entities import HOST, AttemptId, Device, DeviceKind, Reading, Sample
from orchestrator.core.errors import DeviceError

_KIB = 1024
# What a process that ends meanwhile answers, or one of another user where /proc hides those.
_UNREADABLE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)


class HostDevice:
    """RAM as one device with a capacity of its own, whatever else the machine has.

    A holder's use is the anonymous and shared memory of its processes. Mapped files are left out: the
    kernel may drop them, so what was reserved for weights stays kept back. What anybody else uses shows
    only through MemAvailable.
    """

    name = "host"

    def __init__(self, capacity_bytes: int, label: str) -> None:
        self._device = Device(HOST, 0, label, DeviceKind.HOST, capacity_bytes)

    @property
    def capacity_bytes(self) -> int:
        return self._device.capacity_bytes

    @capacity_bytes.setter
    def capacity_bytes(self, capacity_bytes: int) -> None:
        """Counts from the next sample on; callable from any thread."""
        self._device = replace(self._device, capacity_bytes=capacity_bytes)

    def open(self) -> tuple[Device, ...]:
        """Raises DeviceError where /proc cannot be read."""
        try:
            available_bytes()
        except (OSError, ValueError) as error:
            raise DeviceError(f"The RAM cannot be measured: {error}.") from error
        return (self._device,)

    def sample(self, roots: Mapping[AttemptId, Roots], now_s: float) -> Sample:
        try:
            return Sample(now_s, readings={HOST: self._read(roots)})
        except (OSError, ValueError) as error:
            return Sample(now_s, errors={HOST: f"The RAM cannot be measured: {error}."})

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self, roots: Mapping[AttemptId, Roots]) -> Reading:
        # MemAvailable on both sides of the processes, the smaller one: what a process takes or gives
        # back in between must not count as free and as taken.
        before = available_bytes()
        by_attempt = {attempt: _tree_bytes(root.pid) for attempt, root in roots.items()}
        used = sum(by_attempt.values())
        free = min(self._device.capacity_bytes - used, before, available_bytes())
        return Reading(free_bytes=max(0, free), used_bytes=used, by_attempt=by_attempt)


def available_bytes() -> int:
    """What the kernel says could be had without swapping. Raises OSError or ValueError."""
    return _field_bytes(_read_file("/proc/meminfo"), b"MemAvailable:", needed=True)


def total_bytes() -> int:
    """All the RAM there is. Raises OSError or ValueError."""
    return _field_bytes(_read_file("/proc/meminfo"), b"MemTotal:", needed=True)


def _tree_bytes(root: int) -> int:
    """Anonymous and shared memory of a process and all below it; 0 once they are gone."""
    total, pending, seen = 0, [root], {root}
    while pending:
        pid = pending.pop()
        with suppress(*_UNREADABLE):
            total += _process_bytes(pid)
            children = _children(pid) - seen
            seen |= children
            pending.extend(children)
    return total


def _process_bytes(pid: int) -> int:
    status = _read_file(f"/proc/{pid}/status")  # a zombie's has no such lines
    return _field_bytes(status, b"\nRssAnon:") + _field_bytes(status, b"\nRssShmem:")


def _children(pid: int) -> set[int]:
    """A child belongs to the thread that made it, so every thread is asked."""
    found: set[int] = set()
    with os.scandir(f"/proc/{pid}/task") as threads:
        for thread in threads:
            with suppress(*_UNREADABLE):
                found.update(map(int, _read_file(f"{thread.path}/children").split()))
    return found


def _field_bytes(text: bytes, name: bytes, *, needed: bool = False) -> int:
    """The number of a `Name:   123 kB` line, in bytes."""
    at = text.find(name)
    if at < 0:
        if needed:
            raise ValueError(f"the kernel does not tell {name.decode().strip(':')}")
        return 0
    return int(text[at + len(name) : text.index(b"kB", at)]) * _KIB


def _read_file(path: str) -> bytes:
    # Bare calls: a sample reads dozens of such files, and open() costs three times as much.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(handle, 1 << 16)
    finally:
        os.close(handle)
