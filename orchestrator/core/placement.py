"""Where a model can go, and which of those places is the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from orchestrator.core.draft import Draft
from orchestrator.core.entities import HOST, Device, DeviceId, DeviceKind, Entry, Model, Variant
from orchestrator.core.lifecycle import Instance
from orchestrator.core.victims import (
    SEARCH_LIMIT,
    Budget,
    SetPrice,
    Victim,
    by_device,
    cheapest_victims,
    set_price,
    those_on,
    victims_for,
)

Placement = Mapping[DeviceId, int]


class Price(NamedTuple):
    """How bad a placement is, the worst first; compared field by field.

    Ties go to what can start at once, to fewer GPUs, to the roomiest devices, then to the lowest index.
    """

    busy: int
    priority: float
    cost: float
    taken_bytes: int
    must_wait: bool
    gpus: int
    room_bytes: int
    order: int


@dataclass(frozen=True, slots=True)
class Choice:
    """A placement, its victims, its price, and the parameters of the variant that is placed so."""

    placement: Placement
    victims: tuple[Victim, ...]
    price: Price
    parameters: Mapping[str, int] = field(default_factory=dict)


def choose(
    draft: Draft, model: Model, entry: Entry, is_allowed: Callable[[Placement], bool]
) -> Choice | None:
    """The cheapest placement that can be had now, of those that are allowed; or None.

    Of a model with variants the largest goes that needs nobody to leave, else the largest for which idle
    ones leave, else the least with whoever may be asked.
    """
    room = draft.remember("room", lambda: projected_room(draft))
    variants = model.variants or (model.run_with({}),)
    free = first_choice(draft, model, variants, room, [], is_allowed)
    if free is not None:
        return free
    victims = victims_for(draft, model, entry)
    idle = [victim for victim in victims if not victim.is_busy]
    if model.variants and idle:
        chosen = first_choice(draft, model, variants, room, idle, is_allowed)
        if chosen is not None:
            return chosen
    return first_choice(draft, model, variants[-1:], room, victims, is_allowed) if victims else None


def first_choice(
    draft: Draft,
    model: Model,
    variants: Sequence[Variant],
    room: Mapping[DeviceId, int],
    victims: Sequence[Victim],
    is_allowed: Callable[[Placement], bool],
) -> Choice | None:
    """The best place of the first variant that can be had with these victims."""
    idle = (victim for victim in victims if not victim.is_busy)
    rooms = [room, with_room_of(room, idle), with_room_of(room, victims)] if victims else [room]
    for variant in variants:
        sized = replace(model, demand=variant.demand) if model.variants else model
        options = [placement for placement in placements(draft, sized, rooms) if is_allowed(placement)]
        choice = best_choice(draft, options, room, victims)
        if choice is not None:
            return replace(choice, parameters=variant.parameters)
    return None


def projected_room(draft: Draft) -> dict[DeviceId, int]:
    return {d: draft.projected(d) for d in draft.snapshot.devices if draft.reading(d) is not None}


def best_choice(
    draft: Draft, options: Sequence[Placement], room: Mapping[DeviceId, int], victims: Sequence[Victim]
) -> Choice | None:
    """The cheapest of the options; a set of victims dearer than the best so far is not looked for."""
    best: Choice | None = None
    best_set: SetPrice | None = None
    there = by_device(victims)
    budget = Budget(SEARCH_LIMIT)
    for order, placement in enumerate(options):
        missing = {d: need - room[d] for d, need in placement.items() if need > room[d]}
        taken = cheapest_victims(missing, those_on(there, missing), best_set, budget) if missing else ()
        if taken is None:
            continue
        paid = set_price(taken)
        asked = price(draft, placement, paid, room, order)
        if best is None or asked < best.price:
            best, best_set = Choice(placement, taken, asked), paid
    return best


def price(
    draft: Draft, placement: Placement, paid: SetPrice, room: Mapping[DeviceId, int], order: int
) -> Price:
    must_wait = any(need > draft.available(d) for d, need in placement.items())
    return Price(*paid, must_wait, len(placement), -sum(room[d] for d in placement), order)


def candidate_devices(draft: Draft, model: Model) -> list[Device]:
    """The devices that may carry the model's GPU bytes, measured or not, in index order."""
    named = [draft.snapshot.devices[d] for d in model.devices if d in draft.snapshot.devices]
    if model.devices:
        return sorted(named, key=lambda device: device.index)
    gpus = draft.snapshot.gpus()
    return list(gpus) if gpus else [d for d in draft.snapshot.devices.values() if d.id == HOST]


def is_placement_of(draft: Draft, model: Model, claim: Instance) -> bool:
    """Whether the model may still be where it was promised to be, and needs that much."""
    placement, variant = claim.placement, model.run_with(claim.parameters)
    gpus = [device for device in placement if device != HOST]
    allowed = {device.id for device in candidate_devices(draft, model)}
    if not allowed.issuperset(gpus) or (gpus and len(gpus) not in model.gpu_counts):
        return False
    return placement == variant.demand.spread(gpus or [HOST]) and claim.parameters == variant.parameters


def placements(draft: Draft, model: Model, roominess: Iterable[Mapping[DeviceId, int]]) -> list[Placement]:
    """Placements worth pricing.

    On one GPU: every GPU. On n: the n roomiest, by each of the given measures of room; an even split fits
    somewhere exactly if it fits there.
    """
    devices = [d for d in candidate_devices(draft, model) if draft.reading(d.id) is not None]
    on_host = [d for d in devices if d.kind is DeviceKind.HOST]
    gpus = [d for d in devices if d.kind is DeviceKind.GPU]
    found = [model.demand.spread([device.id]) for device in on_host]
    if gpus and model.demand.gpu_bytes == 0:
        found.append(model.demand.spread([gpus[0].id]))
        return [p for p in found if is_measured(draft, p)]
    for count in model.gpu_counts:
        if count == 1:
            found += [model.demand.spread([gpu.id]) for gpu in gpus]
        elif count <= len(gpus):
            for room in roominess:
                roomiest = sorted(gpus, key=lambda gpu: (-room.get(gpu.id, 0), gpu.index))[:count]
                found.append(model.demand.spread([gpu.id for gpu in roomiest]))
    return [p for p in found if is_measured(draft, p)]


def is_measured(draft: Draft, placement: Placement) -> bool:
    return all(draft.reading(device) is not None for device in placement)


def with_room_of(room: Mapping[DeviceId, int], victims: Iterable[Victim]) -> dict[DeviceId, int]:
    total = dict(room)
    for victim in victims:
        for device, freed in victim.frees.items():
            total[device] = total.get(device, 0) + freed
    return total
