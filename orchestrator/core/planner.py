"""The specification, as code: what should end, what may start, who waits, who leaves.

One call plans one turn. It reads a snapshot and what the gates count, and returns a plan; it performs
nothing, and the same input always gives the same plan. docs/architecture.md tells it in prose. What ends is
in endings.py and losses.py, what was promised in claims.py, and the queue here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor

from orchestrator.core.claims import is_fresh, is_on_the_move, may_count_twice, start_the_claimed
from orchestrator.core.draft import Draft
from orchestrator.core.endings import cancel_if_unwanted, end_if_due, leave
from orchestrator.core.entities import HOST, AttemptId, DeviceId, Entry, Model, Usage
from orchestrator.core.lifecycle import Instance, Signal, State
from orchestrator.core.losses import end_if_lost
from orchestrator.core.patience import KeptPlace, keep_place, respects
from orchestrator.core.placement import Choice, Placement, candidate_devices, choose
from orchestrator.core.reasons import tell_the_claimed, waiting_reason
from orchestrator.core.refusal import refusal
from orchestrator.core.snapshot import SAMPLE_LIMIT_S, Plan, Snapshot
from orchestrator.core.verdicts import Unmeasured, Unusable
from orchestrator.core.victims import Victim, victim_order
from orchestrator.core.waiting import AGING_S, effective_priority
from orchestrator.core.wording import explain


def make_plan(snapshot: Snapshot, usage: Mapping[AttemptId, Usage]) -> Plan:
    """Plan one turn: first what ends, then what was promised, then the queue."""
    draft = Draft(snapshot, usage)
    # Claims first: a drain relents when its claim is gone.
    for before in sorted(draft.instances.values(), key=lambda i: i.state is not State.CLAIMED):
        instance = draft.instance(before.model)
        if not end_if_lost(draft, instance):
            end_if_due(draft, instance)
    start_the_claimed(draft)
    evicted = serve_the_queue(draft)
    spare_the_needless(draft, evicted)
    start_the_claimed(draft)
    tell_the_claimed(draft)
    return draft.plan()


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
        if model.problem:
            draft.answer(entry, Unusable(entry.model, model.problem))
            continue
        if instance.is_at_rest:
            instance = draft.move(instance, Signal.LOAD)
        if instance.state is not State.QUEUED:
            if instance.state is not State.CLAIMED:  # that is told once it is known who leaves
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

    `place` is kept free for somebody who has waited longer. Nobody takes the room of one who would have it
    but for a measurement.
    """

    def is_allowed(placement: Placement) -> bool:
        return draft.measured_first.isdisjoint(placement) and respects(draft, place, placement)

    choice = choose(draft, model, entry, is_allowed)
    if choice is None:
        wait_or_refuse(draft, model, entry, instance, place)
        return ()
    if choice.victims and any(may_count_twice(draft, device) for device in choice.placement):
        draft.wait(entry, "memory that a start has just taken is measured first")
        draft.measured_first.update(choice.placement)
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
        draft.wait(entry, waiting_reason(draft, model, entry, place))
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
    """It waits a moment for what is only not measured yet; a device that cannot be read stops admission."""
    sample = draft.snapshot.sample
    due_s = sample.taken_at_s + SAMPLE_LIMIT_S
    if sample.errors.keys().isdisjoint(unknown) and draft.now_s <= due_s:
        draft.wait(entry, "the devices are being measured")
        draft.wake(due_s + 0.001)
        return
    labels = {device: draft.device(device).label for device in unknown}
    draft.answer(entry, Unmeasured(model.id, unknown, labels), keeps_age=True)
    cancel_if_unwanted(draft, draft.instance(model.id))


def claim(draft: Draft, instance: Instance, choice: Choice) -> None:
    """All or nothing: the bytes on every device and the victims in one step. It counts as held at once."""
    fresh = instance.without_attempt(instance.state)
    attempt = draft.new_attempt()
    claimed = draft.move(
        fresh,
        Signal.ADMIT,
        attempt=attempt,
        placement=dict(choice.placement),
        parameters=dict(choice.parameters),
        claimed_at_s=draft.now_s,
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


def next_rise_s(draft: Draft, entry: Entry) -> float:
    """When its priority next rises by waiting."""
    steps = floor((draft.now_s - entry.since_s) / AGING_S + 1e-9) + 1
    return entry.since_s + steps * AGING_S
