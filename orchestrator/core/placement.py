"""Where a model can go, and which of those places is the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from orchestrator.core.draft import Draft
from orchestrator.core.entities import HOST, Demand, Device, DeviceId, DeviceKind, Entry, Model
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.victims import (
    SetPrice,
    Victim,
    by_device,
    cheapest_victims,
    set_price,
    those_on,
    victims_for,
)

Placement = Mapping[DeviceId, int]


@dataclass(frozen=True, slots=True, order=True)
class Price:
    """How bad a placement is, the worst first; compared field by field."""

    busy: int = 0
    priority: float = -inf
    cost: float = 0.0
    taken_bytes: int = 0
    must_wait: bool = False
    gpus: int = 0
    room_bytes: int = 0
    order: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A placement, its victims, and its price."""

    placement: Placement
    victims: tuple[Victim, ...] = ()
    price: Price = field(default_factory=Price)


def choose(draft: Draft, model: Model, entry: Entry) -> Choice | None:
    """The cheapest placement that can be had now, or None."""
    room = draft.remember("room", lambda: projected_room(draft))
    free = best_choice(draft, placements(draft, model, [room]), room, [])
    if free is not None:
        return free
    victims = victims_for(draft, model, entry)
    if not victims:
        return None
    idle = (victim for victim in victims if not victim.is_busy)
    rooms = [room, with_room_of(room, idle), with_room_of(room, victims)]
    return best_choice(draft, placements(draft, model, rooms), room, victims)


def projected_room(draft: Draft) -> dict[DeviceId, int]:
    return {d: projected_bytes(draft, d) for d in draft.snapshot.devices if draft.reading(d) is not None}


def best_choice(
    draft: Draft, options: Sequence[Placement], room: Mapping[DeviceId, int], victims: Sequence[Victim]
) -> Choice | None:
    """The cheapest of the options; a set of victims dearer than the best so far is not looked for."""
    best: Choice | None = None
    best_set: SetPrice | None = None
    there = by_device(victims)
    for order, placement in enumerate(options):
        missing = {d: need - room[d] for d, need in placement.items() if need > room[d]}
        taken = cheapest_victims(missing, those_on(there, missing), best_set) if missing else ()
        if taken is None:
            continue
        choice = Choice(placement, taken, price(draft, placement, taken, room, order))
        if best is None or choice.price < best.price:
            best, best_set = choice, set_price(taken)
    return best


def price(
    draft: Draft, placement: Placement, taken: Sequence[Victim], room: Mapping[DeviceId, int], order: int
) -> Price:
    """Ties go to what can start at once, to fewer GPUs, to the roomiest device, then to the lowest index."""
    busy, priority, cost, freed = set_price(taken)
    return Price(
        busy,
        priority,
        cost,
        freed,
        must_wait=any(need > draft.available(d) for d, need in placement.items()),
        gpus=len(placement),
        room_bytes=-sum(room[d] for d in placement),
        order=order,
    )


def candidate_devices(draft: Draft, model: Model) -> list[Device]:
    """The devices that may carry the model's GPU bytes, measured or not, in index order."""
    named = [draft.snapshot.devices[d] for d in model.devices if d in draft.snapshot.devices]
    if model.devices:
        return sorted(named, key=lambda device: device.index)
    gpus = draft.snapshot.gpus()
    return list(gpus) if gpus else [d for d in draft.snapshot.devices.values() if d.id == HOST]


def spread(demand: Demand, devices: Sequence[Device]) -> dict[DeviceId, int]:
    """The bytes each device carries when the model is split evenly over these."""
    share = ceil(demand.gpu_bytes / len(devices))
    placement = {device.id: share for device in devices if share}
    if demand.host_bytes:
        placement[HOST] = placement.get(HOST, 0) + demand.host_bytes
    return placement


def placements(draft: Draft, model: Model, roominess: Iterable[Mapping[DeviceId, int]]) -> list[Placement]:
    """Placements worth pricing.

    On one GPU: every GPU. On n: the n roomiest, by each of the given measures of room; an even split fits
    somewhere exactly if it fits there.
    """
    devices = [d for d in candidate_devices(draft, model) if draft.reading(d.id) is not None]
    on_host = [d for d in devices if d.kind is DeviceKind.HOST]
    gpus = [d for d in devices if d.kind is DeviceKind.GPU]
    found = [spread(model.demand, [device]) for device in on_host]
    if gpus and model.demand.gpu_bytes == 0:
        found.append(spread(model.demand, gpus[:1]))
        return [p for p in found if is_measured(draft, p)]
    for count in model.gpu_counts:
        if count == 1:
            found += [spread(model.demand, [gpu]) for gpu in gpus]
        elif count <= len(gpus):
            for room in roominess:
                roomiest = sorted(gpus, key=lambda gpu: (-room.get(gpu.id, 0), gpu.index))[:count]
                found.append(spread(model.demand, roomiest))
    return [p for p in found if is_measured(draft, p)]


def is_measured(draft: Draft, placement: Placement) -> bool:
    return all(draft.reading(device) is not None for device in placement)


def projected_bytes(draft: Draft, device: DeviceId) -> int:
    """Available once everybody who is surely leaving has left.

    A drain for another claim is sure, and that claim is already counted. A drain for an unload may take
    its time: it is a victim like a busy one, and never a reason to evict nobody idle.
    """
    return draft.available(device) + sum(
        draft.held(leaver, device) for leaver in draft.on_device(device) if is_surely_leaving(leaver)
    )


def is_surely_leaving(instance: Instance) -> bool:
    return instance.state in (State.STOPPING, State.RECLAIMING) or (
        instance.state is State.DRAINING and instance.drained_for is not None
    )


def with_room_of(room: Mapping[DeviceId, int], victims: Iterable[Victim]) -> dict[DeviceId, int]:
    total = dict(room)
    for victim in victims:
        for device, freed in victim.frees.items():
            total[device] = total.get(device, 0) + freed
    return total
