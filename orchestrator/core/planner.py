"""The specification, as code: what should end, what may start, who waits, who leaves.

One call plans one turn. It reads a snapshot and what the gates count, and returns a plan; it performs
nothing, and the same input always gives the same plan. docs/architecture.md tells it in prose.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor

from orchestrator.core.draft import Draft
from orchestrator.core.entities import (
    HOST,
    AttemptId,
    Broken,
    DeviceId,
    Entry,
    Failure,
    Model,
    Ready,
    Start,
    Stop,
    Unmeasured,
    Unusable,
    Usage,
)
from orchestrator.core.fold import finish, with_failure
from orchestrator.core.lifecycle import LEAVING, Instance, Signal, State
from orchestrator.core.patience import KeptPlace, keep_place, respects
from orchestrator.core.placement import Choice, Placement, candidate_devices, choose, is_placement_of
from orchestrator.core.refusal import refusal
from orchestrator.core.snapshot import SAMPLE_LIMIT_S, Plan, Snapshot
from orchestrator.core.victims import Victim, victim_order
from orchestrator.core.waiting import AGING_S, effective_priority
from orchestrator.core.wording import explain, mib

DRAIN_LIMIT_S = 600.0
"""How long requests may go on that use a model which has left the catalogue."""

SETTLES_S = 10.0
"""How long what an engine was told to start may use memory before the engine has said which process it is."""

OVERDUE_S = 10.0
"""A stop that takes this long beyond its grace is stuck: it survived the kill."""


def make_plan(snapshot: Snapshot, usage: Mapping[AttemptId, Usage]) -> Plan:
    """Plan one turn: first what ends, then what was promised, then the queue."""
    draft = Draft(snapshot, usage)
    for instance in sorted(draft.instances.values(), key=lambda i: i.state is not State.CLAIMED):
        end_if_due(draft, instance)  # claims first: a drain relents when its claim is gone
    start_the_claimed(draft)
    evicted = serve_the_queue(draft)
    spare_the_needless(draft, evicted)
    start_the_claimed(draft)
    return draft.plan()


# --- what ends


def end_if_due(draft: Draft, instance: Instance) -> None:
    match instance.state:
        case State.QUEUED:
            cancel_if_unwanted(draft, instance)
        case State.CLAIMED:
            withdraw_if_unwanted(draft, instance)
        case State.STARTING:
            stop_if_unwanted_or_late(draft, instance)
        case State.READY:
            end_if_unwanted_or_idle(draft, instance)
        case State.DRAINING:
            end_drain(draft, instance)
        case State.STOPPING:
            call_stuck_if_overdue(draft, instance)
        case _:
            pass


def cancel_if_unwanted(draft: Draft, instance: Instance) -> None:
    """Nobody waits any more: as it was before."""
    if instance.model not in draft.entries:
        draft.move(instance, Signal.CANCEL_FAILED if instance.failure else Signal.CANCEL)


def withdraw_if_unwanted(draft: Draft, instance: Instance) -> None:
    if not instance.unload_wanted:
        replan_if_changed(draft, instance)
        return
    draft.note("withdrawn", f"'{instance.model}' was unloaded before it started", instance)
    finish_unloads(draft, instance)
    draft.move(instance, Signal.WITHDRAW, placement={}, unload_wanted=False, unloads=(), force=False)


def replan_if_changed(draft: Draft, claim: Instance) -> None:
    """The catalogue was read again: what it was promised is not what it needs now."""
    model = draft.model(claim.model)
    if model is None or not is_placement_of(claim.placement, model.demand):
        draft.note("replanned", f"'{claim.model}' has changed in the catalogue; planning again", claim)
        replan(draft, claim)


def finish_unloads(draft: Draft, instance: Instance) -> None:
    for key in instance.unloads:
        operation = draft.snapshot.operations.get(key)
        if operation is not None:
            message = f"'{instance.model}' was unloaded before it started."
            draft.operations[key] = finish(draft.snapshot, operation, message)


def stop_if_unwanted_or_late(draft: Draft, instance: Instance) -> None:
    model = draft.model(instance.model)
    if instance.unload_wanted or model is None:
        stop(draft, instance, "unloaded while it was starting")
        return
    if instance.port is None:
        return  # the engine has not started it yet: pulling its image, or not answering
    late_at_s = instance.since_s + model.start_timeout_s
    if draft.now_s < late_at_s:
        draft.wake(late_at_s)
        return
    failure = Failure(
        f"it did not become healthy within {model.start_timeout_s:.0f} s "
        f"({model.launch.health_path} on port {model.launch.port} never answered 200)",
        "start_timeout",
    )
    stop(draft, instance, "start took too long", failure)


def end_if_unwanted_or_idle(draft: Draft, instance: Instance) -> None:
    model = draft.model(instance.model)
    if instance.unload_wanted or model is None:
        leave(draft, instance, "unloaded by request" if model else "no longer in the catalogue")
        return
    if model.idle_after_s is None or draft.snapshot.is_pinned(instance.model):
        return
    expires_at_s = draft.last_used_s(instance) + model.idle_after_s
    if draft.in_flight(instance):
        return
    if draft.now_s < expires_at_s or not draft.is_idle(instance):
        draft.wake(max(expires_at_s, draft.quiet_at_s(instance)))
        return
    leave(draft, instance, f"idle for {model.idle_after_s:.0f} s")


def end_drain(draft: Draft, instance: Instance) -> None:
    """A drain ends when it is quiet, forced, too long, or when the claim it makes room for is gone."""
    claim = instance.drained_for
    if claim is not None and not is_claimed(draft, claim):
        stays = draft.move(instance, Signal.RELENT, drained_for=None, stop_reason=None)
        draft.note("relented", f"'{instance.model}' stays: its room is no longer needed", stays)
        let_in_who_came(draft, stays)
        return
    model = draft.model(instance.model)
    limit_at_s = instance.since_s + (model.drain_limit_s if model else DRAIN_LIMIT_S)
    if draft.in_flight(instance) and not instance.force and draft.now_s < limit_at_s:
        draft.wake(limit_at_s)
        return
    stop(draft, instance, instance.stop_reason or "drained")


def let_in_who_came(draft: Draft, instance: Instance) -> None:
    """Whoever asked for it while it drained waited for its next attempt; this one serves on instead."""
    entry = draft.entries.get(instance.model)
    if entry is not None and instance.attempt is not None:
        draft.answer(entry, Ready(instance.model, instance.attempt))


def is_claimed(draft: Draft, attempt: AttemptId) -> bool:
    return any(i.attempt == attempt and i.state is State.CLAIMED for i in draft.instances.values())


def call_stuck_if_overdue(draft: Draft, instance: Instance) -> None:
    model = draft.model(instance.model)
    overdue_at_s = instance.since_s + (model.stop_grace_s if model else 10.0) + OVERDUE_S
    if draft.now_s < overdue_at_s:
        draft.wake(overdue_at_s)
        return
    draft.move(instance, Signal.OVERDUE)
    text = f"'{instance.model}' is not seen to end (it survived the kill, or the engine does not answer)"
    draft.note("stuck", f"{text}; its memory stays reserved", instance)


def leave(draft: Draft, instance: Instance, reason: str, claim: AttemptId | None = None) -> None:
    """Let it finish what it has; stop it at once if that is nothing."""
    if draft.in_flight(instance) and not instance.force:
        count = draft.in_flight(instance)
        draft.note(
            "draining", f"'{instance.model}' finishes {count} requests, then leaves: {reason}", instance
        )
        draft.move(instance, Signal.DRAIN, drained_for=claim, stop_reason=reason)
        model = draft.model(instance.model)
        draft.wake(draft.now_s + (model.drain_limit_s if model else DRAIN_LIMIT_S))
    else:
        stop(draft, instance, reason)


def stop(draft: Draft, instance: Instance, reason: str, failure: Failure | None = None) -> None:
    """Order the stop. A wanted one clears what failed before; a failure is counted like any other."""
    model = draft.model(instance.model)
    grace_s = model.stop_grace_s if model else 10.0
    if failure is not None:
        instance = with_failure(instance, failure, draft.now_s)
        give_up(draft, instance, failure)
        stopped = draft.move(instance, Signal.STOP, stop_reason=reason)
    else:
        stopped = draft.move(
            instance, Signal.STOP, stop_reason=reason, failure=None, failures=0, retry_at_s=None
        )
    draft.wake(draft.now_s + grace_s + OVERDUE_S)
    draft.note("stopping", f"'{instance.model}' stops: {reason}", stopped)
    draft.act(Stop(stopped.attempt or "", stopped.model, grace_s, reason))


def give_up(draft: Draft, instance: Instance, failure: Failure) -> None:
    """Whoever waited for this start learns why it failed."""
    entry = draft.entries.get(instance.model)
    if entry is not None:
        draft.answer(entry, Broken(instance.model, failure, instance.retry_at_s))


# --- what was promised


def start_the_claimed(draft: Draft) -> None:
    """Start every claim whose room is there, in the order of the claims: nobody passes one."""
    claims = sorted(
        (i for i in draft.instances.values() if i.state is State.CLAIMED),
        key=lambda i: (i.claimed_at_s, i.attempt or ""),
    )
    for position, claim in enumerate(claims):
        later = claims[position + 1 :]
        if has_room(draft, claim, later):
            start(draft, claim)
        elif is_hopeless(draft, claim, later) or is_blind(draft, claim):
            draft.note(
                "replanned", f"the room promised to '{claim.model}' did not come; planning again", claim
            )
            replan(draft, claim)


def replan(draft: Draft, claim: Instance) -> None:
    """Back to the queue. Whoever drained for it stays, or drains for the claim it gets next."""
    draft.move(claim, Signal.REPLAN, placement={}, attempt=None)
    for drained in [i for i in draft.instances.values() if i.state is State.DRAINING]:
        if drained.drained_for == claim.attempt:
            end_drain(draft, drained)


def has_room(draft: Draft, claim: Instance, later: list[Instance]) -> bool:
    """Available, counting this claim and earlier ones, on a sample newer than the last release there."""
    return all(
        is_fresh(draft, device)
        and room_for(draft, device, later) >= 0
        and not is_start_in_the_dark(draft, claim, device)
        for device in claim.placement
    )


def room_for(draft: Draft, device: DeviceId, later: list[Instance]) -> int:
    return draft.available(device) + sum(draft.held(claim, device) for claim in later)


def is_fresh(draft: Draft, device: DeviceId) -> bool:
    if draft.reading(device) is None:
        draft.wake(draft.now_s + SAMPLE_LIMIT_S)
        return False
    return draft.snapshot.sample.taken_at_s >= draft.snapshot.released_at_s.get(device, 0.0)


def is_start_in_the_dark(draft: Draft, claim: Instance, device: DeviceId) -> bool:
    """Where PIDs cannot be read, growth belongs to the one that starts: so one at a time."""
    reading = draft.reading(device)
    if reading is None or reading.attributed:
        return False
    return any(i.state is State.STARTING and i.model != claim.model for i in draft.on_device(device))


def is_hopeless(draft: Draft, claim: Instance, later: list[Instance]) -> bool:
    """Even with everybody gone who leaves, the room is not there: somebody else took it."""
    for device in claim.placement:
        if not is_fresh(draft, device) or room_for(draft, device, later) >= 0:
            continue
        if is_on_the_move(draft, device):
            continue  # too early to say
        leavers = (i for i in draft.on_device(device) if i.model != claim.model and i.state in LEAVING)
        if room_for(draft, device, later) + draft.freed_by(leavers, device) < 0:
            return True
    return False


def is_blind(draft: Draft, claim: Instance) -> bool:
    """One of its devices has not been measurable for a while: it must not keep the others."""
    return any(draft.snapshot.blind_s(device) > SAMPLE_LIMIT_S for device in claim.placement)


def start(draft: Draft, claim: Instance) -> None:
    started = draft.move(claim, Signal.START, started_at_s=draft.now_s)
    model = draft.model(claim.model)
    if model is not None:
        draft.wake(draft.now_s + model.start_timeout_s)
    draft.note("starting", f"'{claim.model}' starts on {described(draft, claim)}", started)
    draft.act(Start(started.attempt or "", started.model, started.placement))


def described(draft: Draft, instance: Instance) -> str:
    return ", ".join(f"{draft.device_name(d)} ({mib(size)})" for d, size in instance.placement.items())


# --- the queue


def serve_the_queue(draft: Draft) -> list[Victim]:
    """By priority and age. One that cannot be served yet lets others pass; nobody passes a claim.

    Returns who was evicted.
    """
    evicted: list[Victim] = []
    place: KeptPlace | None = None
    for entry in in_order(draft):
        model = draft.model(entry.model)
        instance = draft.instance(entry.model)
        if model is None:
            draft.answer(entry, Unusable(entry.model, "it is no longer in the catalogue."))
            continue
        if instance.is_at_rest:
            instance = draft.move(instance, Signal.LOAD)
        if instance.state is not State.QUEUED:
            draft.wait(entry, f"it is {instance.state}")
        elif not is_backing_off(draft, entry, instance):
            evicted += serve(draft, model, draft.entries[entry.model], instance, place)
            place = place or place_if_it_waits(draft, model, entry)
    return evicted


def place_if_it_waits(draft: Draft, model: Model, entry: Entry) -> KeptPlace | None:
    waits = entry.model in draft.entries and draft.instance(entry.model).state is State.QUEUED
    return keep_place(draft, model, entry) if waits else None


def spare_the_needless(draft: Draft, evicted: list[Victim]) -> None:
    """What a later claim's victim leaves over can make an earlier claim's victim needless: it stays."""
    for victim in sorted(evicted, key=victim_order, reverse=True):
        instance = victim.instance
        if all(is_left_over(draft, instance, device) for device in instance.placement):
            draft.take_back(instance)


def is_left_over(draft: Draft, instance: Instance, device: DeviceId) -> bool:
    """Every claim on the device still fits if the instance stays."""
    if draft.reading(device) is None:
        return False
    return draft.projected(device) >= draft.held(instance, device)


def in_order(draft: Draft) -> list[Entry]:
    def rank(entry: Entry) -> tuple[int, float, str]:
        model = draft.model(entry.model)
        priority = effective_priority(model, entry, draft.now_s) if model else 0
        return -priority, entry.since_s, entry.model

    return sorted(draft.entries.values(), key=rank)


def serve(
    draft: Draft, model: Model, entry: Entry, instance: Instance, place: KeptPlace | None
) -> tuple[Victim, ...]:
    """Give the entry its claim and return its victims, or say why it waits, or refuse it.

    `place` is kept free for somebody who has waited longer.
    """

    def is_allowed(placement: Placement) -> bool:
        return respects(draft, place, placement)

    choice = choose(draft, model, entry, is_allowed)
    if choice is None:
        wait_or_refuse(draft, model, entry, instance, place)
        return ()
    claim(draft, instance, choice)
    return tuple(victim for victim in choice.victims if victim.instance.state is State.READY)


def wait_or_refuse(
    draft: Draft, model: Model, entry: Entry, instance: Instance, place: KeptPlace | None
) -> None:
    refused = refusal(draft, model)
    if not (refused and refused.forever) and is_settling(draft, model):
        draft.wait(entry, "memory that is just being given back is measured first")
        return
    if refused is None:
        draft.wait(entry, waiting_reason(draft, model, place))
        draft.wake(next_rise_s(draft, entry))
        return
    unknown = unmeasured_candidates(draft, model)
    if unknown:
        answer_unmeasured(draft, model, entry, unknown)
        return
    draft.answer(entry, refused, keeps_age=not refused.forever)
    text = explain(refused, draft.now_s).message
    draft.note("refused", text, instance, device=refused.device, forever=refused.forever)
    cancel_if_unwanted(draft, instance)


def is_settling(draft: Draft, model: Model) -> bool:
    """Memory of a device it could go to is on the move: too early for a no."""
    return any(
        draft.reading(device.id) is not None
        and (not is_fresh(draft, device.id) or is_on_the_move(draft, device.id))
        for device in candidate_devices(draft, model)
    )


def is_on_the_move(draft: Draft, device: DeviceId) -> bool:
    """Somebody's processes end or begin: for a moment their bytes may be nobody's, and so count twice."""
    return any(
        i.state in (State.STOPPING, State.RECLAIMING)
        or (i.state is State.STARTING and i.port is None and draft.now_s < i.since_s + SETTLES_S)
        for i in draft.on_device(device)
    )


def is_backing_off(draft: Draft, entry: Entry, instance: Instance) -> bool:
    due_s = instance.retry_at_s
    if entry.tries_now or due_s is None or due_s <= draft.now_s:
        return False
    draft.wait(entry, "its last start failed; the next try is due soon")
    draft.wake(due_s)
    return True


def unmeasured_candidates(draft: Draft, model: Model) -> dict[DeviceId, str]:
    """Unknown devices that could have carried the model."""
    wanted = {*model.devices, HOST} if model.devices else set(draft.snapshot.devices)
    return {d: why for d, why in draft.snapshot.unmeasured().items() if d in wanted}


def answer_unmeasured(draft: Draft, model: Model, entry: Entry, unknown: Mapping[DeviceId, str]) -> None:
    """Before the very first sample it waits a moment; a device that cannot be read stops admission."""
    first_due_s = draft.snapshot.sample.taken_at_s + SAMPLE_LIMIT_S
    if not draft.snapshot.sample.errors and draft.now_s <= first_due_s:
        draft.wait(entry, "the devices are being measured for the first time")
        draft.wake(first_due_s + 0.001)
        return
    draft.answer(entry, Unmeasured(model.id, unknown), keeps_age=True)
    cancel_if_unwanted(draft, draft.instance(model.id))


def claim(draft: Draft, instance: Instance, choice: Choice) -> None:
    """All or nothing: the bytes on every device and the victims in one step. It counts as held at once."""
    fresh = instance.without_attempt(instance.state)
    attempt = draft.new_attempt()
    claimed = draft.move(
        fresh, Signal.ADMIT, attempt=attempt, placement=dict(choice.placement), claimed_at_s=draft.now_s
    )
    for victim in choice.victims:
        evict(draft, victim, claimed)


def evict(draft: Draft, victim: Victim, claimed: Instance) -> None:
    instance = draft.instance(victim.instance.model)
    if instance.state is State.DRAINING:
        return  # it leaves anyway
    reason = f"evicted for '{claimed.model}'"
    draft.note("evicted", f"'{instance.model}' makes room for '{claimed.model}'", instance, by=claimed.model)
    leave(draft, instance, reason, claimed.attempt)


def waiting_reason(draft: Draft, model: Model, place: KeptPlace | None) -> str:
    needed = mib(model.demand.gpu_bytes + model.demand.host_bytes)
    holders = [i for i in draft.instances.values() if i.holds_reservation]
    named = ", ".join(f"{i.model} ({i.state})" for i in holders[:6])
    longer = f"; '{place.entry.model}' has waited longer and goes first" if place else ""
    return f"it needs {needed}, and what holds the room cannot leave yet: {named}{longer}"


def next_rise_s(draft: Draft, entry: Entry) -> float:
    """When its priority next rises by waiting."""
    steps = floor((draft.now_s - entry.since_s) / AGING_S + 1e-9) + 1
    return entry.since_s + steps * AGING_S
