"""Containers as the engine describes them: in its list, and one by one."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.entities import AttemptId, DeviceId, ModelId

RUNNING = ("running", "paused", "restarting")
ENDED = ("exited", "dead")


@dataclass(frozen=True, slots=True)
class Box:
    """A container of ours as the engine described it. `status` is the engine's word."""

    id: str
    attempt: AttemptId
    model: ModelId
    status: str
    pid: int
    host: str
    port: int
    exit_code: int
    oom: bool
    is_lent: bool = False
    gpus: tuple[DeviceId, ...] | None = None

    @property
    def is_running(self) -> bool:
        return self.status in RUNNING

    @property
    def has_run(self) -> bool:
        """False for one that was created, and that the engine has not started (yet)."""
        return self.status != "created"

    def is_another_life_of(self, old: Box) -> bool:
        """Its owner, or the engine for him, has started it again: it may have another address."""
        return old.is_lent and self.pid != old.pid


@dataclass(frozen=True, slots=True)
class Row:
    """A container of ours in the engine's list; `created_s` is seconds since 1970.

    One that neither runs nor has ended was created and not started yet, or never will be.
    """

    id: str
    attempt: AttemptId
    model: ModelId
    is_running: bool
    has_ended: bool
    created_s: int
    is_lent: bool = False
