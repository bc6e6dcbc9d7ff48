"""Who may leave for a waiter, and the cheapest set of them that makes enough room."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeAlias

from orchestrator.core.draft import Draft, remembered
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


class Row:
    """Victims as they are asked, the cheapest first; and what they free, added up from the last of them."""

    def __init__(self, victims: Sequence[Victim]) -> None:
        self.victims = victims
        self._indices: dict[DeviceId, list[int]] = {}
        self._freed: dict[DeviceId, list[int]] = {}
        for index in reversed(range(len(victims))):
            for device, size in victims[index].frees.items():
                freed = self._freed.setdefault(device, [])
                freed.append(freed[-1] + size if freed else size)
                self._indices.setdefault(device, []).append(index)

    def freed(self, device: DeviceId) -> int:
        """By all of them together."""
        freed = self._freed.get(device)
        return freed[-1] if freed else 0

    def last_start(self, missing: Mapping[DeviceId, int]) -> int:
        """The last index from which on they free what is missing; -1 if even all of them do not."""
        last = len(self.victims) - 1
        for device, need in missing.items():
            freed = self._freed.get(device, ())
            enough = bisect_left(freed, need)
            if enough == len(freed):
                return -1
            last = min(last, self._indices[device][enough])
        return last


Victims: TypeAlias = Mapping[DeviceId, Row]
"""Who may be asked to leave, by device; only devices with somebody to ask."""


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


@remembered
def emptied_bytes(draft: Draft, device: DeviceId) -> int:
    """Available with every holder gone that could ever be made to go."""
    return draft.available(device) + draft.freed_by(
        (holder for holder in draft.on_device(device) if may_ever_leave(draft, holder)), device
    )


def victims_for(draft: Draft, model: Model, entry: Entry) -> Victims:
    """Everybody who may be asked to leave for this entry now; wakes when somebody else may be."""
    priority = effective_priority(model, entry, draft.now_s)
    rows = {device: row_for(draft, device, priority) for device in draft.occupied()}
    return {device: row for device, row in rows.items() if row.victims}


@remembered
def row_for(draft: Draft, device: DeviceId, priority: int) -> Row:
    """Whom a waiter of this priority may ask on the device."""
    return Row([c.victim for c in candidates(draft, device) if may_be_asked(draft, c, priority)])


@remembered
def candidates(draft: Draft, device: DeviceId) -> list[Candidate]:
    """All on the device that could leave it, the cheapest first."""
    everybody = (draft.remember_of(holder, as_candidate) for holder in draft.on_device(device))
    return sorted((c for c in everybody if c is not None), key=lambda c: victim_order(c.victim))


def may_be_asked(draft: Draft, candidate: Candidate, priority: int) -> bool:
    """Whether a waiter of this priority may ask now; wakes when that changes."""
    if candidate.not_before_s > draft.now_s:
        draft.wake(candidate.not_before_s)
        return False
    if candidate.drainable_for is None or candidate.drainable_for <= priority:
        return True
    if candidate.idle_at_s is not None:
        draft.wake(candidate.idle_at_s)
    return False


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
    missing: Mapping[DeviceId, int], row: Row, limit: SetPrice | None, budget: Budget
) -> tuple[Victim, ...] | None:
    """The cheapest set that frees what is missing on every device, at no more than `limit`; or None.

    Everybody in the row is on one of the devices. A branch and bound. Since every price grows with every
    victim, the cheapest set has no superfluous one.
    """
    if row.last_start(missing) < 0:
        return None
    first = pruned(missing, cheapest_prefix(missing, row.victims))
    search = VictimSearch(row, first, limit, budget)
    search.visit(0, missing, (), NOTHING_TAKEN)
    return None if search.best is None else pruned(missing, search.best)


def those_on(victims: Victims, devices: Iterable[DeviceId]) -> Row:
    """Victims on any of the devices, cheapest first, each once."""
    rows = [victims[device] for device in devices if device in victims]
    if len(rows) == 1:
        return rows[0]
    each = {victim.instance.model: victim for row in rows for victim in row.victims}
    return Row(sorted(each.values(), key=victim_order))


def cheapest_prefix(missing: Mapping[DeviceId, int], victims: Sequence[Victim]) -> Sequence[Victim]:
    """The cheapest ones in a row until they are enough."""
    left = dict(missing)
    for count, victim in enumerate(victims, start=1):
        for device, freed in victim.frees.items():
            if device in left:
                left[device] -= freed
                if left[device] <= 0:
                    del left[device]
        if not left:
            return victims[:count]
    return victims


def pruned(missing: Mapping[DeviceId, int], victims: Sequence[Victim]) -> tuple[Victim, ...]:
    """A sufficient set without a superfluous member: drop the dearest ones that are not needed."""
    spare = {device: -need for device, need in missing.items()}
    for victim in victims:
        for device, freed in victim.frees.items():
            if device in spare:
                spare[device] += freed
    kept = []
    for victim in reversed(victims):
        there = [(device, freed) for device, freed in victim.frees.items() if device in spare]
        if any(spare[device] < freed for device, freed in there):
            kept.append(victim)
            continue
        for device, freed in there:
            spare[device] -= freed
    return tuple(reversed(kept))


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
        row: Row,
        first: tuple[Victim, ...],
        limit: SetPrice | None,
        budget: Budget,
    ) -> None:
        price = set_price(first)
        is_dearer = limit is not None and price > limit
        self.best: tuple[Victim, ...] | None = None if is_dearer else first
        self._bound = limit if is_dearer and limit is not None else price
        self._row = row
        self._budget = budget

    def visit(
        self, index: int, missing: Mapping[DeviceId, int], taken: tuple[Victim, ...], price: SetPrice
    ) -> None:
        """Which victim from `index` on is taken next? They come cheapest first."""
        if not missing:
            if price < self._bound:
                self.best, self._bound = taken, price
            return
        for next_index in range(index, self._row.last_start(missing) + 1):
            if not self._budget.spend():
                return
            victim = self._row.victims[next_index]
            dearer = with_victim(price, victim)
            if dearer < self._bound:
                rest = {d: left for d, need in missing.items() if (left := need - victim.frees.get(d, 0)) > 0}
                self.visit(next_index + 1, rest, (*taken, victim), dearer)
            elif dearer[:2] > self._bound[:2]:
                return  # and so is every set with one that comes later
