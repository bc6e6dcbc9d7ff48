"""A plan in the making: a working copy of the snapshot that the planner's steps read and change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, wraps
from typing import Any, TypeVar, TypeVarTuple

from orchestrator.core.entities import (
    Action,
    AttemptId,
    Device,
    DeviceId,
    DeviceKind,
    Entry,
    Model,
    ModelId,
    Note,
    Operation,
    OperationId,
    Reading,
    Usage,
    WaiterId,
)
from orchestrator.core.ledger import available_bytes, freed_bytes, held_bytes, kept_back
from orchestrator.core.lifecycle import AT_REST, Instance, Signal, State, advance
from orchestrator.core.snapshot import Plan, Snapshot
from orchestrator.core.verdicts import Ready, Verdict
from orchestrator.core.waiting import with_age_kept

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NEVER_USED = Usage()

QUIET_S = 0.25
"""An instance whose last request ended this long ago is idle: a busy conversation is not cut in two."""


class Draft:
    """The snapshot being planned on. Only `move` and its like change it; `plan` says what changed."""

    def __init__(self, snapshot: Snapshot, usage: Mapping[AttemptId, Usage]) -> None:
        self.snapshot = snapshot
        self.now_s = snapshot.now_s
        self.instances: dict[ModelId, Instance] = dict(snapshot.instances)
        self.entries: dict[ModelId, Entry] = dict(snapshot.entries)
        self.ages = snapshot.ages
        self.attempts_made = snapshot.attempts_made
        self.verdicts: dict[WaiterId, Verdict] = {}
        self.measured_first: set[DeviceId] = set()  # whoever is first there waits for the next sample
        self.operations: dict[OperationId, Operation] = {}
        self._usage = usage
        self._entering = entering(snapshot.verdicts)
        self._changed: set[ModelId] = set()
        self._notes: list[Note] = []
        self._actions: list[Action] = []
        self._closing: set[AttemptId] = set()
        self._wake_at_s: float | None = None
        self._readings = {device: snapshot.reading(device) for device in snapshot.devices}
        self._on_device = by_device(self.instances.values())
        self._available: dict[DeviceId, int] = {}
        self._surely_freed: dict[DeviceId, int] = {}
        self._memory: dict[object, Any] = {}
        self._of_device: dict[DeviceId, dict[object, Any]] = {}
        self._of_instance: dict[ModelId, tuple[Instance, Any]] = {}

    # --- reading

    def instance(self, model: ModelId) -> Instance:
        return self.instances.get(model) or Instance(model)

    def model(self, model: ModelId) -> Model | None:
        return self.snapshot.models.get(model)

    def reading(self, device: DeviceId) -> Reading | None:
        return self._readings.get(device)

    def measured(self) -> list[DeviceId]:
        return [device for device, reading in self._readings.items() if reading is not None]

    def device(self, device: DeviceId) -> Device:
        return self.snapshot.devices[device]

    @cached_property
    def gpus(self) -> tuple[Device, ...]:
        """In index order."""
        return self.snapshot.gpus()

    def device_name(self, device: DeviceId) -> str:
        """Short, as `orchestrator ps` has it: a machine may have two cards of one name."""
        known = self.snapshot.devices.get(device)
        if known is None:
            return device
        return known.name if known.kind is DeviceKind.HOST else f"GPU {known.index}"

    def occupied(self) -> Iterable[DeviceId]:
        """Every device that somebody has a part of, measured or not."""
        return self._on_device

    def on_device(self, device: DeviceId) -> Iterable[Instance]:
        """Everybody with a part of the device: claimed, running, leaving."""
        return (self.instances[model] for model in self._on_device.get(device, ()))

    def available(self, device: DeviceId) -> int:
        """The one formula (ledger.py) on this draft; the device must be measured."""
        known = self._available.get(device)
        if known is None:
            reading = self._readings[device]
            assert reading is not None, f"{device} is not measured"
            known = available_bytes(self.device(device), reading, self.on_device(device))
            self._available[device] = known
        return known

    def projected(self, device: DeviceId) -> int:
        """Available once everybody who is surely leaving has left; the device must be measured.

        A drain for another claim is sure, and that claim is already counted. A drain for an unload may take
        its time: it is a victim like a busy one, and never a reason to evict nobody idle.
        """
        freed = self._surely_freed.get(device)
        if freed is None:
            freed = self.freed_by(filter(is_surely_leaving, self.on_device(device)), device)
            self._surely_freed[device] = freed
        return self.available(device) + freed

    def remember(self, make: Callable[[Draft], T]) -> T:
        """What `make` says of all devices, asked again only after a change on one of them."""
        if make not in self._memory:
            self._memory[make] = make(self)
        value: T = self._memory[make]
        return value

    def remember_of_device(
        self, device: DeviceId, make: Callable[[Draft, DeviceId, *Ts], T], *more: *Ts
    ) -> T:
        """What `make` says of the device and those on it, asked again only after a change there."""
        known = self._of_device.setdefault(device, {})
        key = (make, *more)
        if key not in known:
            known[key] = make(self, device, *more)
        value: T = known[key]
        return value

    def remember_of(self, instance: Instance, make: Callable[[Draft, Instance], T]) -> T:
        """What `make` says of this very instance; asked with one function only."""
        known = self._of_instance.get(instance.model)
        if known is None or known[0] is not instance:
            known = (instance, make(self, instance))
            self._of_instance[instance.model] = known
        value: T = known[1]
        return value

    def held(self, instance: Instance, device: DeviceId) -> int:
        reading = self._readings.get(device)  # a device can be gone that somebody is placed on
        return held_bytes(instance, device, reading) if reading else 0

    def kept_back(self, instance: Instance) -> dict[DeviceId, int]:
        """What it was promised and has not taken, on each measured device where it is placed."""
        readings = {device: self._readings.get(device) for device in instance.placement}
        return {device: kept_back(instance, device, of) for device, of in readings.items() if of is not None}

    def freed_by(self, leavers: Iterable[Instance], device: DeviceId) -> int:
        """What becomes available once all of them are gone, and the device has shown it."""
        reading = self._readings.get(device)
        return freed_bytes(leavers, device, reading) if reading else 0

    def usage(self, instance: Instance) -> Usage:
        return self._usage.get(instance.attempt or "", NEVER_USED)

    def in_flight(self, instance: Instance) -> int:
        """Requests in the gate, and those this very turn lets in."""
        return self.usage(instance).in_flight + self._entering.get(instance.attempt or "", 0)

    def last_used_s(self, instance: Instance) -> float:
        ended_s = self.usage(instance).last_ended_s
        return max(instance.ready_at_s or 0.0, ended_s if ended_s is not None else 0.0)

    def quiet_at_s(self, instance: Instance) -> float:
        """When an instance with nothing in flight counts as idle."""
        ended_s = self.usage(instance).last_ended_s
        return self.now_s if ended_s is None else ended_s + QUIET_S

    def is_idle(self, instance: Instance) -> bool:
        return self.in_flight(instance) == 0 and self.quiet_at_s(instance) <= self.now_s

    # --- changing

    def put(self, instance: Instance) -> Instance:
        before = self.instance(instance.model)
        self.instances[instance.model] = instance
        self._changed.add(instance.model)
        for device in {*before.placement, *instance.placement}:
            self._memory.clear()
            self._of_device.pop(device, None)
            self._correct(device, before, instance)
            present = self._on_device.setdefault(device, set())
            (present.add if device in instance.placement else present.discard)(instance.model)
        return instance

    def _correct(self, device: DeviceId, before: Instance, after: Instance) -> None:
        """Of the sums over everybody on the device one term has changed."""
        reading = self._readings.get(device)
        if reading is not None and device in self._available:
            self._available[device] += kept_back(before, device, reading) - kept_back(after, device, reading)
        if is_surely_leaving(before) or is_surely_leaving(after):
            self._surely_freed.pop(device, None)

    def move(self, instance: Instance, signal: Signal, **changes: object) -> Instance:
        """Advance the instance by the lifecycle table and set what goes with it."""
        moved = advance(instance, signal, now_s=self.now_s, **changes)
        if moved is instance:
            return instance
        self.put(moved)
        if moved.state in (State.DRAINING, State.STOPPING) and moved.attempt:
            self._closing.add(moved.attempt)
        return moved

    def take_back(self, before: Instance) -> None:
        """Undo all that this plan decided about the instance."""
        self.put(before)
        self._actions = [action for action in self._actions if action.attempt != before.attempt]
        self._notes = [note for note in self._notes if note.attempt != before.attempt]
        self._closing.discard(before.attempt or "")

    def act(self, action: Action) -> None:
        self._actions.append(action)

    def note(self, kind: str, text: str, instance: Instance, **data: object) -> None:
        self._notes.append(Note(kind, text, instance.model, instance.attempt, data))

    def wait(self, entry: Entry, reason: str) -> None:
        """The entry stays in the queue, for this reason."""
        if entry.reason != reason:
            self.entries[entry.model] = replace(entry, reason=reason)

    def answer(self, entry: Entry, verdict: Verdict, *, keeps_age: bool = False) -> None:
        """End the wait of everyone in the entry; who comes back soon may be as old as before."""
        if keeps_age:
            self.ages = with_age_kept(self.ages, entry, self.instance(entry.model), self.now_s)
        self.entries.pop(entry.model, None)
        self.verdicts.update(dict.fromkeys(entry.waiters, verdict))
        if isinstance(verdict, Ready):
            inside = self._entering.get(verdict.attempt, 0) + len(entry.waiters)
            self._entering[verdict.attempt] = inside

    def wake(self, at_s: float) -> None:
        """Plan again then, even if nothing happens."""
        if self._wake_at_s is None or at_s < self._wake_at_s:
            self._wake_at_s = at_s

    def new_attempt(self) -> AttemptId:
        self.attempts_made += 1
        return f"{self.attempts_made:04x}{self.snapshot.seed}"

    def plan(self) -> Plan:
        before = self.snapshot.instances
        changed = {
            model: self.instances[model]
            for model in self._changed
            if self.instances[model] != before.get(model)
        }
        return Plan(
            instances=changed,
            entries=self.entries,
            ages=self.ages,
            verdicts=self.verdicts,
            operations=self.operations,
            notes=tuple(self._notes),
            actions=tuple(self._actions),
            closing=frozenset(self._closing),
            attempts_made=self.attempts_made,
            wake_at_s=self._wake_at_s,
        )


def remembered(make: Callable[[Draft, DeviceId, *Ts], T]) -> Callable[[Draft, DeviceId, *Ts], T]:
    """`make`, worked out again only after a change on the device: it may look at nobody else."""

    @wraps(make)
    def known(draft: Draft, device: DeviceId, *more: *Ts) -> T:
        return draft.remember_of_device(device, make, *more)

    return known


def is_surely_leaving(instance: Instance) -> bool:
    return instance.state in (State.STOPPING, State.RECLAIMING) or (
        instance.state is State.DRAINING and instance.drained_for is not None
    )


def entering(verdicts: Mapping[WaiterId, Verdict]) -> dict[AttemptId, int]:
    """How many waiters this turn lets into each attempt's gate."""
    counts: dict[AttemptId, int] = {}
    for verdict in verdicts.values():
        if isinstance(verdict, Ready):
            counts[verdict.attempt] = counts.get(verdict.attempt, 0) + 1
    return counts


def by_device(instances: Iterable[Instance]) -> dict[DeviceId, set[ModelId]]:
    present: dict[DeviceId, set[ModelId]] = {}
    for instance in instances:
        if instance.state in AT_REST:
            continue
        for device in instance.placement:
            present.setdefault(device, set()).add(instance.model)
    return present
