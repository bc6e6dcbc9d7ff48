"""Whose a process on a GPU is: found by its container, its parents, or a mark in its environment."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from orchestrator.control.ports import Roots
from orchestrator.core.entities import AttemptId, ContainerId
from orchestrator.drivers.process_tree import ATTEMPT_MARK, read_environment, read_file, read_process

_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_DEEPEST = 64  # levels of parents to walk up


@dataclass(frozen=True, slots=True)
class _Origin:
    """What never changes about a process, and so is read once: whose it may be."""

    name: str
    containers: tuple[ContainerId, ...]  # the outermost first
    lineage: tuple[int, ...]  # its PID, its parent's, and so on up
    mark: AttemptId | None


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a process is: None for a foreign one. One that was never readable has no name either.

    `container` is the one that it runs in; None outside of any.
    """

    attempt: AttemptId | None = None
    name: str = "?"
    is_readable: bool = False
    container: ContainerId | None = None


class Owners:
    """Finds the attempt that a process belongs to. What is read from /proc is kept while it lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, _Origin]] = {}  # by PID, with its start time
        self._attempts: dict[int, AttemptId] = {}  # by PID: whose it was when that could be told

    def find(self, pid: int, roots: Mapping[AttemptId, Roots]) -> Owner:
        process = read_process(pid)
        known = self._known.get(pid)
        # A process that has just ended is listed until its memory is back; it is whose it was.
        if process is not None and (known is None or known[0] != process.started_ticks):
            known = self._known[pid] = process.started_ticks, _read_origin(pid)
            self._attempts.pop(pid, None)
        if known is None:
            return Owner()
        attempt = _attempt_of(known[1], known[0], roots) or self._attempts.get(pid)
        if attempt is not None:  # the engine may see the end before the device does
            self._attempts[pid] = attempt
        container = next(iter(known[1].containers), None)
        return Owner(attempt, known[1].name, is_readable=True, container=container)

    def forget_all_but(self, pids: Collection[int]) -> None:
        self._known = {pid: known for pid, known in self._known.items() if pid in pids}
        self._attempts = {pid: found for pid, found in self._attempts.items() if pid in pids}


def _attempt_of(origin: _Origin, started_ticks: int, roots: Mapping[AttemptId, Roots]) -> AttemptId | None:
    by_container = {root.container_id: attempt for attempt, root in roots.items() if root.container_id}
    for container in by_container.keys() & origin.containers:
        return by_container[container]
    by_pid = {root.pid: attempt for attempt, root in roots.items()}
    for pid in origin.lineage:  # the nearest first
        if pid in by_pid and not _began_after(pid, started_ticks):
            return by_pid[pid]
    return origin.mark if origin.mark in roots else None


def _began_after(pid: int, started_ticks: int) -> bool:
    """Then it is no parent: the number of one that has ended was given again."""
    process = read_process(pid)
    return process is not None and process.started_ticks > started_ticks


def _read_origin(pid: int) -> _Origin:
    return _Origin(
        name=_read_text(pid, "comm").strip() or "?",
        containers=tuple(dict.fromkeys(_CONTAINER_ID.findall(_read_text(pid, "cgroup")))),
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
        return read_file(pid, name).decode(errors="replace")
    except OSError:  # it ended meanwhile, or is hidden from us
        return ""
