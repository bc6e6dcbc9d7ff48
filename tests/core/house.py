"""A house that lives by the core alone: fold, plan, apply, over devices and models of a test's making.

Everybody always wants everything: each model has a client that asks again as soon as it was answered, and
keeps a request in flight for as long as it is let. Time passes in steps; loads, requests and stops take as
long as the model says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from orchestrator.core.entities import (
    AttemptId,
    Device,
    Model,
    ModelId,
    Reading,
    Sample,
    Start,
    Stop,
    Usage,
)
from orchestrator.core.events import BecameHealthy, Ended, Event, Sampled, Started, WaiterCame
from orchestrator.core.fold import fold
from orchestrator.core.lifecycle import State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Snapshot, apply

STEP_S = 0.5
FOREVER_S = 1e9


@dataclass(frozen=True)
class Habit:
    """How long a model takes to load, to answer one request, and to stop."""

    load_s: float = 5.0
    request_s: float = 5.0
    stop_s: float = 1.0


@dataclass
class Running:
    """An attempt's process: its bytes by device, and when the request in flight ends."""

    model: ModelId
    placement: dict[str, int]
    request_ends_s: float | None = None
    entered: int = 0
    last_ended_s: float | None = None


@dataclass
class House:
    devices: list[Device]
    models: list[Model]
    habits: dict[ModelId, Habit]
    now_s: float = 1000.0
    running: dict[AttemptId, Running] = field(default_factory=dict)
    due: list[tuple[float, Event]] = field(default_factory=list)
    asked_s: dict[ModelId, float] = field(default_factory=dict)
    longest_wait_s: dict[ModelId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.snapshot = Snapshot(
            now_s=self.now_s,
            wall_s=0.0,
            seed="h",
            devices={d.id: d for d in self.devices},
            models={m.id: m for m in self.models},
            sample=self.sample(),
        )

    def live(self, seconds: float, wanted: Iterable[ModelId] | None = None) -> None:
        """Let time pass while somebody always wants each of the `wanted` models (all of them)."""
        names = [m.id for m in self.models] if wanted is None else list(wanted)
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += STEP_S
            self.step(names)

    def step(self, wanted: list[ModelId]) -> None:
        happened = [event for at_s, event in self.due if at_s <= self.now_s]
        self.due = [(at_s, event) for at_s, event in self.due if at_s > self.now_s]
        for event in happened:
            if isinstance(event, Ended):
                self.running.pop(event.attempt, None)
        self.end_requests()
        asked = [self.ask(name) for name in wanted if self.is_missing(name)]
        folded = fold(
            self.snapshot, [*happened, Sampled(self.sample()), *asked], now_s=self.now_s, wall_s=0.0
        )
        plan = make_plan(folded, self.usage())
        self.snapshot = apply(folded, plan)
        for action in plan.actions:
            self.perform(action)
        self.enter(wanted)
        self.count_waits()

    def perform(self, action: Start | Stop) -> None:
        model, attempt = action.model, action.attempt
        habit = self.habits[model]
        if isinstance(action, Start):
            self.running[attempt] = Running(model, dict(action.placement))
            self.due.append((self.now_s, Started(model, attempt, "here", 1)))
            self.due.append((self.now_s + habit.load_s, BecameHealthy(model, attempt)))
        else:
            self.due.append((self.now_s + habit.stop_s, Ended(model, attempt, 0)))

    def sample(self) -> Sample:
        readings = {}
        for device in self.devices:
            used = {a: r.placement.get(device.id, 0) for a, r in self.running.items()}
            total = sum(used.values())
            assert total <= device.capacity_bytes, "overbooked"
            readings[device.id] = Reading(device.capacity_bytes - total, total, used)
        return Sample(self.now_s, readings)

    def usage(self) -> dict[AttemptId, Usage]:
        return {
            attempt: Usage(int(one.request_ends_s is not None), one.entered, one.last_ended_s)
            for attempt, one in self.running.items()
        }

    # --- the clients

    def is_missing(self, name: ModelId) -> bool:
        return name not in self.snapshot.entries and self.snapshot.instance(name).state is not State.READY

    def ask(self, name: ModelId) -> WaiterCame:
        self.asked_s.setdefault(name, self.now_s)
        return WaiterCame(name, f"r-{name}", FOREVER_S)

    def enter(self, wanted: list[ModelId]) -> None:
        for one in self.running.values():
            is_open = one.model in wanted and self.snapshot.instance(one.model).state is State.READY
            if is_open and one.request_ends_s is None:
                one.request_ends_s = self.now_s + self.habits[one.model].request_s
                one.entered += 1

    def end_requests(self) -> None:
        """A client of a ready model begins its next request in the moment its last one ends."""
        for one in self.running.values():
            if one.request_ends_s is not None and one.request_ends_s <= self.now_s:
                one.last_ended_s = self.now_s
                goes_on = self.snapshot.instance(one.model).state is State.READY
                one.request_ends_s = self.now_s + self.habits[one.model].request_s if goes_on else None

    def count_waits(self) -> None:
        """A wait is over when the model is ready; one that still lasts counts as far as it has come."""
        for name, since_s in list(self.asked_s.items()):
            waited_s = self.now_s - since_s
            self.longest_wait_s[name] = max(waited_s, self.longest_wait_s.get(name, 0.0))
            if self.snapshot.instance(name).state is State.READY:
                del self.asked_s[name]


def with_habits(models: list[Model], habits: dict[ModelId, Habit]) -> list[Model]:
    """The models with limits that their habits keep."""
    return [
        replace(
            m, start_timeout_s=habits[m.id].load_s + STEP_S, drain_limit_s=habits[m.id].request_s + STEP_S
        )
        for m in models
    ]
