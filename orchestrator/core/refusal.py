"""Why a model cannot be placed, in numbers: what it needs, what could be had, who keeps the rest."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.draft import Draft
from orchestrator.core.entities import MIB, DeviceId, Holding, Model, Refused
from orchestrator.core.foreign import foreign_holdings
from orchestrator.core.lifecycle import State
from orchestrator.core.placement import placements
from orchestrator.core.victims import emptied_bytes, may_ever_leave

WORTH_NAMING_BYTES = 64 * MIB
"""Of every process the driver keeps some MiB that it puts down to nobody."""


def refusal(draft: Draft, model: Model) -> Refused | None:
    """Numbers of why it cannot be, even with every unpinned holder gone; None if it could be."""
    closest: Refused | None = None
    emptied, capacity = draft.remember(emptied_room), draft.remember(usable_room)
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
            forever=any(need > capacity[d] for d, need in placement.items()),
            device_label=draft.device(device).label,
        )
        if closest is None or closeness(refused) < closeness(closest):
            closest = refused
    return replace(closest, holders=kept_holdings(draft, closest.device)) if closest else nowhere(model)


def emptied_room(draft: Draft) -> dict[DeviceId, int]:
    return {device: emptied_bytes(draft, device) for device in draft.measured()}


def usable_room(draft: Draft) -> dict[DeviceId, int]:
    return {device: draft.device(device).usable_bytes for device in draft.measured()}


def closeness(refused: Refused) -> tuple[bool, int]:
    return refused.forever, refused.needed_bytes - refused.available_bytes


def nowhere(model: Model) -> Refused:
    """No device of the kind, number or name it asks for is there at all."""
    device = ", ".join(model.devices) or f"{min(model.gpu_counts)} GPUs"
    return Refused(model.id, device, model.demand.gpu_bytes + model.demand.host_bytes, 0, 0, forever=True)


def kept_holdings(draft: Draft, device: DeviceId) -> tuple[Holding, ...]:
    """Who holds what cannot be freed: pinned and stuck models, and those who are not ours."""
    kept = [
        Holding(
            holder.model, draft.held(holder, device), "stuck" if holder.state is State.STUCK else "pinned"
        )
        for holder in draft.on_device(device)
        if not may_ever_leave(draft, holder)
    ]
    reading = draft.reading(device)
    if reading is not None:
        kept += foreign_holdings(reading.foreign, draft.snapshot.container_names)
        if reading.unexplained_bytes >= WORTH_NAMING_BYTES:
            kept.append(Holding("nobody we know", reading.unexplained_bytes, "memory of no process"))
    return tuple(sorted(kept, key=lambda holding: (-holding.held_bytes, holding.holder)))
