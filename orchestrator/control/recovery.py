"""The first state of a server: what the store remembers, against what the engine really has. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.control.effects import ended
from orchestrator.control.ports import Exit, Found, Kept
from orchestrator.core.entities import Action, AttemptId, Model, ModelId, Note, Start, Stop
from orchestrator.core.events import Adopted, Event
from orchestrator.core.lifecycle import HAS_PROCESS, MAY_BE_ADOPTED, Instance, State, awaiting_stray

ORPHAN_GRACE_S = 10.0
SHUT_DOWN = "the orchestrator was stopped"
"""The stop reason of what a clean stop of ours ended: nobody unloaded it."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """`instances` to begin with, `actions` that finish what was half done, `events` that were missed.

    `lost` are models that were loaded before, and are gone without anybody having unloaded them.
    """

    instances: Mapping[ModelId, Instance]
    actions: tuple[Action, ...]
    events: tuple[Event, ...]
    adopted: tuple[AttemptId, ...]
    lost: tuple[ModelId, ...]
    notes: tuple[Note, ...]


def recover(
    kept: Kept, found: Iterable[Found], models: Mapping[ModelId, Model], *, now_s: float
) -> Recovered:
    """Adopt what runs, repeat what was being stopped, drop what is gone, stop what nobody knows."""
    everything = tuple(found)
    running = {item.attempt: item for item in everything if item.has_run}
    instances: dict[ModelId, Instance] = {}
    actions: list[Action] = []
    events: list[Event] = []
    adopted: list[AttemptId] = []
    lost: list[ModelId] = []
    notes: list[Note] = []
    for old in kept.instances.values():
        place = running.get(old.attempt or "")
        if place is not None and place.is_lent and old.state in MAY_BE_ADOPTED:
            place = None  # somebody has started it again
        elif place is not None:
            del running[place.attempt]
        old = replace(old, unloads=())  # who waits for its end asks again
        if kept.same_boot or (place is not None and place.is_running):
            one = recover_one(old if kept.same_boot else without_times(old, now_s), place, models, now_s)
        else:
            one = after_reboot(without_times(old, now_s))
        instances[old.model] = one.instance
        actions += one.actions
        events += one.events
        if one.note:
            notes.append(Note("recovered", f"'{old.model}': {one.note}", old.model, old.attempt))
        if one.instance.state in HAS_PROCESS and one.instance.attempt:
            adopted.append(one.instance.attempt)
        if one.was_lost:
            lost.append(old.model)
    unknown = [item for item in running.values() if item.is_running]
    lent = [item for item in unknown if item.is_lent]
    events += [Adopted(item.model, item.attempt, item.gpus) for item in lent]
    actions += [Start(item.attempt, item.model, {}) for item in lent]
    for item in (item for item in unknown if not item.is_lent):
        actions.append(stop_of(item, "nobody knows this attempt"))
        notes.append(Note("orphan", f"an attempt of '{item.model}' that nobody knows is stopped", item.model))
        instances[item.model] = awaited(instances.get(item.model, Instance(item.model)), item, now_s)
    to_start = {i.attempt for i in instances.values() if i.state is State.CLAIMED}
    unstarted = (item for item in everything if not item.has_run and item.attempt not in to_start)
    actions += [stop_of(item, "it was created and never started") for item in unstarted]
    return Recovered(instances, tuple(actions), tuple(events), tuple(adopted), tuple(lost), tuple(notes))


@dataclass(frozen=True, slots=True)
class One:
    instance: Instance
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    note: str = ""
    was_lost: bool = False


def recover_one(old: Instance, place: Found | None, models: Mapping[ModelId, Model], now_s: float) -> One:
    is_running = place is not None and place.is_running
    match old.state:
        case State.STOPPED | State.FAILED:
            return stop_stray(old, place, now_s)
        case State.QUEUED:
            return One(at_rest(old))
        case State.CLAIMED | State.STARTING | State.READY if is_running and place is not None:
            return adopt(old, place, models, now_s)
        case State.CLAIMED | State.STARTING:
            return missed_exit(old, place) if place else start_again(old, models, now_s)
        case State.READY:
            if place is not None:
                return missed_exit(old, place)
            return One(at_rest(old), note="it is gone; the machine was restarted?", was_lost=True)
        case State.DRAINING | State.STOPPING | State.STUCK if is_running:
            stopping = replace(old, state=State.STOPPING, since_s=now_s)
            return One(stopping, (stop_again(old, models),), note="its stop is finished now")
        case State.DRAINING | State.STOPPING | State.STUCK:
            stopping = replace(old, state=State.STOPPING, since_s=now_s)
            end = ended(old.model, old.attempt or "", (place.exit if place else None) or Exit(None))
            return One(stopping, events=(end,))
        case _:
            return One(replace(old, gone_at_s=now_s))


def after_reboot(old: Instance) -> One:
    """The machine took everything down with it: no failure of the model's, whatever its exit says."""
    was_loaded = old.state in (State.STARTING, State.READY) or old.stop_reason == SHUT_DOWN
    note = "it is gone with the machine's restart" if old.state in HAS_PROCESS else ""
    return One(at_rest(replace(old, stop_reason=None)), note=note, was_lost=was_loaded)


def adopt(old: Instance, place: Found, models: Mapping[ModelId, Model], now_s: float) -> One:
    """A ready one serves on, idle from now; one that was starting goes on with the time that is left."""
    model = models.get(old.model)
    if model is None:
        stopping = replace(old, state=State.STOPPING, since_s=now_s)
        return One(stopping, (stop_again(old, models),), note="it is no longer in the catalogue")
    if old.state is State.READY and place.port is not None:
        ready = replace(old, host=place.host, port=place.port, ready_at_s=now_s)
        return One(ready, note="found running, adopted")
    starting = replace(old, state=State.STARTING, started_at_s=old.started_at_s or now_s)
    start = Start(old.attempt or "", old.model, old.placement, old.parameters)
    return One(starting, (start,), note="found starting, goes on")


def start_again(old: Instance, models: Mapping[ModelId, Model], now_s: float) -> One:
    """Nothing runs of it; if its start was ordered, the engine may yet complete a dead caller's request.

    So the same attempt is started, once there is room for it: whoever comes first, it runs once.
    """
    if old.state is State.CLAIMED or old.model not in models or old.unload_wanted:
        return One(at_rest(old), note="its start never happened")
    claimed = replace(old, state=State.CLAIMED, since_s=now_s, host=None, port=None)
    return One(claimed, note="its start never happened; it is started now")


def missed_exit(old: Instance, place: Found) -> One:
    """It ended while nobody watched: tell the loop as if it had just been seen."""
    exit_ = place.exit or Exit(None)
    instance = replace(old, state=State.STARTING) if old.state is State.CLAIMED else old
    return One(instance, events=(ended(old.model, old.attempt or "", exit_),))


def stop_stray(old: Instance, place: Found | None, now_s: float) -> One:
    """At rest in the store, and running all the same: an engine finished a dead caller's request late."""
    was_lost = old.stop_reason == SHUT_DOWN
    old = replace(old, stop_reason=None) if was_lost else old
    if place is None or not place.is_running:
        return One(old, was_lost=was_lost)
    stop = stop_of(place, "it should have been stopped")
    note = "found running though it was stopped; stopped again"
    return One(awaited(old, place, now_s), (stop,), note=note, was_lost=was_lost)


def awaited(old: Instance, place: Found, now_s: float) -> Instance:
    """Nothing of a model starts beside a stray of it, nor is a start of it ordered again."""
    resting = at_rest(old) if old.state is State.CLAIMED else old
    return awaiting_stray(resting, place.attempt, now_s=now_s)


def stop_of(place: Found, reason: str) -> Stop:
    return Stop(place.attempt, place.model, ORPHAN_GRACE_S, reason)


def stop_again(old: Instance, models: Mapping[ModelId, Model]) -> Stop:
    model = models.get(old.model)
    grace_s = model.stop_grace_s if model else ORPHAN_GRACE_S
    return Stop(old.attempt or "", old.model, grace_s, old.stop_reason or "stopping")


def at_rest(old: Instance) -> Instance:
    return old.without_attempt(State.FAILED if old.failure else State.STOPPED)


def shut_down(instances: Mapping[ModelId, Instance]) -> dict[ModelId, Instance]:
    """The rows to save before a clean stop ends everything: at rest, and to be restored."""
    rows = {}
    for model, instance in instances.items():
        if instance.state in HAS_PROCESS:
            serves = instance.state in (State.STARTING, State.READY) and not instance.unload_wanted
            reason = SHUT_DOWN if serves else instance.stop_reason
            rows[model] = replace(at_rest(instance), attempt=instance.attempt, stop_reason=reason)
    return rows


def without_times(old: Instance, now_s: float) -> Instance:
    """After a reboot the monotonic clock began anew: everything is as of now."""
    return replace(
        old,
        since_s=now_s,
        claimed_at_s=now_s,
        started_at_s=now_s,
        ready_at_s=None if old.ready_at_s is None else now_s,
        retry_at_s=None if old.retry_at_s is None else now_s,
        gone_at_s=None if old.gone_at_s is None else now_s,
    )
