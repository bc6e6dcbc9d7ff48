"""Where a model can go, and who has to leave for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf

from orchestrator.core.draft import Draft
from orchestrator.core.entities import (
    HOST,
    Demand,
    Device,
    DeviceId,
    DeviceKind,
    Entry,
    Holding,
    Model,
    Refused,
)
from orchestrator.core.lifecycle import Instance, State

STAY_S = 10.0
STAY_LOADS = 3.0
AGING_S = 10.0
SEARCH_LIMIT = 1000
"""Nodes looked at for one placement's victims; past it the best set found so far is taken."""

Placement = Mapping[DeviceId, int]
SetPrice = tuple[int, float, float, int]
NOTHING_TAKEN: SetPrice = (0, -inf, 0.0, 0)


@dataclass(frozen=True, slots=True)
class Victim:
    """A holder that may leave for a waiter: `frees` by device, and what taking it costs."""

    instance: Instance
    frees: Mapping[DeviceId, int]
    is_busy: bool
    priority: int
    cost: float
    bytes: int


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


def effective_priority(model: Model, entry: Entry, now_s: float) -> int:
    """Rises by one for every 10 s of waiting."""
    return model.priority + int((now_s - entry.since_s) / AGING_S)


def stay_s(instance: Instance) -> float:
    """How long a busy instance stays before it may be drained for a waiter."""
    return max(STAY_S, STAY_LOADS * instance.load_time_s)


# --- where it could go


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


# --- how much room there is, and could be


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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A holder that could leave, whoever asks: the victim it would be, and what else that needs.

    `drainable_for` is the priority a waiter needs (None: any); `not_before_s` is when it may be asked.
    """

    victim: Victim
    drainable_for: int | None = None
    not_before_s: float = 0.0


def victims_for(draft: Draft, model: Model, entry: Entry) -> list[Victim]:
    """Everybody who may be asked to leave for this entry now; wakes when somebody else may be."""
    priority = effective_priority(model, entry, draft.now_s)
    found = []
    for candidate in draft.remember("candidates", lambda: candidates(draft)):
        if candidate.victim.instance.model == model.id:
            continue
        if candidate.not_before_s > draft.now_s:
            draft.wake(candidate.not_before_s)
        elif candidate.drainable_for is None or candidate.drainable_for <= priority:
            found.append(candidate.victim)
    return found


def candidates(draft: Draft) -> list[Candidate]:
    """All that could leave, the cheapest first."""
    all_of_them = (draft.remember_of(i, partial(as_candidate, draft)) for i in draft.instances.values())
    return sorted((c for c in all_of_them if c is not None), key=lambda c: victim_order(c.victim))


def as_candidate(draft: Draft, instance: Instance) -> Candidate | None:
    is_leaving = instance.state is State.DRAINING and instance.drained_for is None
    if not is_leaving and (instance.state is not State.READY or draft.snapshot.is_pinned(instance.model)):
        return None
    own = draft.model(instance.model)
    priority = own.priority if own else 0
    frees = {d: draft.held(instance, d) for d in instance.placement}
    total = sum(frees.values())
    if is_leaving:  # it goes anyway: only the waiting counts
        return Candidate(Victim(instance, frees, True, priority, 0.0, total))
    is_busy = not draft.is_idle(instance)
    victim = Victim(instance, frees, is_busy, priority, keep_value(draft, instance), total)
    if not is_busy:
        return Candidate(victim)
    if draft.in_flight(instance) == 0:
        return Candidate(victim, not_before_s=draft.quiet_at_s(instance))
    stays_until_s = (instance.ready_at_s or draft.now_s) + stay_s(instance)
    return Candidate(victim, drainable_for=priority, not_before_s=stays_until_s)


def keep_value(draft: Draft, instance: Instance) -> float:
    """What evicting it would cost: its reload time by how often it has been used."""
    ready_for_s = max(60.0, draft.now_s - (instance.ready_at_s or draft.now_s))
    idle_s = draft.now_s - draft.last_used_s(instance)
    uses_per_s = draft.usage(instance).entered / (ready_for_s + idle_s)
    return max(0.05, instance.load_time_s) * uses_per_s


# --- choosing


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


def with_room_of(room: Mapping[DeviceId, int], victims: Iterable[Victim]) -> dict[DeviceId, int]:
    total = dict(room)
    for victim in victims:
        for device, freed in victim.frees.items():
            total[device] = total.get(device, 0) + freed
    return total


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


def victim_order(victim: Victim) -> tuple[int, int, float, int, str]:
    """Which victim is cheaper, alone."""
    return victim.is_busy, victim.priority, victim.cost, victim.bytes, victim.instance.model


def set_price(taken: Iterable[Victim]) -> SetPrice:
    """Busy ones first, then the highest priority taken, then the cost of bringing them back, then bytes."""
    price = NOTHING_TAKEN
    for victim in taken:
        price = with_victim(price, victim)
    return price


def with_victim(price: SetPrice, victim: Victim) -> SetPrice:
    busy, priority, cost, freed = price
    return busy + victim.is_busy, max(priority, victim.priority), cost + victim.cost, freed + victim.bytes


def cheapest_victims(
    missing: Mapping[DeviceId, int], victims: Sequence[Victim], limit: SetPrice | None = None
) -> tuple[Victim, ...] | None:
    """The cheapest set that frees what is missing on every device, at no more than `limit`; or None.

    `victims` come cheapest first, and each is on one of the devices. A branch and bound. Since every price
    grows with every victim, the cheapest set has no superfluous one.
    """
    if not covers(missing, victims):
        return None
    first = pruned(missing, cheapest_prefix(missing, victims))
    search = VictimSearch(victims, missing, first, limit)
    search.visit(0, missing, (), NOTHING_TAKEN)
    return search.best


def by_device(victims: Iterable[Victim]) -> dict[DeviceId, list[Victim]]:
    there: dict[DeviceId, list[Victim]] = {}
    for victim in victims:
        for device in victim.frees:
            there.setdefault(device, []).append(victim)
    return there


def those_on(there: Mapping[DeviceId, list[Victim]], devices: Iterable[DeviceId]) -> list[Victim]:
    """Victims on any of the devices, cheapest first, each once."""
    lists = [there.get(device, []) for device in devices]
    if len(lists) == 1:
        return lists[0]
    each = {victim.instance.model: victim for victims in lists for victim in victims}
    return sorted(each.values(), key=victim_order)


def covers(missing: Mapping[DeviceId, int], victims: Iterable[Victim]) -> bool:
    left = dict(missing)
    for victim in victims:
        for device, freed in victim.frees.items():
            if device in left:
                left[device] -= freed
    return all(need <= 0 for need in left.values())


def cheapest_prefix(missing: Mapping[DeviceId, int], victims: Sequence[Victim]) -> list[Victim]:
    """The cheapest ones in a row until they are enough."""
    left = dict(missing)
    taken = []
    for victim in victims:
        taken.append(victim)
        for device, freed in victim.frees.items():
            if device in left:
                left[device] -= freed
        if all(need <= 0 for need in left.values()):
            break
    return taken


def pruned(missing: Mapping[DeviceId, int], victims: Sequence[Victim]) -> tuple[Victim, ...]:
    """A sufficient set without a superfluous member: drop the dearest ones that are not needed."""
    kept = list(victims)
    for victim in reversed(victims):
        rest = [other for other in kept if other is not victim]
        if covers(missing, rest):
            kept = rest
    return tuple(kept)


class VictimSearch:
    """Depth-first over "take it or leave it", cutting what cannot beat the best set so far."""

    def __init__(
        self,
        victims: Sequence[Victim],
        missing: Mapping[DeviceId, int],
        first: tuple[Victim, ...],
        limit: SetPrice | None,
    ) -> None:
        price = set_price(first)
        is_dearer = limit is not None and price > limit
        self.best: tuple[Victim, ...] | None = None if is_dearer else first
        self._bound = limit if is_dearer and limit is not None else price
        self._victims = victims
        self._visited = 0
        self._left_after = suffix_frees(victims, missing)

    def visit(
        self, index: int, missing: Mapping[DeviceId, int], taken: tuple[Victim, ...], price: SetPrice
    ) -> None:
        """Decide about the victims from `index` on; they come cheapest first, so the next is the least."""
        if not missing:
            if price < self._bound:
                self.best, self._bound = taken, price
            return
        still = self._left_after[index]
        self._visited += 1
        if self._visited > SEARCH_LIMIT or any(still[device] < need for device, need in missing.items()):
            return
        victim = self._victims[index]
        dearer = with_victim(price, victim)
        if dearer[:3] > self._bound[:3]:
            return  # and so is every set with one that comes later
        rest = {
            d: need - victim.frees.get(d, 0) for d, need in missing.items() if need > victim.frees.get(d, 0)
        }
        if dearer < self._bound:
            self.visit(index + 1, rest, (*taken, victim), dearer)
        self.visit(index + 1, missing, taken, price)


def suffix_frees(victims: Sequence[Victim], missing: Iterable[DeviceId]) -> list[dict[DeviceId, int]]:
    """What all victims from each index on free together, by device."""
    sums = [dict.fromkeys(missing, 0)]
    for victim in reversed(victims):
        sums.append({device: size + victim.frees.get(device, 0) for device, size in sums[-1].items()})
    return sums[::-1]


# --- refusing


def refusal(draft: Draft, model: Model) -> Refused | None:
    """Numbers of why it cannot be, even with every unpinned holder gone; None if it could be."""
    best: Refused | None = None
    sizes = [d for d in draft.snapshot.devices if draft.reading(d) is not None]
    emptied = {device: emptied_bytes(draft, device) for device in sizes}
    capacity = {device: draft.device(device).usable_bytes for device in sizes}
    for placement in placements(draft, model, [emptied, capacity]):
        short = {d: need for d, need in placement.items() if need > emptied[d]}
        if not short:
            return None
        device = max(short, key=lambda d: short[d] - emptied[d])
        refused = Refused(
            model.id,
            device,
            needed_bytes=short[device],
            available_bytes=max(0, emptied[device]),
            capacity_bytes=capacity[device],
            holders=kept_holdings(draft, device),
            forever=any(need > capacity[d] for d, need in placement.items()),
        )
        if best is None or closeness(refused) < closeness(best):
            best = refused
    return best or nowhere(draft, model)


def closeness(refused: Refused) -> tuple[bool, int]:
    return refused.forever, refused.needed_bytes - refused.available_bytes


def nowhere(draft: Draft, model: Model) -> Refused:
    """No device of the kind, number or name it asks for is there at all."""
    device = ", ".join(model.devices) or f"{min(model.gpu_counts)} GPUs"
    return Refused(model.id, device, model.demand.gpu_bytes + model.demand.host_bytes, 0, 0, forever=True)


def emptied_bytes(draft: Draft, device: DeviceId) -> int:
    """Available with every unpinned holder gone; the stuck cannot be made to go."""
    return draft.available(device) + sum(
        draft.held(holder, device) for holder in draft.on_device(device) if may_ever_leave(draft, holder)
    )


def may_ever_leave(draft: Draft, holder: Instance) -> bool:
    if holder.state is State.STUCK:
        return False
    return holder.state not in (State.READY, State.STARTING, State.CLAIMED) or not draft.snapshot.is_pinned(
        holder.model
    )


def kept_holdings(draft: Draft, device: DeviceId) -> tuple[Holding, ...]:
    """Who holds what cannot be freed: pinned and stuck models, other processes, the headroom."""
    kept = [
        Holding(
            holder.model, draft.held(holder, device), "stuck" if holder.state is State.STUCK else "pinned"
        )
        for holder in draft.on_device(device)
        if not may_ever_leave(draft, holder)
    ]
    reading = draft.reading(device)
    if reading is not None:
        kept += [Holding(f"{p.name} (PID {p.pid})", p.used_bytes, "another program") for p in reading.foreign]
    return tuple(sorted(kept, key=lambda holding: -holding.held_bytes))
