"""Who may leave for a waiter, and the cheapest set of them that makes enough room."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

from orchestrator.core.draft import Draft
from orchestrator.core.entities import DeviceId, Entry, Model
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.waiting import effective_priority

STAY_S = 10.0
STAY_LOADS = 3.0
SEARCH_LIMIT = 600
"""Nodes looked at for one entry's victims; past it the best set found so far is taken."""

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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A holder that could leave, whoever asks: the victim it would be, and what else that needs.

    `drainable_for` is the priority a waiter needs (None: any); `not_before_s` is when it may be asked;
    at `idle_at_s` anybody may ask, if nobody uses it until then.
    """

    victim: Victim
    drainable_for: int | None = None
    not_before_s: float = 0.0
    idle_at_s: float | None = None


def stay_s(instance: Instance) -> float:
    """How long a busy instance stays before it may be drained for a waiter."""
    return max(STAY_S, STAY_LOADS * instance.load_time_s)


def may_ever_leave(draft: Draft, holder: Instance) -> bool:
    """The stuck cannot be made to go, and the pinned are not asked."""
    if holder.state is State.STUCK:
        return False
    return holder.state not in (State.READY, State.STARTING, State.CLAIMED) or not draft.snapshot.is_pinned(
        holder.model
    )


def emptied_bytes(draft: Draft, device: DeviceId) -> int:
    """Available with every holder gone that could ever be made to go."""
    return draft.available(device) + draft.freed_by(
        (holder for holder in draft.on_device(device) if may_ever_leave(draft, holder)), device
    )


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
        elif candidate.idle_at_s is not None:
            draft.wake(candidate.idle_at_s)
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
    stays_until_s = (instance.ready_at_s or draft.now_s) + stay_s(instance)
    if draft.in_flight(instance):
        return Candidate(victim, drainable_for=priority, not_before_s=stays_until_s)
    idle_at_s = draft.quiet_at_s(instance)  # between two calls, maybe
    if draft.now_s < stays_until_s:
        return Candidate(victim, not_before_s=min(idle_at_s, stays_until_s))
    return Candidate(victim, drainable_for=priority, not_before_s=stays_until_s, idle_at_s=idle_at_s)


def keep_value(draft: Draft, instance: Instance) -> float:
    """What evicting it would cost: its reload time by how often it has been used."""
    ready_for_s = max(60.0, draft.now_s - (instance.ready_at_s or draft.now_s))
    idle_s = draft.now_s - draft.last_used_s(instance)
    uses_per_s = draft.usage(instance).entered / (ready_for_s + idle_s)
    return max(0.05, instance.load_time_s) * uses_per_s


# --- the cheapest set


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
    missing: Mapping[DeviceId, int], victims: Sequence[Victim], limit: SetPrice | None, budget: Budget
) -> tuple[Victim, ...] | None:
    """The cheapest set that frees what is missing on every device, at no more than `limit`; or None.

    `victims` come cheapest first, and each is on one of the devices. A branch and bound. Since every price
    grows with every victim, the cheapest set has no superfluous one.
    """
    if not covers(missing, victims):
        return None
    first = pruned(missing, cheapest_prefix(missing, victims))
    search = VictimSearch(victims, missing, first, limit, budget)
    search.visit(0, missing, (), NOTHING_TAKEN)
    return None if search.best is None else pruned(missing, search.best)


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


class Budget:
    """How much searching is left."""

    def __init__(self, nodes: int) -> None:
        self._left = nodes

    def spend(self) -> bool:
        """Take one; False if there is none."""
        self._left -= 1
        return self._left >= 0


class VictimSearch:
    """Depth-first over "take it or leave it", cutting what cannot beat the best set so far."""

    def __init__(
        self,
        victims: Sequence[Victim],
        missing: Mapping[DeviceId, int],
        first: tuple[Victim, ...],
        limit: SetPrice | None,
        budget: Budget,
    ) -> None:
        price = set_price(first)
        is_dearer = limit is not None and price > limit
        self.best: tuple[Victim, ...] | None = None if is_dearer else first
        self._bound = limit if is_dearer and limit is not None else price
        self._victims = victims
        self._budget = budget
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
        if any(still[device] < need for device, need in missing.items()) or not self._budget.spend():
            return
        victim = self._victims[index]
        dearer = with_victim(price, victim)
        if dearer[:2] > self._bound[:2]:
            return  # and so is every set with one that comes later
        if dearer < self._bound:
            rest = {d: left for d, need in missing.items() if (left := need - victim.frees.get(d, 0)) > 0}
            self.visit(index + 1, rest, (*taken, victim), dearer)
        self.visit(index + 1, missing, taken, price)


def suffix_frees(victims: Sequence[Victim], missing: Iterable[DeviceId]) -> list[dict[DeviceId, int]]:
    """What all victims from each index on free together, by device."""
    sums = [dict.fromkeys(missing, 0)]
    for victim in reversed(victims):
        sums.append({device: size + victim.frees.get(device, 0) for device, size in sums[-1].items()})
    return sums[::-1]
