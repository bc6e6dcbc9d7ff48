"""A preview of a load as JSON. Pure reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.control.status import footprint_view, mib, room_view
from orchestrator.core.entities import HOST, Demand, DeviceId, DeviceKind
from orchestrator.core.preview import Eviction, Fitting, Outcome, Preview
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Ready, Refused
from orchestrator.core.wording import Told, explain


def preview_view(snapshot: Snapshot, found: Preview, fitting: Iterable[Fitting]) -> dict[str, object]:
    """What a load would do; `refusal` and `would_fit` only where it would be refused."""
    view: dict[str, object] = {
        "model": found.model.id,
        "state": found.state.value,
        "outcome": found.outcome.value,
        "devices": [device_view(snapshot, device, found) for device in snapshot.devices],
        "parameters": dict(found.parameters),
        "footprint": footprint_view(demand_of(found)),
        "evictions": [eviction_view(eviction) for eviction in found.evictions],
        "waits_for": found.waits_for or None,
    }
    if found.verdict is not None and not isinstance(found.verdict, Ready):
        view["refusal"] = refusal_view(explain(found.verdict, snapshot.now_s))
        view["would_fit"] = [fitting_view(one) for one in fitting]
    return view | {"message": in_words(found, view)}


def demand_of(found: Preview) -> Demand:
    """What it needs in the way that was planned; in a refusal, in the way that comes closest."""
    if isinstance(found.verdict, Refused):
        return found.model.run_with(found.verdict.parameters).demand.over(found.verdict.gpus)
    gpus = sum(1 for device in found.placement if device != HOST)
    return found.model.run_with(found.parameters).demand.over(gpus)


def device_view(snapshot: Snapshot, device_id: DeviceId, found: Preview) -> dict[str, object]:
    """What it takes there, and what is available before and after; `error` where that is unknown."""
    device, room = snapshot.devices[device_id], found.room.get(device_id)
    view: dict[str, object] = {
        "id": device_id,
        "index": device.index if device.kind is DeviceKind.GPU else None,
        "name": device.name,
        "kind": device.kind.value,
        "takes_mib": mib(found.placement.get(device_id, 0)),
    }
    if room is None:
        return view | {"error": snapshot.unmeasured().get(device_id, "it cannot be measured")}
    return (
        view
        | room_view(room.before_bytes)
        | {
            "available_after_mib": mib(max(0, room.after_bytes)),
            "capacity_mib": mib(device.usable_bytes),
        }
    )


def eviction_view(eviction: Eviction) -> dict[str, object]:
    return {
        "model": eviction.model,
        "frees_mib": {device: mib(size) for device, size in eviction.frees.items()},
        "in_flight": eviction.in_flight,
        "idle_s": None if eviction.in_flight else round(eviction.idle_s, 1),
        "priority": eviction.priority,
        "load_time_s": round(eviction.load_time_s, 3),
        "reload_cost": round(eviction.reload_cost, 6),
        "why": why(eviction),
    }


def why(eviction: Eviction) -> str:
    rest = f"priority {eviction.priority}, reloads in {eviction.load_time_s:.1f} s"
    if eviction.in_flight:
        count = eviction.in_flight
        return f"drained, busy with {count} request{'' if count == 1 else 's'}; {rest}"
    return f"idle for {eviction.idle_s:.0f} s; {rest}"


def refusal_view(told: Told) -> dict[str, object]:
    """The error that a load would be answered, with its HTTP status."""
    return {"status": told.status, "code": told.code, "message": told.message, **told.details}


def fitting_view(fitting: Fitting) -> dict[str, object]:
    demand = fitting.demand
    return {
        **fitting.parameters,
        "needs_mib": mib(needed_bytes(demand)),
        "gpu_mib": mib(demand.gpu_bytes),
        "host_mib": mib(demand.host_bytes),
    }


def needed_bytes(demand: Demand) -> int:
    """On the GPU; without one, in RAM."""
    return demand.gpu_bytes or demand.host_bytes


def in_words(found: Preview, view: Mapping[str, object]) -> str:
    name = f"'{found.model.id}'"
    leaving = ", then ".join(f"'{eviction.model}'" for eviction in found.evictions)
    match found.outcome:
        case Outcome.LOADED:
            return f"{name} is loaded."
        case Outcome.LOADING:
            return f"{name} is being loaded; a load would join."
        case Outcome.STARTS:
            return f"{name} would start at once. Nobody would have to leave."
        case Outcome.WAITS if leaving:
            return f"{name} would start once {leaving} had left."
        case Outcome.WAITS:
            return f"{name} would wait: {found.waits_for}."
        case Outcome.REFUSED:
            refusal = view["refusal"]
            assert isinstance(refusal, dict)
            return str(refusal["message"])
