"""Which processes there are and whose: read from /proc, nothing remembered."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

ATTEMPT_MARK = "ORCHESTRATOR_ATTEMPT"
OWNER_MARK = "ORCHESTRATOR_OWNER"
MODEL_MARK = "ORCHESTRATOR_MODEL"

# What a process of another user, or one that is just ending, answers.
_UNREADABLE = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc. `started_ticks` since boot tells a PID from a later one of the same number."""

    pid: int
    parent: int
    group: int
    session: int
    started_ticks: int


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def read_process(pid: int) -> Process | None:
    """The process, or None if it is gone; a zombie is gone too, since nobody may be there to reap it."""
    try:
        fields = _stat(pid)
    except _UNREADABLE:
        return None
    if fields[0] in "ZXx":
        return None
    return Process(pid, int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def read_file(pid: int, name: str) -> bytes:
    """All of a file in /proc/PID. Raises OSError."""
    # No Path: it interns each of its parts. A look at all processes does that with hundreds of numbers, for
    # which Python renews its table of interned names again and again: 4 MiB, each time of another thread.
    with FileIO(f"/proc/{pid}/{name}") as file:
        return file.readall()


def started_ticks(pid: int) -> int:
    """When a child of ours that nobody has reaped began, even if it is a zombie already."""
    return int(_stat(pid)[19])


def is_same(pid: int, started_ticks: int) -> bool:
    """Whether the process that began then still lives."""
    process = read_process(pid)
    return process is not None and process.started_ticks == started_ticks


def read_environment(pid: int) -> dict[str, str]:
    """The environment it was started with; empty where it is gone or not ours to read."""
    try:
        data = read_file(pid, "environ")
    except _UNREADABLE:
        return {}
    pairs = (item.partition("=") for item in data.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs if name}


def read_command(pid: int) -> list[str]:
    try:
        return read_file(pid, "cmdline").decode(errors="replace").split("\0")[:-1]
    except _UNREADABLE:
        return []


def marked_processes(owner: str) -> tuple[tuple[Process, Mapping[str, str]], ...]:
    """Every living process that was started for an attempt of this owner, with its environment."""
    marked: list[tuple[Process, Mapping[str, str]]] = []
    for pid in _pids():
        if not _has_marks(pid, _mark(OWNER_MARK, owner)):
            continue
        process, environment = read_process(pid), read_environment(pid)
        if process and environment.get(OWNER_MARK) == owner and ATTEMPT_MARK in environment:
            marked.append((process, environment))
    return tuple(marked)


def members(
    owner: str, attempt: str, root_pid: int, root_started_ticks: int, *, saw_root_end: bool = False
) -> tuple[Process, ...]:
    """Every living process of an attempt, its root included if that lives.

    A process belongs to it by its session or group, by the marks in its environment (it may have left
    both), or because its parent does (it may have dropped the environment). The session and group of a
    root that is gone count only if `saw_root_end`, or if a marked process is in them: else its number
    may be somebody else's by now.
    """
    everyone = {pid: process for pid in _pids() if (process := read_process(pid))}
    marks = (_mark(OWNER_MARK, owner), _mark(ATTEMPT_MARK, attempt))
    ours = {pid for pid in everyone if _has_marks(pid, *marks)}
    in_root = {p.pid for p in everyone.values() if root_pid in (p.session, p.group)}
    root = everyone.get(root_pid)
    # No number is given again while it is that of a session or group with members.
    if root.started_ticks == root_started_ticks if root else saw_root_end or ours & in_root:
        ours |= in_root
    while more := {p.pid for p in everyone.values() if p.parent in ours and p.pid not in ours}:
        ours |= more
    return tuple(everyone[pid] for pid in sorted(ours))


def send(processes: Iterable[Process], number: signal.Signals) -> None:
    """Signal exactly these processes; one that has ended meanwhile is skipped, whoever has its PID now."""
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            handle = os.pidfd_open(process.pid)
            try:
                if is_same(process.pid, process.started_ticks):
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on."""
    text = read_file(pid, "stat").decode(errors="replace")
    return text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks and brackets


def _mark(name: str, value: str) -> bytes:
    return f"\0{name}={value}\0".encode()


def _has_marks(pid: int, *marks: bytes) -> bool:
    try:
        data = b"\0" + read_file(pid, "environ")
    except _UNREADABLE:
        return False
    return all(mark in data for mark in marks)


def _pids() -> list[int]:
    with os.scandir("/proc") as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]
