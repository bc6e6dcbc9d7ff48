"""What happened, folded into the snapshot: observations, and what users ask for.

Nothing is decided here beyond what an event itself says; the planner decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from orchestrator.core import events as ev
from orchestrator.core.downloads import download_news
from orchestrator.core.entities import (
    HOST,
    MIB,
    Device,
    DeviceId,
    DownloadState,
    Failure,
    ModelId,
    Note,
    Operation,
    OperationId,
    OperationKind,
    OperationState,
    Sample,
    WaiterId,
)
from orchestrator.core.failures import GPU_OUT_OF_MEMORY, failure_of, with_failure
from orchestrator.core.foreign import container_named, with_names_shown
from orchestrator.core.incidents import incidents_heard, with_blindness_told, with_strangers
from orchestrator.core.learning import learn, with_floor, with_lessons, without_lessons
from orchestrator.core.ledger import coming_back
from orchestrator.core.lifecycle import Instance, Signal, State, advance, awaiting_stray
from orchestrator.core.measuring import last_measured, measure
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Broken, Downloading, QueueFull, Ready, Unloaded, Unusable, Verdict
from orchestrator.core.waiting import new_entry, still_kept, with_age_kept
from orchestrator.core.wording import describe, mib

K = TypeVar("K")
V = TypeVar("V")

RECLAIM_LIMIT_S = 5.0
BLIND_LIMIT_S = 30.0
SEEN_BACK_TOLERANCE_BYTES = 16 * MIB


def fold(snapshot: Snapshot, events: Iterable[ev.Event], *, now_s: float, wall_s: float) -> Snapshot:
    """The snapshot as it is after the events, in their order."""
    ages = still_kept(snapshot.ages, now_s)
    state = replace(snapshot, now_s=now_s, wall_s=wall_s, ages=ages, verdicts={}, notes=())
    for event in events:
        state = fold_one(state, event)
    return state


def fold_one(state: Snapshot, event: ev.Event) -> Snapshot:
    match event:
        case ev.Sampled() | ev.IncidentsHeard() | ev.ContainerNamed():
            return device_news(state, event)
        case ev.WaiterCame():
            return waiter_came(state, event)
        case ev.WaiterLeft():
            return waiter_left(state, event)
        case ev.LoadAsked():
            return load_asked(state, event)
        case ev.UnloadAsked():
            return unload_asked(state, event)
        case ev.Started() | ev.BecameHealthy() | ev.BuffersLogged() | ev.Ended() | ev.Progressed():
            return attempt_news(state, event)
        case ev.Strayed() | ev.Adopted():
            return found_unknown(state, event)
        case ev.CatalogueRead() | ev.ForgettingAsked():
            return footprints_changed(state, event)
        case ev.Woken():
            return state
        case _:
            return download_news(state, event)


def footprints_changed(state: Snapshot, event: ev.CatalogueRead | ev.ForgettingAsked) -> Snapshot:
    if isinstance(event, ev.ForgettingAsked):
        return without_lessons(state, event.keys)
    return with_lessons(with_devices(replace(state, models=event.models), event.devices))


def with_devices(state: Snapshot, devices: Mapping[DeviceId, Device]) -> Snapshot:
    """What was measured of one that has another size now, as a budget of RAM may, says nothing any more."""
    before = {(device.id, device.capacity_bytes) for device in state.devices.values()}
    same = {device.id for device in devices.values() if (device.id, device.capacity_bytes) in before}
    readings = {device: reading for device, reading in state.sample.readings.items() if device in same}
    return replace(state, devices=devices, sample=replace(state.sample, readings=readings))


def device_news(state: Snapshot, event: ev.Sampled | ev.IncidentsHeard | ev.ContainerNamed) -> Snapshot:
    if isinstance(event, ev.Sampled):
        return sampled(state, event.sample)
    if isinstance(event, ev.IncidentsHeard):
        return incidents_heard(state, event.incidents)
    return container_named(state, event)


def attempt_news(
    state: Snapshot, event: ev.Started | ev.BecameHealthy | ev.BuffersLogged | ev.Ended | ev.Progressed
) -> Snapshot:
    """News of an attempt; of an older attempt it is no news."""
    instance = state.instance(event.model)
    if instance.attempt != event.attempt:
        return state
    match event:
        case ev.Started():
            since_s = state.now_s if instance.state is State.STARTING else instance.since_s
            return put(state, replace(instance, host=event.host, port=event.port, since_s=since_s))
        case ev.BecameHealthy():
            return became_healthy(state, instance)
        case ev.BuffersLogged() if instance.state not in (State.READY, State.DRAINING):
            return state
        case ev.BuffersLogged():
            return replace(state, logged={**state.logged, event.attempt: event.buffers})
        case ev.Ended():
            return ended(state, instance, event)
        case ev.Progressed() if instance.state is not State.STARTING:
            return state
        case ev.Progressed():
            return replace(state, progress={**state.progress, event.attempt: event.progress})


# --- what users ask for


def load_asked(state: Snapshot, event: ev.LoadAsked) -> Snapshot:
    operation = new_operation(state, event.operation, OperationKind.LOAD, event.model)
    state = replace(state, operations={**state.operations, operation.id: operation})
    state = replace(state, holds=without(state.holds, event.model))
    if event.pin is not None:
        state = replace(state, pins={**state.pins, event.model: event.pin})
    verdict = immediate_verdict(state, event.model)
    if verdict is not None:
        return judge(state, verdict, event.operation)
    return join_queue(state, event.model, event.operation, tries_now=True)


def waiter_came(state: Snapshot, event: ev.WaiterCame) -> Snapshot:
    verdict = (
        immediate_verdict(state, event.model)
        or held_out(state, event.model)
        or backing_off(state, event)
        or full_queue(state, event.model)
    )
    if verdict is not None:
        return judge(state, verdict, event.waiter)
    return join_queue(state, event.model, event.waiter)


def immediate_verdict(state: Snapshot, model_id: ModelId) -> Verdict | None:
    """Ready already, or never to be."""
    model = state.models.get(model_id)
    if model is None:
        return Unusable(model_id, "it is no longer in the catalogue.")
    instance = state.instance(model_id)
    if instance.state is State.READY and not instance.unload_wanted and instance.attempt:
        return Ready(model_id, instance.attempt)
    if model.problem is None:
        return None
    download = state.downloads.get(model_id)
    if download is not None and download.state is DownloadState.RUNNING:
        return Downloading(model_id, state.downloaded_bytes.get(model_id, 0), download.total_bytes)
    return Unusable(model_id, model.problem)


def held_out(state: Snapshot, model: ModelId) -> Verdict | None:
    until_s = state.holds.get(model)
    return Unloaded(model, until_s) if until_s is not None and until_s > state.now_s else None


def backing_off(state: Snapshot, event: ev.WaiterCame) -> Verdict | None:
    """A request is held if the next try is due before its deadline; else it learns when that is."""
    instance = state.instance(event.model)
    entry = state.entries.get(event.model)
    if instance.failure is None or instance.retry_at_s is None or (entry and entry.tries_now):
        return None
    if instance.retry_at_s <= event.deadline_s or not instance.is_waiting_to_retry:
        return None
    return Broken(event.model, instance.failure, instance.retry_at_s)


def full_queue(state: Snapshot, model_id: ModelId) -> Verdict | None:
    entry = state.entries.get(model_id)
    limit = state.models[model_id].queue_limit
    return QueueFull(model_id, limit) if entry and len(entry.waiters) >= limit else None


def join_queue(state: Snapshot, model: ModelId, waiter: WaiterId, *, tries_now: bool = False) -> Snapshot:
    entry = state.entries.get(model) or new_entry(model, state.ages, state.now_s)
    if waiter not in entry.waiters:
        entry = replace(entry, waiters=(*entry.waiters, waiter), tries_now=entry.tries_now or tries_now)
    return replace(state, entries={**state.entries, model: entry})


def waiter_left(state: Snapshot, event: ev.WaiterLeft) -> Snapshot:
    entry = state.entries.get(event.model)
    if entry is None or event.waiter not in entry.waiters:
        return state
    rest = tuple(waiter for waiter in entry.waiters if waiter != event.waiter)
    if not rest:
        ages = with_age_kept(state.ages, entry, state.instance(event.model), state.now_s)
        return replace(state, entries=without(state.entries, event.model), ages=ages)
    return replace(state, entries={**state.entries, event.model: replace(entry, waiters=rest)})


def unload_asked(state: Snapshot, event: ev.UnloadAsked) -> Snapshot:
    """Whoever waits for the model learns that it was unloaded; what runs is marked to leave."""
    hold_until_s = state.now_s + event.hold_s if event.hold_s else None
    if hold_until_s is not None:
        state = replace(state, holds={**state.holds, event.model: hold_until_s})
    state = replace(state, pins=without(state.pins, event.model))
    state = judge_queue(state, event.model, Unloaded(event.model, hold_until_s))
    operation = new_operation(state, event.operation, OperationKind.UNLOAD, event.model)
    instance = state.instance(event.model)
    if instance.is_at_rest or instance.state is State.QUEUED:
        done = finish(state, operation, f"'{event.model}' was not loaded.")
        if instance.state is State.FAILED:
            instance = advance(instance, Signal.CANCEL, now_s=state.now_s)
        forgiven = replace(instance, failure=None, failures=0, retry_at_s=None, is_failing=False)
        state = put(state, forgiven)
        return replace(state, operations={**state.operations, done.id: done})
    state = replace(state, operations={**state.operations, operation.id: operation})
    if instance.is_failing:  # it ends as its user wants now
        instance = replace(instance, is_failing=False, failure=None, failures=0, retry_at_s=None)
    wanted = replace(
        instance,
        unload_wanted=True,
        force=instance.force or event.force,
        unloads=(*instance.unloads, operation.id),
        drained_for=None,
        stop_reason=instance.stop_reason or "unloaded by request",
    )
    return put(state, wanted)


def new_operation(state: Snapshot, key: OperationId, kind: OperationKind, model: ModelId) -> Operation:
    """The operation, or the same again: after a restart what had not ended is asked for anew."""
    return state.operations.get(key) or Operation(key, kind, model, created_at=state.wall_s)


def finish(state: Snapshot, operation: Operation, message: str, freed_bytes: int = 0) -> Operation:
    return replace(
        operation,
        state=OperationState.SUCCEEDED,
        message=message,
        freed_bytes=freed_bytes,
        ended_at=state.wall_s,
    )


# --- what attempts report


def found_unknown(state: Snapshot, event: ev.Strayed | ev.Adopted) -> Snapshot:
    if isinstance(event, ev.Adopted):
        return adopted(state, event)
    return put(state, awaiting_stray(state.instance(event.model), event.attempt, now_s=state.now_s))


def adopted(state: Snapshot, event: ev.Adopted) -> Snapshot:
    """What somebody else has started goes on as the model's attempt, with what the model reserves.

    Its memory is taken already: the devices show it, so nothing has to be admitted. While a user holds the
    model out it stays its owner's: we would neither serve it nor end what we did not start.
    """
    model, instance = state.models.get(event.model), state.instance(event.model)
    starting = advance(instance, Signal.ADOPTED, now_s=state.now_s)
    if model is None or starting is instance or held_out(state, event.model) is not None:
        return state
    gpus = [d.id for d in state.gpus() if event.gpus is None or d.id in event.gpus]
    fresh = replace(
        starting.without_attempt(State.STARTING),
        attempt=event.attempt,
        placement=model.demand.spread(gpus or [HOST]),
        claimed_at_s=state.now_s,
        started_at_s=state.now_s,
    )
    return put(note(state, "adopted", f"'{fresh.model}' runs already and is taken over", fresh), fresh)


def became_healthy(state: Snapshot, instance: Instance) -> Snapshot:
    ready = advance(instance, Signal.HEALTHY, now_s=state.now_s)
    if ready is instance:
        return state
    load_time_s = state.now_s - instance.started_at_s
    ready = replace(ready, ready_at_s=state.now_s, load_time_s=load_time_s, failure=None, retry_at_s=None)
    state = note(state, "ready", f"'{ready.model}' is ready after {load_time_s:.2f} s", ready, s=load_time_s)
    state = put(state, ready)
    progress = without(state.progress, ready.attempt or "")
    state = replace(state, progress=progress, ages=without(state.ages, ready.model))
    if ready.unload_wanted or ready.attempt is None:
        return state
    return judge_queue(state, ready.model, Ready(ready.model, ready.attempt))


def ended(state: Snapshot, instance: Instance, event: ev.Ended) -> Snapshot:
    """Its process is gone: its reservation goes, and its bytes are waited for."""
    gone = advance(instance, Signal.EXITED, now_s=state.now_s)
    if gone is instance:
        return state
    was_wanted = instance.state in (State.STOPPING, State.STUCK) or instance.unload_wanted
    if not was_wanted:
        gone = with_failure(gone, failure_of(event), state.now_s)
    held = last_measured(state, instance)
    gone = replace(
        gone,
        gone_at_s=state.now_s,
        host=None,
        port=None,
        reclaim_measured_s=0.0,
        held_bytes={device: measured.used_bytes for device, measured in held.items()},
        unexplained_before={device: measured.unexplained_bytes for device, measured in held.items()},
    )
    state = replace(
        state,
        released_at_s={**state.released_at_s, **dict.fromkeys(gone.placement, state.now_s)},
        measured=without(state.measured, event.attempt),
        faults=without(state.faults, event.attempt),
        progress=without(state.progress, event.attempt),
        logged=without(state.logged, event.attempt),
    )
    if gone.failure is not None and gone.is_failing:
        state = failed(state, instance, gone, gone.failure)
    return put(replace(state, started_as=without(state.started_as, event.attempt)), gone)


def failed(state: Snapshot, before: Instance, gone: Instance, failure: Failure) -> Snapshot:
    """Whoever waits for a start learns why it failed. One that the GPU had no room for is tried again once:
    it is promised more then, so the planner makes room first."""
    text = f"'{gone.model}' failed: {describe(failure)}"
    state = note(state, "failed", text, gone, exit_code=failure.exit_code, oom=failure.oom)
    if before.state is not State.STARTING:
        return state
    if failure.code == GPU_OUT_OF_MEMORY:
        state = with_floor(state, before)
        if before.failure is None or before.failure.code != GPU_OUT_OF_MEMORY:
            return state
    return judge_queue(state, gone.model, Broken(gone.model, failure, gone.retry_at_s))


# --- what the devices show


def sampled(state: Snapshot, sample: Sample) -> Snapshot:
    """Take the newer sample; learn each attempt's use; let go of what has been seen to come back."""
    if sample.taken_at_s < state.sample.taken_at_s:
        return state
    previous = state.sample
    gap_s = min(1.0, sample.taken_at_s - previous.taken_at_s)
    blind = {device: state.blind_since_s.get(device, sample.taken_at_s) for device in sample.errors}
    broken = {device: state.broken_since_s.get(device, sample.taken_at_s) for device in sample.broken}
    state = with_blindness_told(state, sample)
    state = replace(state, sample=sample, blind_since_s=blind, broken_since_s=broken)
    state = with_strangers(state, sample)
    for instance in tuple(state.instances.values()):
        if instance.state in (State.STARTING, State.READY, State.DRAINING, State.STOPPING):
            state = measure(state, instance, sample, previous)
        elif instance.state is State.RECLAIMING:
            state = reclaim(state, instance, sample, gap_s)
    return learn(with_names_shown(state), sample)


def reclaim(state: Snapshot, instance: Instance, sample: Sample, gap_s: float) -> Snapshot:
    """A gone instance is at rest once its bytes are back, or after 5 s in which that could be seen."""
    if instance.gone_at_s is None or sample.taken_at_s < instance.gone_at_s:
        return state
    missing = missing_bytes(state, instance, sample)
    if missing is None:
        return give_up_looking(state, instance)
    waited_s = instance.reclaim_measured_s + gap_s
    if missing and waited_s < RECLAIM_LIMIT_S:
        return put(state, replace(instance, reclaim_measured_s=waited_s))
    freed = sum(instance.held_bytes.values()) - missing
    if missing:
        text = f"{mib(missing)} that '{instance.model}' held did not come back within {RECLAIM_LIMIT_S:.0f} s"
        state = note(state, "leak", text, instance, missing_mib=round(missing / MIB))
    else:
        seconds = state.now_s - instance.gone_at_s
        text = f"'{instance.model}' gave back {mib(freed)}"
        state = note(state, "freed", text, instance, freed_mib=round(freed / MIB), s=seconds)
    return let_go(state, instance, freed, missing)


def give_up_looking(state: Snapshot, instance: Instance) -> Snapshot:
    """Not measurable: neither back nor lost. After a while the model is let go all the same.

    Nothing is admitted on a device that cannot be measured, and once it can be, what is still in use there
    counts as used. So no promise is broken, and the model can be loaded on another device.
    """
    if max(state.blind_s(d) for d in instance.held_bytes if d in state.devices) < BLIND_LIMIT_S:
        return state
    text = f"nobody could see what '{instance.model}' gave back: its device has not been measurable"
    return let_go(note(state, "unseen", text, instance), instance, 0)


def let_go(state: Snapshot, instance: Instance, freed_bytes: int, missing_bytes: int = 0) -> Snapshot:
    signal = Signal.SEEN_FREE_FAILED if instance.is_failing else Signal.SEEN_FREE
    state = finish_unloads(state, instance, freed_bytes, missing_bytes)
    at_rest = advance(instance, signal, now_s=state.now_s)
    return put(state, replace(at_rest, unload_wanted=False, force=False, unloads=(), placement={}))


def missing_bytes(state: Snapshot, instance: Instance, sample: Sample) -> int | None:
    """What has not come back beyond measuring noise, or None where a device cannot be read.

    A device that is no longer there has taken its memory with it.
    """
    missing = 0
    for device, held in instance.held_bytes.items():
        if device not in state.devices:
            continue
        reading = sample.readings.get(device)
        if reading is None:
            return None
        still_used = coming_back(instance, device, reading)
        if still_used > min(SEEN_BACK_TOLERANCE_BYTES, held // 4):
            missing += still_used
    return missing


def finish_unloads(state: Snapshot, instance: Instance, freed_bytes: int, missing_bytes: int) -> Snapshot:
    missing = f", {mib(missing_bytes)} did not" if missing_bytes else ""
    done = {
        key: finish(
            state,
            state.operations[key],
            f"'{instance.model}' was unloaded; {mib(freed_bytes)} came back{missing}.",
            freed_bytes,
        )
        for key in instance.unloads
        if key in state.operations
    }
    return replace(state, operations={**state.operations, **done}) if done else state


# --- helpers


def put(state: Snapshot, instance: Instance) -> Snapshot:
    return replace(state, instances={**state.instances, instance.model: instance})


def judge(state: Snapshot, verdict: Verdict, *waiters: WaiterId) -> Snapshot:
    return replace(state, verdicts={**state.verdicts, **dict.fromkeys(waiters, verdict)})


def judge_queue(state: Snapshot, model: ModelId, verdict: Verdict) -> Snapshot:
    """Give everyone who waits for the model this verdict; the wait is over."""
    entry = state.entries.get(model)
    if entry is None:
        return state
    state = replace(state, entries=without(state.entries, model), ages=without(state.ages, model))
    return judge(state, verdict, *entry.waiters)


def note(state: Snapshot, kind: str, text: str, instance: Instance, **data: object) -> Snapshot:
    line = Note(kind, text, instance.model, instance.attempt, data)
    return replace(state, notes=(*state.notes, line))


def without(mapping: Mapping[K, V], key: K) -> dict[K, V]:
    return {k: v for k, v in mapping.items() if k != key}
