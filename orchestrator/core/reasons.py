"""Why somebody waits, in words: who holds the room and may not be asked yet, or who is just leaving."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from orchestrator.core.draft import Draft
from orchestrator.core.entities import HOST, DeviceId, Entry, Model
from orchestrator.core.lifecycle import LEAVING, Instance, State
from orchestrator.core.patience import KeptPlace
from orchestrator.core.placement import candidate_devices, least_possible
from orchestrator.core.victims import Candidate, as_candidate, may_ever_leave
from orchestrator.core.waiting import effective_priority
from orchestrator.core.wording import mib

MOST_NAMED = 6


def waiting_reason(draft: Draft, model: Model, entry: Entry, place: KeptPlace | None) -> str:
    """What it needs and who has that: everybody with a reservation where it could go, the largest first."""
    demand = least_possible(draft, model).demand
    devices = {device.id for device in candidate_devices(draft, model)}
    if demand.host_bytes:
        devices.add(HOST)
    holders = in_the_way(draft, devices)
    priority = effective_priority(model, entry, draft.now_s)
    named = [f"{holder.model} ({why_it_stays(draft, holder, priority)})" for holder in holders[:MOST_NAMED]]
    if len(holders) > MOST_NAMED:
        named.append(f"{len(holders) - MOST_NAMED} more")
    held = f"the room is held by {', '.join(named)}" if named else "the room is not there yet"
    longer = f"; '{place.entry.model}' has waited longer and goes first" if place else ""
    return f"it needs {mib(demand.gpu_bytes + demand.host_bytes)}, and {held}{longer}"


def in_the_way(draft: Draft, devices: Iterable[DeviceId]) -> list[Instance]:
    held: dict[str, int] = {}
    for device in devices:
        for holder in draft.on_device(device):
            held[holder.model] = held.get(holder.model, 0) + draft.held(holder, device)
    largest = sorted((-size, model) for model, size in held.items() if size)
    return [draft.instance(model) for _, model in largest]


def why_it_stays(draft: Draft, holder: Instance, priority: int) -> str:
    """What keeps a waiter of this priority from its part of the room."""
    if not may_ever_leave(draft, holder):
        return "stuck" if holder.state is State.STUCK else "pinned"
    if holder.state in LEAVING:
        return "leaving"
    candidate = as_candidate(draft, holder) if holder.state is State.READY else None
    if candidate is None:
        return str(holder.state.value)
    if not candidate.victim.is_busy:
        return "idle, may be asked"
    in_flight = draft.in_flight(holder)
    use = f"busy with {requests(in_flight)}" if in_flight else "in use a moment ago"
    return use + not_yet(draft, candidate, priority)


def not_yet(draft: Draft, candidate: Candidate, priority: int) -> str:
    if candidate.not_before_s > draft.now_s:
        return f", may be asked in {ceil(candidate.not_before_s - draft.now_s)} s"
    if candidate.drainable_for is not None and candidate.drainable_for > priority:
        return f", and its priority {candidate.drainable_for} is above {priority}"
    return ", may be asked"


def tell_the_claimed(draft: Draft) -> None:
    """Who has been promised room waits for those who leave it."""
    for entry in list(draft.entries.values()):
        claim = draft.instance(entry.model)
        if claim.state is State.CLAIMED:
            draft.wait(entry, f"it waits for {claim_waits_for(draft, claim)}")


def claim_waits_for(draft: Draft, claim: Instance) -> str:
    holders = in_the_way(draft, claim.placement)
    leaving = [holder for holder in holders if holder.state in LEAVING and holder.model != claim.model]
    if leaving:
        named = [f"{holder.model} {how_it_leaves(draft, holder)}" for holder in leaving[:MOST_NAMED]]
        more = len(leaving) - MOST_NAMED
        return " and ".join([*named, f"{more} more"] if more > 0 else named)
    return "the memory to be measured anew, or a claim before it"


def how_it_leaves(draft: Draft, holder: Instance) -> str:
    match holder.state:
        case State.DRAINING if draft.in_flight(holder):
            return f"to finish {requests(draft.in_flight(holder))}"
        case State.RECLAIMING:
            return "to give its memory back"
        case _:
            return "to stop"


def requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"
