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
    Row,
    SetPrice,
    Victim,
    Victims,
    cheapest_victims,
    emptied_bytes,
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
    ones leave, else the least that could ever be with whoever may be asked.
    """
    room = draft.remember(projected_room)
    variants = model.variants or (model.run_with({}),)
    free = first_choice(draft, model, variants, room, {}, is_allowed)
    if free is not None:
        return free
    victims = victims_for(draft, model, entry)
    idle = only_idle(victims) if model.variants else {}
    if idle:
        chosen = first_choice(draft, model, variants, room, idle, is_allowed)
        if chosen is not None:
            return chosen
    if not victims:
        return None
    return first_choice(draft, model, [least_possible(draft, model)], room, victims, is_allowed)


def least_possible(draft: Draft, model: Model) -> Variant:
    """The least variant that fits once everybody is gone who can be made to go; where none does, the least.

    What is not on the GPU is in RAM: the least of the one can be too much for the other.
    """
    if not model.variants:
        return model.run_with({})
    emptied = draft.remember(emptied_room)
    for variant in reversed(model.variants):
        found = placements(draft, model.as_variant(variant), [emptied])
        if any(all(need <= emptied[d] for d, need in placement.items()) for placement in found):
            return variant
    return model.variants[-1]


def emptied_room(draft: Draft) -> dict[DeviceId, int]:
    return {device: emptied_bytes(draft, device) for device in draft.measured()}


def usable_room(draft: Draft) -> dict[DeviceId, int]:
    return {device: draft.device(device).usable_bytes for device in draft.measured()}


def first_choice(
    draft: Draft,
    model: Model,
    variants: Sequence[Variant],
    room: Mapping[DeviceId, int],
    victims: Victims,
    is_allowed: Callable[[Placement], bool],
) -> Choice | None:
    """The best place of the first variant that can be had with these victims."""
    rooms = [room]
    if victims and max(model.gpu_counts) > 1:
        rooms += [with_room_of(room, only_idle(victims)), with_room_of(room, victims)]
    for variant in variants:
        sized = replace(model, demand=variant.demand) if model.variants else model
        options = [placement for placement in placements(draft, sized, rooms) if is_allowed(placement)]
        choice = best_choice(draft, options, room, victims)
        if choice is not None:
            return replace(choice, parameters=variant.parameters)
    return None


def projected_room(draft: Draft) -> dict[DeviceId, int]:
    return {device: draft.projected(device) for device in draft.measured()}


def best_choice(
    draft: Draft, options: Sequence[Placement], room: Mapping[DeviceId, int], victims: Victims
) -> Choice | None:
    """The cheapest of the options; a set of victims dearer than the best so far is not looked for."""
    best: Choice | None = None
    best_set: SetPrice | None = None
    budget = Budget(SEARCH_LIMIT)
    for order, placement in enumerate(options):
        missing = {d: need - room[d] for d, need in placement.items() if need > room[d]}
        if missing and not victims:
            continue
        taken = cheapest_victims(missing, those_on(victims, missing), best_set, budget) if missing else ()
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
    return list(draft.gpus) or [d for d in draft.snapshot.devices.values() if d.id == HOST]


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
    somewhere exactly if it fits there. All of their devices are measured.
    """
    if model.demand.host_bytes and draft.reading(HOST) is None:
        return []
    devices = [d for d in candidate_devices(draft, model) if draft.reading(d.id) is not None]
    on_host = [d for d in devices if d.kind is DeviceKind.HOST]
    gpus = [d for d in devices if d.kind is DeviceKind.GPU]
    found: list[Placement] = [model.demand.spread([device.id]) for device in on_host]
    if gpus and model.demand.gpu_bytes == 0:
        return [*found, model.demand.spread([gpus[0].id])]
    for count in model.gpu_counts:
        if count == 1:
            found += [model.demand.spread([gpu.id]) for gpu in gpus]
        elif count <= len(gpus):
            for room in roominess:
                roomiest = sorted(gpus, key=lambda gpu: (-room.get(gpu.id, 0), gpu.index))[:count]
                found.append(model.demand.spread([gpu.id for gpu in roomiest]))
    return found


def only_idle(victims: Victims) -> Victims:
    idle = {device: [v for v in row.victims if not v.is_busy] for device, row in victims.items()}
    return {device: Row(there) for device, there in idle.items() if there}


def with_room_of(room: Mapping[DeviceId, int], victims: Victims) -> dict[DeviceId, int]:
    """The room with all of them gone."""
    freed = {device: row.freed(device) for device, row in victims.items()}
    return {device: size + freed.get(device, 0) for device, size in room.items()}
