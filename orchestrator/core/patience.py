"""Who has waited too long is not passed any more: a place on its devices is kept free for it.

A waiting load lets others pass while it cannot be served. Without an end to that, two small models that
come in turns could keep a large one out for ever: one of them has always just begun its stay. So the first
in the queue, once it has waited `PATIENCE_S`, has a place: devices on which nobody else may claim what
would stand in its way. Those who hold them now must leave sooner or later, and nobody takes their part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.core.draft import Draft
from orchestrator.core.entities import DeviceId, Entry, Model
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.placement import Placement, least_possible, placements
from orchestrator.core.victims import emptied_bytes, may_ever_leave, stay_s
from orchestrator.core.waiting import AGING_S

PATIENCE_S = 30.0
STAYING = frozenset({State.CLAIMED, State.STARTING, State.READY})


@dataclass(frozen=True, slots=True)
class KeptPlace:
    """Where `entry` will go; who claimed since `since_s` may only have what that leaves over."""

    entry: Entry
    since_s: float
    placement: Placement


def keep_place(draft: Draft, model: Model, entry: Entry) -> KeptPlace | None:
    """The place for an entry that has to wait, or None while it has not waited long.

    It is kept from the same moment on for as long as that can be; what other programs take can spoil it.
    """
    if draft.now_s < entry.since_s + PATIENCE_S:
        return None
    model = model.as_variant(least_possible(draft, model))
    place = None
    if entry.place_since_s is not None:
        place = first_open(draft, model, entry, entry.place_since_s)
    if place is None:
        place = first_open(draft, model, entry, draft.now_s)
        since_s = place.since_s if place else None
        draft.entries[entry.model] = replace(draft.entries[entry.model], place_since_s=since_s)
    return place


def first_open(draft: Draft, model: Model, entry: Entry, since_s: float) -> KeptPlace | None:
    """Of all placements with no newcomer in the way, the one whose holders are the first to be gone.

    Since nobody new comes in its way, that moment only ever comes closer.
    """
    measured = draft.measured()
    empty = KeptPlace(entry, since_s, dict.fromkeys(measured, 0))
    open_room = {device: left_over(draft, empty, device) for device in measured}
    places = [KeptPlace(entry, since_s, p) for p in placements(draft, model, [open_room])]
    open_places = [p for p in places if all(left_over(draft, p, d) >= 0 for d in p.placement)]
    return min(open_places, key=lambda place: last_gone_s(draft, model, place), default=None)


def respects(draft: Draft, place: KeptPlace | None, placement: Placement) -> bool:
    """Whether a claim on these devices would still let the place be had."""
    if place is None:
        return True
    return all(
        left_over(draft, place, device) >= need
        for device, need in placement.items()
        if device in place.placement
    )


def left_over(draft: Draft, place: KeptPlace, device: DeviceId) -> int:
    """What others may claim on the device: beyond the place, and beyond what newcomers hold already."""
    newcomers = (i for i in draft.on_device(device) if is_newcomer(i, place) and may_ever_leave(draft, i))
    taken = sum(draft.held(newcomer, device) for newcomer in newcomers)
    return emptied_bytes(draft, device) - taken - place.placement[device]


def is_newcomer(holder: Instance, place: KeptPlace) -> bool:
    return holder.state in STAYING and holder.claimed_at_s >= place.since_s


def last_gone_s(draft: Draft, model: Model, place: KeptPlace) -> float:
    holders = {
        i.model: i
        for device in place.placement
        for i in draft.on_device(device)
        if may_ever_leave(draft, i) and not is_newcomer(i, place)
    }
    return max((drainable_at_s(draft, model, place, i) for i in holders.values()), default=draft.now_s)


def drainable_at_s(draft: Draft, model: Model, place: KeptPlace, holder: Instance) -> float:
    """When it may be asked to leave at the latest, busy or not."""
    own = draft.model(holder.model)
    if own is None or holder.state not in STAYING:
        return draft.now_s  # it leaves already
    rise_s = place.entry.since_s + AGING_S * max(0, own.priority - model.priority)
    if holder.state is State.READY:
        return max(rise_s, (holder.ready_at_s or holder.since_s) + stay_s(holder))
    return max(rise_s, holder.claimed_at_s + own.drain_limit_s + own.start_timeout_s + stay_s(holder))
