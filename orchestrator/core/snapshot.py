"""Everything the planner may know, and everything it may decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf

from orchestrator.core.buffers import Buffers
from orchestrator.core.entities import (
    Action,
    Age,
    AttemptId,
    ContainerId,
    Device,
    DeviceId,
    DeviceKind,
    Download,
    Entry,
    Model,
    ModelId,
    Note,
    Operation,
    OperationId,
    OperationKind,
    OperationState,
    Progress,
    Reading,
    Sample,
    Start,
    WaiterId,
)
from orchestrator.core.health import Fault, Reported
from orchestrator.core.learned import Learned
from orchestrator.core.lifecycle import Instance
from orchestrator.core.verdicts import Ready, Verdict
from orchestrator.core.wording import explain

SAMPLE_LIMIT_S = 3.0
"""A sample older than this is not believed: admission stops."""

FINISHED_OPERATIONS_KEPT = 200


@dataclass(frozen=True, slots=True)
class Measured:
    """What an attempt has of a device, and the device's unexplained bytes, when it was last seen alive.

    `unexplained_before` was so before it started; `overhead_bytes` is what has come to that until it was
    ready: drivers put a part of what a process costs down to nobody.
    """

    used_bytes: int = 0
    unexplained_bytes: int = 0
    unexplained_before: int = 0
    overhead_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent state of everything. Times are monotonic seconds, but `wall_s`.

    `verdicts` and `notes` are of the newest turn only. `seed` and `attempts_made` are where attempt ids
    come from, so that the same snapshot always gives the same plan. `started_as` has the models as they
    were when attempts of theirs were started; what this server did not start is not in it. `logged` is what
    the logs of living attempts say of their buffers. `learned` is by `Learned.key`. `incidents` are the
    newest, oldest first. `strangers_s` is when programs that are not ours were last on a GPU, or may have
    been. `container_names` are of containers that foreign processes run in, as far as they are known.
    """

    now_s: float
    wall_s: float
    seed: str
    devices: Mapping[DeviceId, Device]
    models: Mapping[ModelId, Model]
    sample: Sample
    instances: Mapping[ModelId, Instance] = field(default_factory=dict)
    entries: Mapping[ModelId, Entry] = field(default_factory=dict)
    ages: Mapping[ModelId, Age] = field(default_factory=dict)
    pins: Mapping[ModelId, bool] = field(default_factory=dict)
    holds: Mapping[ModelId, float] = field(default_factory=dict)
    operations: Mapping[OperationId, Operation] = field(default_factory=dict)
    downloads: Mapping[ModelId, Download] = field(default_factory=dict)
    downloaded_bytes: Mapping[ModelId, int] = field(default_factory=dict)
    measured: Mapping[AttemptId, Mapping[DeviceId, Measured]] = field(default_factory=dict)
    started_as: Mapping[AttemptId, Model] = field(default_factory=dict)
    logged: Mapping[AttemptId, Buffers] = field(default_factory=dict)
    learned: Mapping[str, Learned] = field(default_factory=dict)
    progress: Mapping[AttemptId, Progress] = field(default_factory=dict)
    container_names: Mapping[ContainerId, str] = field(default_factory=dict)
    blind_since_s: Mapping[DeviceId, float] = field(default_factory=dict)
    broken_since_s: Mapping[DeviceId, float] = field(default_factory=dict)
    incidents: tuple[Reported, ...] = ()
    faults: Mapping[AttemptId, Fault] = field(default_factory=dict)
    strangers_s: Mapping[DeviceId, float] = field(default_factory=dict)
    released_at_s: Mapping[DeviceId, float] = field(default_factory=dict)
    attempts_made: int = 0
    version: int = 0
    verdicts: Mapping[WaiterId, Verdict] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    def instance(self, model: ModelId) -> Instance:
        return self.instances.get(model) or Instance(model)

    def is_pinned(self, model: ModelId) -> bool:
        entry = self.models.get(model)
        return self.pins.get(model, entry.pinned if entry else False)

    def gpus(self) -> tuple[Device, ...]:
        found = (device for device in self.devices.values() if device.kind is DeviceKind.GPU)
        return tuple(sorted(found, key=lambda device: device.index))

    def reading(self, device: DeviceId) -> Reading | None:
        """The device's memory, or None where it is unknown; unknown is never zero."""
        if self.now_s - self.sample.taken_at_s > SAMPLE_LIMIT_S:
            return None
        return self.sample.readings.get(device)

    def blind_s(self, device: DeviceId) -> float:
        """For how long the device could not be measured; 0 if it can be."""
        if device not in self.devices:
            return inf
        seen_s = self.sample.taken_at_s
        since_s = self.blind_since_s.get(device, seen_s if self.reading(device) is None else self.now_s)
        return self.now_s - since_s

    def unmeasured(self) -> dict[DeviceId, str]:
        """Devices that cannot be believed now, with the reason."""
        age_s = self.now_s - self.sample.taken_at_s
        if age_s > SAMPLE_LIMIT_S:
            return dict.fromkeys(self.devices, f"its last measurement is {age_s:.0f} s old")
        return {
            device: self.sample.errors.get(device, "it has not been measured yet")
            for device in self.devices
            if device not in self.sample.readings
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What one turn decides: new values for what changes, and what to do about it.

    `closing` are the attempts whose gates close now. `wake_at_s` is when time alone changes the answer.
    """

    instances: Mapping[ModelId, Instance] = field(default_factory=dict)
    entries: Mapping[ModelId, Entry] = field(default_factory=dict)
    ages: Mapping[ModelId, Age] = field(default_factory=dict)
    verdicts: Mapping[WaiterId, Verdict] = field(default_factory=dict)
    operations: Mapping[OperationId, Operation] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    actions: tuple[Action, ...] = ()
    closing: frozenset[AttemptId] = frozenset()
    attempts_made: int = 0
    wake_at_s: float | None = None


def apply(snapshot: Snapshot, plan: Plan) -> Snapshot:
    """The snapshot as it is once the plan is decided."""
    verdicts = {**snapshot.verdicts, **plan.verdicts}
    operations = {**snapshot.operations, **plan.operations} if plan.operations else snapshot.operations
    return replace(
        snapshot,
        instances={**snapshot.instances, **plan.instances},
        entries=plan.entries,
        ages=plan.ages,
        verdicts=verdicts,
        operations=forget_oldest(finish_loads(operations, verdicts, snapshot)),
        notes=snapshot.notes + plan.notes,
        started_as={**snapshot.started_as, **started_as(snapshot, plan)},
        attempts_made=plan.attempts_made,
        version=snapshot.version + 1,
    )


def started_as(snapshot: Snapshot, plan: Plan) -> dict[AttemptId, Model]:
    starts = (action for action in plan.actions if isinstance(action, Start))
    known = ((action, snapshot.models.get(action.model)) for action in starts)
    return {a.attempt: model.as_variant(model.run_with(a.parameters)) for a, model in known if model}


def finish_loads(
    operations: Mapping[OperationId, Operation],
    verdicts: Mapping[WaiterId, Verdict],
    snapshot: Snapshot,
) -> Mapping[OperationId, Operation]:
    """Close each load operation that got its verdict, and forget the oldest finished ones."""
    done = {}
    for waiter, verdict in verdicts.items():
        operation = operations.get(waiter)
        if operation is None or operation.kind is not OperationKind.LOAD or operation.ended_at is not None:
            continue
        done[waiter] = finished_load(operation, verdict, snapshot)
    if not done:
        return operations
    return {**operations, **done}


def finished_load(operation: Operation, verdict: Verdict, snapshot: Snapshot) -> Operation:
    if isinstance(verdict, Ready):
        state, message, code = OperationState.SUCCEEDED, f"'{operation.model}' is loaded.", None
    else:
        told = explain(verdict, snapshot.now_s)
        state, message, code = OperationState.FAILED, told.message, told.code
    return replace(operation, state=state, message=message, code=code, ended_at=snapshot.wall_s)


def forget_oldest(operations: Mapping[OperationId, Operation]) -> Mapping[OperationId, Operation]:
    if len(operations) <= FINISHED_OPERATIONS_KEPT:
        return operations
    finished = sorted(
        (op for op in operations.values() if op.ended_at is not None), key=lambda op: op.ended_at or 0.0
    )
    surplus = {op.id for op in finished[: max(0, len(finished) - FINISHED_OPERATIONS_KEPT)]}
    return {key: op for key, op in operations.items() if key not in surplus} if surplus else operations
