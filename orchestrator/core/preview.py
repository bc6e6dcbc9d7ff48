"""What a load would do, without doing it: the planner's own decision about one more wish.

The load is folded into the snapshot as if it had been asked for, the planner plans that, and what it decided
is read off. Nothing of it is kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias

from orchestrator.core.draft import Draft
from orchestrator.core.entities import AttemptId, Demand, DeviceId, Model, ModelId, Usage
from orchestrator.core.events import LoadAsked
from orchestrator.core.fold import fold
from orchestrator.core.learning import taught_model
from orchestrator.core.lifecycle import LEAVING, Instance, State
from orchestrator.core.planner import make_plan
from orchestrator.core.refusal import refusal
from orchestrator.core.snapshot import Plan, Snapshot, apply
from orchestrator.core.verdicts import Ready, Verdict
from orchestrator.core.victims import Candidate, as_candidate

ASKER = "preview"
"""The operation that is only imagined."""

LAYERS = "n_gpu_layers"

UNDER_WAY = frozenset({State.CLAIMED, State.STARTING})


Parameters: TypeAlias = Mapping[str, int | str]
"""What a model is run with, by the names of its entry: `context_size` and the like."""


class Outcome(StrEnum):
    LOADED = "loaded"  # it serves already
    LOADING = "loading"  # a load is under way, and would be joined
    STARTS = "starts"  # at once
    WAITS = "waits"  # for somebody to leave, or for its turn
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Eviction:
    """Somebody who would leave, and what speaks for it; cheaper ones leave first.

    One with requests in flight is drained. `reload_cost` is its load time (`load_time_s`) by how often a
    second it is used.
    """

    model: ModelId
    frees: Mapping[DeviceId, int]
    in_flight: int
    idle_s: float
    priority: int
    load_time_s: float
    reload_cost: float


@dataclass(frozen=True, slots=True)
class Room:
    """What is available on a device, in bytes: now, and once all that is decided has happened."""

    before_bytes: int
    after_bytes: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What a load of `model` would come to. `verdict` is what a load would be answered at once, if anything.

    `parameters` are what would be chosen where the entry leaves it to us. `room` has the measured devices.
    `waits_for` is empty unless it waits.
    """

    model: Model
    state: State
    outcome: Outcome
    placement: Mapping[DeviceId, int] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    evictions: tuple[Eviction, ...] = ()
    room: Mapping[DeviceId, Room] = field(default_factory=dict)
    waits_for: str = ""
    verdict: Verdict | None = None


def preview(snapshot: Snapshot, usage: Mapping[AttemptId, Usage], model: Model) -> Preview:
    """What would become of a load of the model, asked for at `snapshot.now_s`."""
    asked = fold(snapshot, [LoadAsked(model.id, ASKER)], now_s=snapshot.now_s, wall_s=snapshot.wall_s)
    plan = make_plan(asked, usage)
    after = apply(asked, plan)
    before, planned = snapshot.instance(model.id), after.instance(model.id)
    verdict = after.verdicts.get(ASKER)
    outcome = outcome_of(before, planned, verdict)
    is_placed = outcome is not Outcome.REFUSED
    return Preview(
        model=model,
        state=before.state,
        outcome=outcome,
        placement=planned.placement if is_placed else {},
        parameters=planned.parameters if is_placed else {},
        evictions=tuple(evictions(Draft(asked, usage), plan, model.id)),
        room=room(Draft(snapshot, usage), Draft(after, usage)),
        waits_for=waits_for(after, planned) if outcome is Outcome.WAITS else "",
        verdict=verdict,
    )


def outcome_of(before: Instance, planned: Instance, verdict: Verdict | None) -> Outcome:
    if verdict is not None:
        return Outcome.LOADED if isinstance(verdict, Ready) else Outcome.REFUSED
    if before.state in UNDER_WAY and before.attempt == planned.attempt:
        return Outcome.LOADING
    return Outcome.STARTS if planned.state is State.STARTING else Outcome.WAITS


def evictions(draft: Draft, plan: Plan, model: ModelId) -> Iterable[Eviction]:
    """Whom the plan evicts for the model, in its order; `draft` is of before the plan."""
    for note in plan.notes:
        if note.kind == "evicted" and note.data.get("by") == model and note.model is not None:
            instance = draft.instance(note.model)
            candidate = as_candidate(draft, instance)
            if candidate is not None:
                yield eviction(draft, instance, candidate)


def eviction(draft: Draft, instance: Instance, candidate: Candidate) -> Eviction:
    victim = candidate.victim
    return Eviction(
        instance.model,
        victim.frees,
        draft.in_flight(instance),
        draft.now_s - draft.last_used_s(instance),
        victim.priority,
        instance.load_time_s,
        victim.cost,
    )


def room(now: Draft, later: Draft) -> dict[DeviceId, Room]:
    measured = [device for device in now.snapshot.devices if now.reading(device) is not None]
    return {device: Room(now.available(device), later.projected(device)) for device in measured}


def waits_for(after: Snapshot, planned: Instance) -> str:
    entry = after.entries.get(planned.model)
    if planned.state is not State.CLAIMED and entry is not None:
        return entry.reason
    leaving = [
        instance.model
        for instance in after.instances.values()
        if instance.state in LEAVING and not planned.placement.keys().isdisjoint(instance.placement)
    ]
    if leaving:
        return f"{' and '.join(repr(name) for name in leaving)} to leave, and the memory to be seen free"
    return "the memory to be measured anew, or a claim before it"


# --- what would fit instead


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Other ways to run a model: each of `kinds` is a row of them, the largest first.

    `demand` says what one needs, and takes a while.
    """

    kinds: Sequence[Sequence[Parameters]]
    demand: Callable[[Parameters], Demand]


@dataclass(frozen=True, slots=True)
class Fitting:
    """A way to run a model with which it would not be refused."""

    parameters: Parameters
    demand: Demand


def would_fit(
    snapshot: Snapshot, usage: Mapping[AttemptId, Usage], model: Model, ways: Alternatives
) -> tuple[Fitting, ...]:
    """Of each kind the largest that would not be refused now."""
    draft = Draft(snapshot, usage)

    def changed(parameters: Parameters) -> Model:
        recipe = model.recipe and replace(model.recipe, **parameters)  # type: ignore[arg-type]
        way = replace(model, demand=ways.demand(parameters), recipe=recipe, untaught=None, variants=())
        return taught_model(snapshot, way)

    def fits(parameters: Parameters) -> bool:
        return refusal(draft, changed(parameters)) is None

    def fits_on_gpu(parameters: Parameters) -> bool:
        way = changed(parameters)
        return refusal(draft, replace(way, demand=without_host(way.demand))) is None

    def largest(kind: Sequence[Parameters]) -> Sequence[Parameters]:
        # Fewer layers on the GPU are more in RAM: of those that the GPU takes the most need least of that.
        key = fits_on_gpu if kind and LAYERS in kind[0] else fits
        return [way for way in kind[bisect_left(kind, True, key=key) :][:1] if fits(way)]

    fitting = (parameters for kind in ways.kinds for parameters in largest(kind))
    return tuple(
        Fitting(parameters, demand_where_it_fits(draft, changed(parameters))) for parameters in fitting
    )


def without_host(demand: Demand) -> Demand:
    splits = tuple(replace(split, host_bytes=0) for split in demand.splits)
    return replace(demand, host_bytes=0, splits=splits)


def demand_where_it_fits(draft: Draft, model: Model) -> Demand:
    """Over the first number of GPUs over which it is not refused."""
    over = (
        count for count in model.gpu_counts if refusal(draft, replace(model, gpu_counts=(count,))) is None
    )
    return model.demand.over(next(over, 0))
