"""The life of an instance: its states, the signals that move it, and the one table that says how.

The diagram in docs/lifecycle.md is generated from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.core.entities import (
    AttemptId,
    DeviceId,
    Failure,
    ModelId,
    OperationId,
)
from orchestrator.core.errors import IllegalTransition


class State(StrEnum):
    STOPPED = "stopped"
    FAILED = "failed"
    QUEUED = "queued"
    CLAIMED = "claimed"  # its bytes are promised; victims are still leaving
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, accepts nothing new
    STOPPING = "stopping"
    STUCK = "stuck"  # survived the kill; still holds its memory
    RECLAIMING = "reclaiming"  # gone, but the device has not shown the bytes yet


class Signal(StrEnum):
    # What the planner orders.
    LOAD = "load"
    CANCEL = "cancel"
    CANCEL_FAILED = "cancel, after a failure"
    ADMIT = "admit"
    REPLAN = "replan"
    WITHDRAW = "withdraw"
    START = "start"
    DRAIN = "drain"
    RELENT = "relent"
    STOP = "stop"
    # What is seen to happen.
    HEALTHY = "healthy"
    EXITED = "exited"
    OVERDUE = "overdue"
    SEEN_FREE = "seen free"
    SEEN_FREE_FAILED = "seen free, after a failure"
    STRAYED = "a stray of it is found"
    ADOPTED = "somebody else's is taken over"


COMMANDS = frozenset(
    {
        Signal.LOAD,
        Signal.CANCEL,
        Signal.CANCEL_FAILED,
        Signal.ADMIT,
        Signal.REPLAN,
        Signal.WITHDRAW,
        Signal.START,
        Signal.DRAIN,
        Signal.RELENT,
        Signal.STOP,
    }
)

TRANSITIONS: Mapping[tuple[State, Signal], State] = {
    (State.STOPPED, Signal.LOAD): State.QUEUED,
    (State.FAILED, Signal.LOAD): State.QUEUED,
    (State.FAILED, Signal.CANCEL): State.STOPPED,  # its user gave it up
    (State.QUEUED, Signal.CANCEL): State.STOPPED,  # nobody waits any more
    (State.QUEUED, Signal.CANCEL_FAILED): State.FAILED,
    (State.QUEUED, Signal.ADMIT): State.CLAIMED,
    (State.CLAIMED, Signal.REPLAN): State.QUEUED,  # the room it was promised did not come
    (State.CLAIMED, Signal.WITHDRAW): State.STOPPED,  # unloaded before it started
    (State.CLAIMED, Signal.START): State.STARTING,
    (State.STARTING, Signal.HEALTHY): State.READY,
    (State.STARTING, Signal.STOP): State.STOPPING,  # unloaded, or its start took too long
    (State.STARTING, Signal.EXITED): State.RECLAIMING,
    (State.READY, Signal.DRAIN): State.DRAINING,  # somebody is in flight
    (State.READY, Signal.STOP): State.STOPPING,  # nobody is
    (State.READY, Signal.EXITED): State.RECLAIMING,
    (State.DRAINING, Signal.RELENT): State.READY,  # the claim it made room for is gone
    (State.DRAINING, Signal.STOP): State.STOPPING,  # quiet, forced, or its drain limit has passed
    (State.DRAINING, Signal.EXITED): State.RECLAIMING,
    (State.STOPPING, Signal.EXITED): State.RECLAIMING,
    (State.STOPPING, Signal.OVERDUE): State.STUCK,
    (State.STUCK, Signal.EXITED): State.RECLAIMING,
    (State.STOPPED, Signal.STRAYED): State.STOPPING,  # nothing of it starts beside what is being stopped
    (State.FAILED, Signal.STRAYED): State.STOPPING,
    (State.QUEUED, Signal.STRAYED): State.STOPPING,
    (State.STOPPED, Signal.ADOPTED): State.STARTING,  # it runs, but is not known to be healthy
    (State.FAILED, Signal.ADOPTED): State.STARTING,
    (State.QUEUED, Signal.ADOPTED): State.STARTING,
    (State.RECLAIMING, Signal.SEEN_FREE): State.STOPPED,
    (State.RECLAIMING, Signal.SEEN_FREE_FAILED): State.FAILED,
}

# In RECLAIMING the device itself still shows the bytes as used, so the reservation can go.
HOLDS_RESERVATION = frozenset(
    {State.CLAIMED, State.STARTING, State.READY, State.DRAINING, State.STOPPING, State.STUCK}
)
AT_REST = frozenset({State.STOPPED, State.FAILED})
MAY_BE_ADOPTED = AT_REST | {State.QUEUED}
LEAVING = frozenset({State.DRAINING, State.STOPPING, State.RECLAIMING})
HAS_PROCESS = frozenset({State.STARTING, State.READY, State.DRAINING, State.STOPPING, State.STUCK})
MAY_HAVE_PROCESS = HAS_PROCESS | {State.CLAIMED}
"""A claim may go on with a start that an earlier server ordered, and that its engine completes late."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A model's one place in life: at rest, or its newest attempt.

    `placement` is what it reserves, in bytes by device; `parameters` are what was chosen for a model that
    leaves it to us (`Variant`). All `…_s` fields are monotonic seconds, except
    lengths of time (`load_time_s`). Fields below `attempt` speak of that attempt alone and are reset
    when the next one is claimed; `failure` and `failures` outlive it.
    """

    model: ModelId
    state: State = State.STOPPED
    since_s: float = 0.0
    failure: Failure | None = None
    failures: int = 0
    retry_at_s: float | None = None
    load_time_s: float = 0.0
    unloads: tuple[OperationId, ...] = ()  # the operations that wait for its end
    unload_wanted: bool = False
    force: bool = False

    attempt: AttemptId | None = None
    placement: Mapping[DeviceId, int] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    claimed_at_s: float = 0.0
    started_at_s: float = 0.0
    ready_at_s: float | None = None
    host: str | None = None  # where it answers: address and port
    port: int | None = None
    drained_for: AttemptId | None = None
    stop_reason: str | None = None
    is_failing: bool = False  # ends in FAILED, not STOPPED
    assumed_bytes: Mapping[DeviceId, int] = field(default_factory=dict)  # its use, where PIDs cannot be read
    gone_at_s: float | None = None
    held_bytes: Mapping[DeviceId, int] = field(default_factory=dict)  # measured just before it left
    unexplained_before: Mapping[DeviceId, int] = field(default_factory=dict)
    reclaim_measured_s: float = 0.0

    def without_attempt(self, state: State) -> Instance:
        """What outlives an attempt, in this state: failures, their back-off, and how long loads take."""
        return Instance(
            self.model,
            state,
            self.since_s,
            failure=self.failure,
            failures=self.failures,
            retry_at_s=self.retry_at_s,
            load_time_s=self.load_time_s,
        )

    @property
    def holds_reservation(self) -> bool:
        return self.state in HOLDS_RESERVATION

    @property
    def is_at_rest(self) -> bool:
        return self.state in AT_REST

    @property
    def is_waiting_to_retry(self) -> bool:
        """Nothing of it runs or starts; with a failure, the next try has its time."""
        return self.state in (State.QUEUED, State.RECLAIMING) or self.is_at_rest


def awaiting_stray(instance: Instance, attempt: AttemptId, *, now_s: float) -> Instance:
    """While a stray attempt of a model is being stopped, the model itself is stopping."""
    stopping = advance(instance, Signal.STRAYED, now_s=now_s)
    if stopping is instance:
        return instance
    failed = instance.state is State.FAILED
    fresh = stopping.without_attempt(State.STOPPING)
    return replace(fresh, attempt=attempt, is_failing=failed, stop_reason="a stray attempt of it is stopped")


def advance(instance: Instance, signal: Signal, *, now_s: float, **changes: object) -> Instance:
    """Return the instance as it is after `signal`, with `changes`; the argument never changes.

    An observation without a row is late or repeated news and changes nothing.
    Raises IllegalTransition for a command without a row: the planner is wrong.
    """
    state = TRANSITIONS.get((instance.state, signal))
    if state is not None:
        return replace(instance, state=state, since_s=now_s, **changes)  # type: ignore[arg-type]
    if signal in COMMANDS:
        raise IllegalTransition(f"{instance.model}: {signal} while {instance.state}")
    return instance
